// SPDX-License-Identifier: Apache-2.0
// residual_map on CUDA: the entry points. Both throw std::runtime_error where CUDA reports an
// error.
#pragma once

#include "common/arguments/residual_map.h"

namespace grcsf {
namespace cuda {

void residual_map_forward(const ResidualMapArguments& arguments);
void residual_map_backward(const ResidualMapArguments& arguments);

}  // namespace cuda
}  // namespace grcsf
