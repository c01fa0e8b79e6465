// SPDX-License-Identifier: Apache-2.0
// The arguments of residual_map, for every backend.
#pragma once

#include "common/cuda_resources.h"
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
  int threads = 1;     // cpu
  CudaResources cuda;  // cuda

  TensorView residual;  // forward: [B, C, D, H, W]

  TensorView grad_residual;    // backward: [B, C, D, H, W]
  TensorView grad_image;       // [B, C, D, H, W]; data is null where not asked for
  TensorView grad_prediction;  // [N, B, L, P * C], contiguous; likewise
};

}  // namespace grcsf
