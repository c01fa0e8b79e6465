// SPDX-License-Identifier: Apache-2.0
// residual_map on the CPU: arguments, and the entry points for each instruction set.
#pragma once

#include "common/tensor_view.h"

namespace grcsf {

struct ResidualMapArguments {
  TensorView image;       // [B, C, D, H, W]
  TensorView prediction;  // [N, B, L, P * C], contiguous
  TensorView hidden;      // [N, B, L] of uint8, contiguous; data is null where all draws count
  std::int64_t patch[3] = {1, 1, 1};
  bool normalized_target = false;
  bool average_reconstructions = false;
  double eps = 0;
  int threads = 1;

  TensorView residual;  // forward: [B, C, D, H, W]

  TensorView grad_residual;    // backward: [B, C, D, H, W]
  TensorView grad_image;       // [B, C, D, H, W]; data is null where not asked for
  TensorView grad_prediction;  // [N, B, L, P * C], contiguous; likewise
};

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
