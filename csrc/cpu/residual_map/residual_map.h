// SPDX-License-Identifier: Apache-2.0
// residual_map on the CPU: the entry points for each instruction set.
#pragma once

#include "common/arguments/residual_map.h"

namespace grcsf {

// The fastest that this processor runs.
void residual_map_forward(const ResidualMapArguments& arguments);
void residual_map_backward(const ResidualMapArguments& arguments);

#define GRCSF_DECLARE(isa)                                           \
  namespace isa {                                                    \
  void residual_map_forward(const ResidualMapArguments& arguments);  \
  void residual_map_backward(const ResidualMapArguments& arguments); \
  }
GRCSF_DECLARE(portable)
GRCSF_DECLARE(avx2)
GRCSF_DECLARE(avx512)
#undef GRCSF_DECLARE

}  // namespace grcsf
