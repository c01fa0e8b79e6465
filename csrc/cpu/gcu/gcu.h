// SPDX-License-Identifier: Apache-2.0
// gcu on the CPU: the entry points for each instruction set.
#pragma once

#include "common/arguments/gcu.h"

namespace grcsf {

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
