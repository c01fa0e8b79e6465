// SPDX-License-Identifier: Apache-2.0
// rcu on CUDA, backward.
//
// The survey and the tables of forward, then two passes over the voxels: the first gives the
// gradients of the value weights and of the scores, the second, when those are known, the gradients
// of x and of the query weights. Blocks take pieces of patches in turn and add what they find for
// the weights to a slot of their own, which a last kernel sums: no atomics, the same bits every
// run. The gradient of the map is in rcu/map_gradient.cu.
//
// Bytes: x and grad_out in each pass, x once more for the survey, from cache where patches are
// small; grad_x is written once.
// Hazards: threads read each other's columns for the gradients of weights, between barriers.
#include "cuda/rcu/rcu.h"

#include "cuda/rcu/direct.cuh"

namespace grcsf {
namespace cuda {
namespace {

constexpr int small_threads = 128;  // of a block for a patch
constexpr int sum_threads = 256;
constexpr int most_splits = 256;  // of the patches, for the gradients of the scoring network

__device__ __forceinline__ std::int64_t value_slot(const RcuProblem& m) {
  return std::int64_t(m.lines + 1) * m.channels;
}
__device__ __forceinline__ std::int64_t query_slot(const RcuProblem& m) {
  return std::int64_t(m.lines) * (m.channels + 1);
}

// This block's slot, all zeros.
template <typename A>
__device__ __forceinline__ A* start_slot(void* slots, std::int64_t size) {
  A* slot = static_cast<A*>(slots) + blockIdx.x * size;
  for (std::int64_t i = threadIdx.x; i < size; i += blockDim.x) slot[i] = 0;
  sync_block();
  return slot;
}

// Shared memory of a pass.
template <typename A>
struct Space {
  Shared<A> stage, keys, sums;
  Shared<std::int64_t> places;

