// SPDX-License-Identifier: Apache-2.0
// The arguments of rcu, for every backend.
#pragma once

#include "common/cuda_resources.h"
#include "common/tensor_view.h"

namespace grcsf {

// The eight weights of rcu, or their gradients: contiguous, float32 (float64 with float64 data).
struct RcuWeights {
  TensorView query_weight;   // [K, h, c, C]
  TensorView query_bias;     // [K, h, c]
  TensorView value_weight;   // [K, C, h, c]
  TensorView value_bias;     // [K, C]
  TensorView score_weight1;  // [m, C + K * c]
  TensorView score_bias1;    // [B, m]
  TensorView score_weight2;  // [m]
  TensorView score_bias2;    // []
};

struct RcuArguments {
  TensorView x;         // [B, C, D, H, W], contiguous or channels-last
  TensorView residual;  // [B, K, c, D, H, W], contiguous
  RcuWeights weights;
  std::int64_t patch[3] = {1, 1, 1};  // no larger than the volume
  int threads = 1;                    // cpu
  CudaResources cuda;                 // cuda

  TensorView out;     // forward: [B, C, D, H, W] in the layout of x
  TensorView scores;  // [B, ceil(D / p), ceil(H / p), ceil(W / p)]; input of backward

  TensorView grad_out;       // backward: [B, C, D, H, W] in the layout of x
  TensorView grad_scores;    // like scores
  TensorView grad_x;         // in the layout of x; data is null where not asked for
  TensorView grad_residual;  // contiguous; likewise
  RcuWeights grad_weights;   // always all of them: they cost little together
};

}  // namespace grcsf
