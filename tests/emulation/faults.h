// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/tensor_view.h"

namespace grcsf {
namespace cuda {

enum class Fault {
  none,
  no_barrier,
  no_second_barrier,
  half_barrier,
  two_barriers,
  unwritten,
  outside,
  too_little,
  too_much,
  none_of_shuffles,
  inactive_lane,
  diverged,
  none_of_warps,
  no_warp_barrier,
  other_warp,
  none_of_copies,
  not_waited,
  forgotten,
  misaligned
};

void run_fault(Fault fault, const TensorView& in, const TensorView& out, int threads);

}  // namespace cuda
}  // namespace grcsf
