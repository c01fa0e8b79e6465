// SPDX-License-Identifier: Apache-2.0
// The entry points of the CPU kernels: each calls the copy for this processor's instruction set.
#include "cpu/isa.h"
#include "cpu/residual_map.h"

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

void residual_map_forward(const ResidualMapArguments& arguments) {
  GRCSF_DISPATCH(residual_map_forward, arguments);
}

void residual_map_backward(const ResidualMapArguments& arguments) {
  GRCSF_DISPATCH(residual_map_backward, arguments);
}

}  // namespace grcsf
