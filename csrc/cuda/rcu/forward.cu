// SPDX-License-Identifier: Apache-2.0
// rcu on CUDA, forward.
//
// After the survey and the tables (rcu/prepare.cu) blocks take pieces of patches in turn: a thread
// has a voxel, projects its queries, looks the expectations up (or sums them, rcu/direct.cuh) and
// writes x + score * y.
//
// Bytes: x twice, from cache the second time where patches are small, maps and out once.
#include "cuda/rcu/rcu.h"

#include "cuda/rcu/direct.cuh"

namespace grcsf {
namespace cuda {
namespace {

template <typename T, bool many>
__global__ void __launch_bounds__(rcu_most_threads, rcu_blocks<T>)
    rcu_output_kernel(const RcuProblem m) {
  using A = ComputeType<T>;
  SharedArena arena;
  const auto stage = arena.take<A>(stage_values);
  const auto keys = arena.take<A>(m.tile_keys * m.key_lines);
  const int thread = static_cast<int>(threadIdx.x);
  A *a = column_of<A>(m, queries, thread), *mean = column_of<A>(m, means, thread);
  const A* bias = weights_at<A>(m.value_bias);
  for (std::int64_t index = blockIdx.x; index < m.units; index += m.slots) {
    const Unit unit = unit_of(m, index);
    const A score = static_cast<const A*>(m.scores)[unit.patch];
    for (int tile = unit.begin; tile < unit.end; tile += m.threads) {
      const bool exists = tile + thread < unit.end;
      const Place place = place_of(m, unit.box, exists ? tile + thread : tile);
      const T* x = static_cast<const T*>(m.x) + place.x;
      T* out = static_cast<T*>(m.out) + place.x;
      project<false>(m, x, exists, stage, a);
      attend<T, many, false>(m, unit, exists, keys);
      spread<true>(m, mean, exists, stage, [&](int c, A sum) {
        for (int map = 0; map < m.maps; ++map) sum += bias[map * m.channels + c];
        const std::int64_t at = c * m.stride_c;
        out[at] = narrowed<T>(widened(x[at]) + score * sum);
      });
    }
  }
}

template <typename T>
void forward(const RcuArguments& arguments) {
  using A = ComputeType<T>;
  const Queue queue("rcu", arguments.x, arguments.cuda.stream);
  RcuProblem m = rcu_problem(arguments, queue);
  if (rcu_patch_forward(arguments, queue, m)) return;
  rcu_prepare(arguments, queue, m, true);
  const std::size_t shared =
      shared_bytes<A>(stage_values) + shared_bytes<A>(m.tile_keys * m.key_lines);
  const auto kernel = m.map_channels > 1 ? rcu_output_kernel<T, true> : rcu_output_kernel<T, false>;
  queue.launch("rcu_output", kernel, m.slots, m.threads, shared, m);
}

}  // namespace

void rcu_forward(const RcuArguments& arguments) {
  for_dtype(arguments.x.dtype,
            [&](auto type) { forward<typename decltype(type)::type>(arguments); });
}

}  // namespace cuda
}  // namespace grcsf
