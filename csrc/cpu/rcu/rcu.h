// SPDX-License-Identifier: Apache-2.0
// rcu on the CPU: the entry points for each instruction set.
#pragma once

#include "common/arguments/rcu.h"

namespace grcsf {

// The fastest that this processor runs.
void rcu_forward(const RcuArguments& arguments);
void rcu_backward(const RcuArguments& arguments);

#define GRCSF_DECLARE(isa)                          \
  namespace isa {                                   \
  void rcu_forward(const RcuArguments& arguments);  \
  void rcu_backward(const RcuArguments& arguments); \
  }
GRCSF_DECLARE(portable)
GRCSF_DECLARE(avx2)
GRCSF_DECLARE(avx512)
#undef GRCSF_DECLARE

}  // namespace grcsf
