// SPDX-License-Identifier: Apache-2.0
// rcu on CUDA: products with the weights.
//
// A thread has one voxel, and eight sums in registers at a time; the weights of these are staged in
// shared memory, 64 inputs at a time, and read as broadcasts. Gradients of weights are sums over
// the voxels of a tile: eight lanes share a channel, and each takes every eighth voxel.
//
// Hazards: `stage` is written between two barriers; an element of a slot is written by one thread
// of one block alone.
#pragma once

#include "cuda/rcu/problem.cuh"

namespace grcsf {
namespace cuda {
namespace {

constexpr int stage_values = rcu_inputs_staged * rcu_outputs_at_once;

// The columns of this block: `array` one of up to four, of the voxel of thread `thread`.
template <typename A>
__device__ __forceinline__ A* column_of(const RcuProblem& m, int array, int thread) {
  const std::int64_t of_block = std::int64_t(m.threads) * m.column;
  return static_cast<A*>(m.columns) + (std::int64_t(blockIdx.x) * 4 + array) * of_block +
         std::int64_t(thread) * m.column;
}

enum Columns { queries = 0, reaches = 1, means = 2, slopes = 3 };

// For every output o the sum over inputs i of load(i) * weight(o, i); done(o, sums) gets eight.
// `exists`: whether this thread has a voxel; all take part in the barriers.
template <typename A, typename Load, typename Weight, typename Done>
__device__ __forceinline__ void product(int outputs, int inputs, bool exists,
                                        const Shared<A>& stage, Load load, Weight weight,
                                        Done done) {
  constexpr int N = rcu_outputs_at_once, pack = full_pack<A>;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  for (int first = 0; first < outputs; first += N) {
    A sums[N] = {};
    for (int begin = 0; begin < inputs; begin += rcu_inputs_staged) {
      const int count = least(rcu_inputs_staged, inputs - begin);
      sync_block();
      for (int i = thread; i < count * N; i += threads) {
        const int output = first + i % N;
        stage.set(i, output < outputs ? weight(output, begin + i / N) : A(0));
      }
      sync_block();
      if (!exists) continue;
#pragma unroll 4
      for (int i = 0; i < count; ++i) {
        const A value = load(begin + i);
#pragma unroll
        for (int n = 0; n < N; n += pack) {
          const auto own = stage.template get_pack<pack>(i * N + n);
#pragma unroll
          for (int j = 0; j < pack; ++j) sums[n + j] += value * own[j];
        }
      }
    }
    if (exists) done(first, sums);
  }
}

// The lines of this thread's voxel, from its channels: queries with their bias, or what of a
// gradient reaches the values.
template <bool of_values, typename T, typename A = ComputeType<T>>
__device__ __forceinline__ void project(const RcuProblem& m, const T* data, bool exists,
                                        const Shared<A>& stage, A* column) {
  const A* weights = weights_at<A>(of_values ? m.value_weight : m.query_weight);
  const A* bias = weights_at<A>(m.query_bias);
  product<A>(
      m.lines, m.channels, exists, stage, [&](int c) { return widened(data[c * m.stride_c]); },
      [&](int line, int c) { return weights[weight_place<of_values>(m, line, c)]; },
      [&](int first, const A* sums) {
#pragma unroll
        for (int n = 0; n < rcu_outputs_at_once; ++n) {
          const int line = first + n;
          column[line] = sums[n] + (!of_values && line < m.lines ? bias[line] : A(0));
        }
      });
}

// The channels of this thread's voxel from its lines: body(channel, sum) for each.
template <bool of_values, typename A, typename Body>
__device__ __forceinline__ void spread(const RcuProblem& m, const A* column, bool exists,
                                       const Shared<A>& stage, Body body) {
  const A* weights = weights_at<A>(of_values ? m.value_weight : m.query_weight);
  product<A>(
      m.channels, m.lines, exists, stage, [&](int line) { return column[line]; },
      [&](int c, int line) { return weights[weight_place<of_values>(m, line, c)]; },
      [&](int first, const A* sums) {
#pragma unroll
        for (int n = 0; n < rcu_outputs_at_once; ++n) {
          if (first + n < m.channels) body(first + n, sums[n]);
        }
      });
}

// Adds to a slot, in the order of the weights, `factor` times the sum over the tile's `count`
// voxels of channel * line. of_channel(c, sum) gets the sum of a channel alone, in one lane.
// `places` are those of the tile's voxels in `data`, `column` that of its first voxel.
template <bool of_values, typename T, typename A, typename OfChannel>
__device__ __forceinline__ void add_outer(const RcuProblem& m, const T* data,
                                          const Shared<std::int64_t>& places, int count,
                                          const A* columns, A factor, A* slot,
                                          OfChannel of_channel) {
  constexpr int N = rcu_outputs_at_once, lanes = 8, rows = warp_size / lanes, pack = full_pack<A>;
  const int lane = lane_index() % lanes;
  const int at_once = static_cast<int>(blockDim.x) / warp_size * rows;
  for (int begin = 0; begin < m.channels; begin += at_once) {
    const int c = begin + warp_index() * rows + lane_index() / lanes;
    const bool exists = c < m.channels;
    const T* own = data + (exists ? c : 0) * m.stride_c;
    for (int first = 0; first < m.lines; first += N) {
      A sums[N] = {}, alone = 0;
#pragma unroll 2
      for (int v = lane; v < count; v += lanes) {
        const A value = widened(own[places.get(v)]);
        alone += value;
        const A* line = columns + std::int64_t(v) * m.column + first;
#pragma unroll
        for (int n = 0; n < N; n += pack) {
          const auto four = load_pack<A, pack>(line + n);
#pragma unroll
          for (int j = 0; j < pack; ++j) sums[n + j] += value * four[j];
        }
      }
      A found = 0;
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const A sum = warp_sum(sums[n], lanes);
        if (lane == n) found = sum;
      }
      if (exists && first + lane < m.lines) {
        slot[weight_place<of_values>(m, first + lane, c)] += factor * found;
      }
      if (first > 0) continue;
      alone = warp_sum(alone, lanes);
      if (exists && lane == 0) of_channel(c, alone);
    }
  }
}

}  // namespace
}  // namespace cuda
}  // namespace grcsf
