// SPDX-License-Identifier: Apache-2.0
// The exponential of simd.h, value by value. No operator needs it: it is there for the tests, which
// hold every instruction set's copy to its error bound.
#pragma once

#include "common/tensor_view.h"

namespace grcsf {

struct ExponentialArguments {
  TensorView values;  // [n], contiguous; float or double
  TensorView out;     // likewise
};

// The one that the kernels use on this processor.
void exponential(const ExponentialArguments& arguments);

#define GRCSF_DECLARE(isa)                                 \
  namespace isa {                                          \
  void exponential(const ExponentialArguments& arguments); \
  }
GRCSF_DECLARE(portable)
GRCSF_DECLARE(avx2)
GRCSF_DECLARE(avx512)
#undef GRCSF_DECLARE

}  // namespace grcsf
