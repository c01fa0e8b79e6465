// SPDX-License-Identifier: Apache-2.0
// gcu on the CPU: arguments, and the entry points for each instruction set.
#pragma once

#include "common/tensor_view.h"

namespace grcsf {

struct GcuArguments {
  TensorView skip;       // [B, C, D, H, W], contiguous or channels-last
  TensorView deep;       // [B, C, D', H', W'], likewise
  TensorView skip_gate;  // [B, C], contiguous; float, or double with double data
  TensorView deep_gate;  // likewise
  bool similarity = false;
  double eps = 0;
  int threads = 1;

  TensorView compensated;    // forward: as skip
  TensorView dissimilarity;  // [B, 1, D, H, W], contiguous

  TensorView grad_compensated;    // backward: as skip
  TensorView grad_dissimilarity;  // [B, 1, D, H, W], contiguous
  TensorView grad_skip;           // as skip; data is null where not asked for, as in the following
  TensorView grad_deep;           // as deep
  TensorView grad_skip_gate;      // [B, C], contiguous
  TensorView grad_deep_gate;      // likewise
};

// The fastest that this processor runs.
void gcu_forward(const GcuArguments& arguments);
void gcu_backward(const GcuArguments& arguments);

#define GRCSF_DECLARE(isa)                          \
  namespace isa {                                   \
  void gcu_forward(const GcuArguments& arguments);  \
  void gcu_backward(const GcuArguments& arguments); \
  }
GRCSF_DECLARE(portable)
GRCSF_DECLARE(avx2)
GRCSF_DECLARE(avx512)
#undef GRCSF_DECLARE

}  // namespace grcsf
