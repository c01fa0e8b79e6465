// SPDX-License-Identifier: Apache-2.0
// rcu on CUDA: the entry points. Both throw std::runtime_error where CUDA reports an error.
#pragma once

#include "common/arguments/rcu.h"

namespace grcsf {
namespace cuda {

void rcu_forward(const RcuArguments& arguments);
void rcu_backward(const RcuArguments& arguments);

}  // namespace cuda
}  // namespace grcsf