  __device__ __forceinline__ explicit Space(const RcuProblem& m) {
    SharedArena arena;
    stage = arena.take<A>(stage_values);
    keys = arena.take<A>(m.tile_keys * m.key_lines);
    sums = arena.take<A>(rcu_most_threads / warp_size);
    places = arena.take<std::int64_t>(m.threads);
  }
};

template <typename A>
std::size_t space_bytes(const RcuProblem& m) {
  return shared_bytes<A>(stage_values) + shared_bytes<A>(m.tile_keys * m.key_lines) +
         shared_bytes<A>(rcu_most_threads / warp_size) + shared_bytes<std::int64_t>(m.threads);
}

// First pass: sums over the voxels of grad_out . y, and gradients of value weights and bias.
template <typename T, bool many>
__global__ void __launch_bounds__(rcu_most_threads, rcu_blocks<T, many>)
    rcu_values_kernel(const RcuProblem m, const RcuGradients gradients) {
  using A = ComputeType<T>;
  const Space<A> space(m);
  const int thread = static_cast<int>(threadIdx.x);
  A *a = column_of<A>(m, queries, thread), *reach = column_of<A>(m, reaches, thread);
  const A* mean = column_of<A>(m, means, thread);
  const A* bias = weights_at<A>(m.value_bias);
  const T *x = static_cast<const T*>(m.x), *grad = static_cast<const T*>(m.grad_out);
  A* slot = start_slot<A>(gradients.values, value_slot(m));
  A* of_bias = slot + std::int64_t(m.lines) * m.channels;
  for (std::int64_t index = blockIdx.x; index < m.units; index += m.slots) {
    const Unit unit = unit_of(m, index);
    const A score = static_cast<const A*>(m.scores)[unit.patch];
    A reached = 0;
    for (int tile = unit.begin; tile < unit.end; tile += m.threads) {
      const bool exists = tile + thread < unit.end;
      const Place place = place_of(m, unit.box, exists ? tile + thread : tile);
      space.places.set(thread, place.x);
      project<false>(m, x + place.x, exists, space.stage, a);
      project<true>(m, grad + place.x, exists, space.stage, reach);
      attend<T, many, false>(m, unit, exists, space.keys);
      for (int line = 0; exists && line < m.lines; ++line) reached += reach[line] * mean[line];
      sync_block();
      add_outer<true>(m, grad, space.places, least(m.threads, unit.end - tile),
                      column_of<A>(m, means, 0), score, slot, [&](int c, A sum) {
                        of_bias[c] += score * sum;
                        A constant = 0;
                        for (int map = 0; map < m.maps; ++map) {
                          constant += bias[map * m.channels + c];
                        }
                        reached += sum * constant;
                      });
      sync_block();
    }
    const A sum = block_sum(reached, space.sums);
    if (thread == 0) static_cast<A*>(gradients.reached)[index] = sum;
    sync_block();
  }
}

// Second pass: gradients of x, of query weights and bias.
template <typename T, bool many>
__global__ void __launch_bounds__(rcu_most_threads, rcu_blocks<T, many>)
    rcu_queries_kernel(const RcuProblem m, const RcuGradients gradients) {
  using A = ComputeType<T>;
  const Space<A> space(m);
  const int thread = static_cast<int>(threadIdx.x), warps = m.threads / warp_size;
  A *a = column_of<A>(m, queries, thread), *reach = column_of<A>(m, reaches, thread);
  const A *slope = column_of<A>(m, slopes, thread), *all = column_of<A>(m, slopes, 0);
  const T *x = static_cast<const T*>(m.x), *grad = static_cast<const T*>(m.grad_out);
  T* grad_x = static_cast<T*>(m.grad_x);
  A* slot = start_slot<A>(gradients.queries, query_slot(m));
  A* of_bias = slot + std::int64_t(m.lines) * m.channels;
  for (std::int64_t index = blockIdx.x; index < m.units; index += m.slots) {
    const Unit unit = unit_of(m, index);
    const A score = static_cast<const A*>(m.scores)[unit.patch];
    const A* of_means = static_cast<const A*>(gradients.means) + unit.patch * m.inputs;
    for (int tile = unit.begin; tile < unit.end; tile += m.threads) {
      const bool exists = tile + thread < unit.end;
      const int count = least(m.threads, unit.end - tile);
      const Place place = place_of(m, unit.box, exists ? tile + thread : tile);
      space.places.set(thread, place.x);
      project<false>(m, x + place.x, exists, space.stage, a);
      project<true>(m, grad + place.x, exists, space.stage, reach);
      attend<T, many, true>(m, unit, exists, space.keys);
      if (grad_x != nullptr) {
        spread<false>(m, slope, exists, space.stage, [&](int c, A sum) {
          const std::int64_t at = place.x + c * m.stride_c;
          grad_x[at] = narrowed<T>(widened(grad[at]) + (score * sum + of_means[c]));
        });
      }
      sync_block();
      add_outer<false>(m, x, space.places, count, all, score, slot, [](int, A) {});
      for (int line = warp_index(); line < m.lines; line += warps) {
        A sum = 0;
        for (int v = lane_index(); v < count; v += warp_size) {
          sum += all[std::int64_t(v) * m.column + line];
        }
        sum = warp_sum(sum);
        if (lane_index() == 0) of_bias[line] += score * sum;
      }
      sync_block();
    }
  }
}

// A block a patch: the scoring network backward, up to the sums over patches.
template <typename A>
__global__ void __launch_bounds__(small_threads)
    rcu_score_kernel(const RcuProblem m, const RcuGradients gradients) {
  constexpr int warps = small_threads / warp_size;
  SharedArena arena;
  const auto units = arena.take<A>(m.hidden);
  const auto sums = arena.take<A>(warps);
  const std::int64_t patch = blockIdx.x;
  const Box box = box_of(m, patch);
  const int thread = static_cast<int>(threadIdx.x);
  A reached = 0;
  for (int piece = thread; piece < m.pieces; piece += small_threads) {
    reached += static_cast<const A*>(gradients.reached)[patch * m.pieces + piece];
  }
  reached = block_sum(reached, sums) + static_cast<const A*>(m.grad_scores)[patch];
  const A score = static_cast<const A*>(m.scores)[patch];
  const A grad_logit = reached * score * (1 - score);
  const A* averages = static_cast<const A*>(m.means) + patch * m.inputs;
  const A* weight1 = weights_at<A>(m.weight1);
  A* row = static_cast<A*>(gradients.rows) + patch * (1 + 2 * m.hidden);
  for (int unit = warp_index(); unit < m.hidden; unit += warps) {
    A sum = 0;
    for (int input = lane_index(); input < m.inputs; input += warp_size) {
      sum += weight1[std::int64_t(unit) * m.inputs + input] * averages[input];
    }
    sum = warp_sum(sum) + weights_at<A>(m.bias1)[std::int64_t(box.sample) * m.hidden + unit];
    const bool passes = !(sum <= 0);  // NaN passes
    const A grad_hidden = passes ? grad_logit * weights_at<A>(m.weight2)[unit] : A(0);
    if (lane_index() != 0) continue;
    units.set(unit, grad_hidden);
    row[1 + unit] = grad_hidden;
    row[1 + m.hidden + unit] = passes ? grad_logit * sum : A(0);
  }
  if (thread == 0) row[0] = grad_logit;
  sync_block();
  A* of_means = static_cast<A*>(gradients.means) + patch * m.inputs;
  for (int input = thread; input < m.inputs; input += small_threads) {
    A sum = 0;
    for (int unit = 0; unit < m.hidden; ++unit) {
      sum += units.get(unit) * weight1[std::int64_t(unit) * m.inputs + input];
    }
    of_means[input] = sum / static_cast<A>(box.voxels);
  }
}

// Sums over one split of the patches: weight1 [hidden][inputs], weight2 [hidden] and bias2. A warp
// takes 32 neighboring outputs, whose rows it reads as broadcasts.
template <typename A>
__global__ void __launch_bounds__(sum_threads)
    rcu_network_kernel(const RcuProblem m, const RcuGradients gradients) {
  const std::int64_t begin = m.patches * blockIdx.x / gradients.splits;
  const std::int64_t end = m.patches * (blockIdx.x + std::int64_t(1)) / gradients.splits;
  const int matrix = m.hidden * m.inputs, all = matrix + m.hidden + 1;
  const A *rows = static_cast<const A*>(gradients.rows), *averages = static_cast<const A*>(m.means);
  A* to = static_cast<A*>(gradients.network) + std::int64_t(blockIdx.x) * all;
  for (int output = static_cast<int>(threadIdx.x); output < all; output += sum_threads) {
    const int unit = output / m.inputs, input = output % m.inputs;
    const int field =
        output < matrix ? 1 + unit : (output < all - 1 ? 1 + m.hidden + output - matrix : 0);
    A sum = 0;
    for (std::int64_t patch = begin; patch < end; ++patch) {
      const A own = rows[patch * (1 + 2 * m.hidden) + field];
      sum += output < matrix ? own * averages[patch * m.inputs + input] : own;
    }
    to[output] = sum;
  }
}

// The gradient of score_bias1 [B, hidden], a block each.
template <typename A>
__global__ void __launch_bounds__(sum_threads)
    rcu_bias_kernel(const RcuProblem m, const RcuGradients gradients, A* to) {
  SharedArena arena;
  const auto sums = arena.take<A>(sum_threads / warp_size);
  const std::int64_t sample = blockIdx.x / m.hidden;
  const int unit = static_cast<int>(blockIdx.x % m.hidden), size = 1 + 2 * m.hidden;
  const A* rows = static_cast<const A*>(gradients.rows) + sample * m.patches_each * size + 1 + unit;
  A sum = 0;
  for (std::int64_t patch = threadIdx.x; patch < m.patches_each; patch += sum_threads) {
    sum += rows[patch * size];
  }
  sum = block_sum(sum, sums);
  if (threadIdx.x == 0) to[blockIdx.x] = sum;
}

// to[i] = the sum over slots of from[slot][first + i], the same `copies` times over. A block takes
// 32 of them, each warp every eighth slot.
template <typename A>
__global__ void __launch_bounds__(sum_threads)
    rcu_sum_kernel(const A* from, std::int64_t size, std::int64_t first, std::int64_t count,
                   int slots, int copies, A* to) {
  constexpr int warps = sum_threads / warp_size;
  SharedArena arena;
  const auto sums = arena.take<A>(sum_threads);
  const std::int64_t i = std::int64_t(blockIdx.x) * warp_size + lane_index();
  A sum = 0;
  if (i < count) {
#pragma unroll 4
    for (int slot = warp_index(); slot < slots; slot += warps) sum += from[slot * size + first + i];
  }
  sums.set(static_cast<int>(threadIdx.x), sum);
  sync_block();
  if (warp_index() != 0 || i >= count) return;
  A total = 0;
  for (int warp = 0; warp < warps; ++warp) total += sums.get(warp * warp_size + lane_index());
  for (int copy = 0; copy < copies; ++copy) to[copy * count + i] = total;
}

template <typename T>
struct Backward {
  using A = ComputeType<T>;

