// SPDX-License-Identifier: Apache-2.0
// Kernels with one fault each: what the emulation must report. test_faults.py runs them.
#include "faults.h"

#include "cuda/runtime/launch.cuh"

namespace grcsf {
namespace cuda {
namespace {

// Neighbors exchange values through shared memory, as kernels do it, and each fault in its turn.
__global__ void exchange_kernel(const float* in, float* out, Fault fault) {
  SharedArena arena;
  const auto space = arena.take<float>(static_cast<int>(blockDim.x));
  const int thread = static_cast<int>(threadIdx.x);
  const int last = static_cast<int>(blockDim.x) - 1;
  if (fault != Fault::unwritten || thread != 5) space.set(thread, in[thread]);
  if (fault == Fault::half_barrier) {
    if (thread >= 40) return;
    sync_block();
  } else if (fault == Fault::two_barriers) {
    if (thread < 32) {
      sync_block();
    } else {
      sync_block();
    }
  } else if (fault != Fault::no_barrier) {
    sync_block();
  }
  const int from = fault == Fault::outside ? thread + 1 : (thread == last ? 0 : thread + 1);
  const float value = space.get(from);
  if (fault == Fault::no_second_barrier) space.set(thread, value);
  out[thread] = value;
}

__global__ void shuffle_kernel(const float* in, float* out, Fault fault) {
  const int thread = static_cast<int>(threadIdx.x);
  float value = in[thread];
  if (fault == Fault::inactive_lane && thread >= 24) return;
  if (fault == Fault::diverged && thread % 2 == 0) {
    value = warp_sum(value);
  } else {
    value = warp_sum(value);
  }
  out[thread] = value;
}

// Lanes of a warp exchange through shared memory.
__global__ void warp_kernel(const float* in, float* out, Fault fault) {
  SharedArena arena;
  const auto space = arena.take<float>(static_cast<int>(blockDim.x));
  const int thread = static_cast<int>(threadIdx.x);
  space.set(thread, in[thread]);
  if (fault != Fault::no_warp_barrier) sync_warp();
  const int other =
      fault == Fault::other_warp ? (thread + warp_size) % static_cast<int>(blockDim.x) : thread ^ 1;
  out[thread] = space.get(other);
}

__global__ void copy_kernel(const float* in, float* out, Fault fault) {
  SharedArena arena;
  const auto space = arena.take<float>(4 * static_cast<int>(blockDim.x));
  const int thread = static_cast<int>(threadIdx.x);
  copy_async<4>(space, 4 * thread + (fault == Fault::misaligned ? 1 : 0), in + 4 * thread);
  commit_copies();
  if (fault == Fault::not_waited) {
    wait_copies<1>();
  } else if (fault != Fault::forgotten) {
    wait_copies<0>();
  }
  if (fault == Fault::forgotten) return;
  sync_block();
  const int last = static_cast<int>(blockDim.x) - 1;
  out[thread] = space.get(4 * (last - thread));
}

}  // namespace

void run_fault(Fault fault, const TensorView& in, const TensorView& out, int threads) {
  const Queue queue("fault", in, 0);
  const auto* from = static_cast<const float*>(in.data);
  auto* to = static_cast<float*>(out.data);
  switch (fault) {
    case Fault::none_of_shuffles:
    case Fault::inactive_lane:
    case Fault::diverged:
      return queue.launch("shuffle_kernel", shuffle_kernel, 2, threads, 0, from, to, fault);
    case Fault::none_of_warps:
    case Fault::no_warp_barrier:
    case Fault::other_warp:
      return queue.launch("warp_kernel", warp_kernel, 2, threads, shared_bytes<float>(threads),
                          from, to, fault);
    case Fault::none_of_copies:
    case Fault::not_waited:
    case Fault::forgotten:
    case Fault::misaligned:
      return queue.launch("copy_kernel", copy_kernel, 1, threads, shared_bytes<float>(4 * threads),
                          from, to, fault);
    case Fault::too_little:
      return queue.launch("exchange_kernel", exchange_kernel, 1, threads, 64, from, to, fault);
    case Fault::too_much:
      return queue.launch("exchange_kernel", exchange_kernel, 1, threads, 1 << 20, from, to, fault);
    default:
      return queue.launch("exchange_kernel", exchange_kernel, 2, threads,
                          shared_bytes<float>(threads), from, to, fault);
  }
}

}  // namespace cuda
}  // namespace grcsf
