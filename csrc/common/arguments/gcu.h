// SPDX-License-Identifier: Apache-2.0
// The arguments of gcu, for every backend.
#pragma once

#include "common/cuda_resources.h"
#include "common/tensor_view.h"

namespace grcsf {

struct GcuArguments {
  TensorView skip;       // [B, C, D, H, W], contiguous or channels-last
  TensorView deep;       // [B, C, D', H', W'], likewise
  TensorView skip_gate;  // [B, C], contiguous; float, or double with double data
  TensorView deep_gate;  // likewise
  bool similarity = false;
  double eps = 0;
  int threads = 1;     // cpu
  CudaResources cuda;  // cuda

  TensorView compensated;    // forward: as skip
  TensorView dissimilarity;  // [B, 1, D, H, W], contiguous

  TensorView grad_compensated;    // backward: as skip
  TensorView grad_dissimilarity;  // [B, 1, D, H, W], contiguous
  TensorView grad_skip;           // as skip; data is null where not asked for, as in the following
  TensorView grad_deep;           // as deep
  TensorView grad_skip_gate;      // [B, C], contiguous
  TensorView grad_deep_gate;      // likewise
};

}  // namespace grcsf
