// SPDX-License-Identifier: Apache-2.0
// gcu on CUDA: the entry points. Both throw std::runtime_error where CUDA reports an error.
#pragma once

#include "common/arguments/gcu.h"

namespace grcsf {
namespace cuda {

void gcu_forward(const GcuArguments& arguments);
void gcu_backward(const GcuArguments& arguments);

}  // namespace cuda
}  // namespace grcsf
