// SPDX-License-Identifier: Apache-2.0
// The entry points of the CPU kernels: each calls the copy for this processor's instruction set.
#include "cpu/gcu/gcu.h"
#include "cpu/rcu/rcu.h"
#include "cpu/residual_map/residual_map.h"
#include "cpu/runtime/isa.h"
#include "cpu/simd/exponential.h"

#ifdef GRCSF_HAVE_X86
#define GRCSF_DISPATCH(function, arguments) \
  switch (isa()) {                          \
    case Isa::avx512:                       \
      return avx512::function(arguments);   \
    case Isa::avx2:                         \
      return avx2::function(arguments);     \
    default:                                \
      return portable::function(arguments); \
  }
#else
#define GRCSF_DISPATCH(function, arguments) return portable::function(arguments)
#endif

namespace grcsf {

void exponential(const ExponentialArguments& arguments) { GRCSF_DISPATCH(exponential, arguments); }

void gcu_forward(const GcuArguments& arguments) { GRCSF_DISPATCH(gcu_forward, arguments); }

void gcu_backward(const GcuArguments& arguments) { GRCSF_DISPATCH(gcu_backward, arguments); }

void residual_map_forward(const ResidualMapArguments& arguments) {
  GRCSF_DISPATCH(residual_map_forward, arguments);
}

void residual_map_backward(const ResidualMapArguments& arguments) {
  GRCSF_DISPATCH(residual_map_backward, arguments);
}

void rcu_forward(const RcuArguments& arguments) { GRCSF_DISPATCH(rcu_forward, arguments); }

void rcu_backward(const RcuArguments& arguments) { GRCSF_DISPATCH(rcu_backward, arguments); }

}  // namespace grcsf