  const RcuArguments& arguments;
  const Queue queue;
  RcuProblem m;
  RcuGradients gradients{};

  explicit Backward(const RcuArguments& given)
      : arguments(given), queue("rcu", given.x, given.cuda.stream), m(rcu_problem(given, queue)) {}

  void run() {
    if (!rcu_patch_backward(arguments, queue, m, gradients)) run_passes();
    constexpr int patches_of_split = 32;
    gradients.splits =
        static_cast<int>(least<std::int64_t>(most_splits, blocks_for(m.patches, patches_of_split)));
    gradients.network =
        arguments.cuda.take<A>(gradients.splits * (std::int64_t(m.hidden) * (m.inputs + 1) + 1));
    queue.launch("rcu_network", rcu_network_kernel<A>, gradients.splits, sum_threads, 0, m,
                 gradients);
    sum_all();
    if (m.grad_residual != nullptr) rcu_map_gradient(arguments, queue, m, gradients.means);
  }

  // Patches of any size, in passes over all voxels.
  void run_passes() {
    rcu_prepare(arguments, queue, m, false);
    const CudaResources& cuda = arguments.cuda;
    gradients.slots = m.slots;
    gradients.values = cuda.take<A>(m.slots * std::int64_t(m.lines + 1) * m.channels);
    gradients.queries = cuda.take<A>(m.slots * std::int64_t(m.lines) * (m.channels + 1));
    gradients.reached = cuda.take<A>(m.units);
    gradients.rows = cuda.take<A>(m.patches * (1 + 2 * m.hidden));
    gradients.means = cuda.take<A>(m.patches * m.inputs);
    const auto values =
        m.map_channels > 1 ? rcu_values_kernel<T, true> : rcu_values_kernel<T, false>;
    const auto queries =
        m.map_channels > 1 ? rcu_queries_kernel<T, true> : rcu_queries_kernel<T, false>;
    queue.launch("rcu_values", values, m.slots, m.threads, space_bytes<A>(m), m, gradients);
    queue.launch("rcu_score", rcu_score_kernel<A>, m.patches, small_threads,
                 shared_bytes<A>(m.hidden) + shared_bytes<A>(small_threads / warp_size), m,
                 gradients);
    queue.launch("rcu_queries", queries, m.slots, m.threads, space_bytes<A>(m), m, gradients);
  }

  // `count` values of every slot of `size`, from `first` on.
  void sum(const void* from, std::int64_t size, std::int64_t first, std::int64_t count, int slots,
           const TensorView& to, int copies = 1) {
    queue.launch("rcu_sum", rcu_sum_kernel<A>, blocks_for(count, warp_size), sum_threads,
                 shared_bytes<A>(sum_threads), static_cast<const A*>(from), size, first, count,
                 slots, copies, static_cast<A*>(to.data));
  }

  void sum_all() {
    const RcuWeights& to = arguments.grad_weights;
    const std::int64_t matrix = std::int64_t(m.lines) * m.channels;
    const std::int64_t of_values = matrix + m.channels, of_queries = matrix + m.lines;
    sum(gradients.values, of_values, 0, matrix, gradients.slots, to.value_weight);
    sum(gradients.values, of_values, matrix, m.channels, gradients.slots, to.value_bias, m.maps);
    sum(gradients.queries, of_queries, 0, matrix, gradients.slots, to.query_weight);
    sum(gradients.queries, of_queries, matrix, m.lines, gradients.slots, to.query_bias);
    const std::int64_t first = std::int64_t(m.hidden) * m.inputs, all = first + m.hidden + 1;
    sum(gradients.network, all, 0, first, gradients.splits, to.score_weight1);
    sum(gradients.network, all, first, m.hidden, gradients.splits, to.score_weight2);
    sum(gradients.network, all, all - 1, 1, gradients.splits, to.score_bias2);
    queue.launch("rcu_bias", rcu_bias_kernel<A>, std::int64_t(m.batch) * m.hidden, sum_threads,
                 shared_bytes<A>(sum_threads / warp_size), m, gradients,
                 static_cast<A*>(to.score_bias1.data));
  }
};

}  // namespace

void rcu_backward(const RcuArguments& arguments) {
  for_dtype(arguments.x.dtype,
            [&](auto type) { Backward<typename decltype(type)::type>(arguments).run(); });
}

}  // namespace cuda
}  // namespace grcsf
