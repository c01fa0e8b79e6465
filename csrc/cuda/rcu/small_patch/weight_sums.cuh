// SPDX-License-Identifier: Apache-2.0
// rcu on CUDA, backward of a patch by a block (rcu/small_patch/backward.cu): gradients of the
// weights of queries and values, summed over all patches of a block.
//
// Hazards: sums in shared memory are a thread's own; write_slot() puts them where the warp's own
// tile of x was, and a barrier of the block lies before others read them.
#pragma once

#include "cuda/rcu/small_patch/backward_memory.cuh"

namespace grcsf {
namespace cuda {
namespace {

// What a lane has of them: line g and channels 8 s + 2 t, 8 s + 2 t + 1.
struct WeightSums {
  float values[2 * kept_steps<true>] = {}, queries[2 * kept_steps<false>] = {};

  // Adds the sums over the voxels of a tile of line * data, given the octets of channel 8 s + g.
  template <bool of_values, typename T>
  __device__ __forceinline__ void add(const Room<T>& room, int s, const Line& line,
                                      const Octet<T>& left, const Octet<T>& right) {
    if (s < kept_steps<of_values>) {
      sum_voxels(line, left, right, (of_values ? values : queries) + 2 * s);
      return;
    }
    float found[2] = {0, 0};
    sum_voxels(line, left, right, found);
#pragma unroll
    for (int i = 0; i < 2; ++i) room.weight_sums.add(place<of_values>(2 * s + i), found[i]);
  }

  // Sum i, of step i / 2.
  template <bool of_values, typename T>
  __device__ __forceinline__ float get(const Room<T>& room, int i) const {
    if (i >= 2 * kept_steps<of_values>) return room.weight_sums.get(place<of_values>(i));
    return (of_values ? values : queries)[i];
  }

 private:
  template <bool of_values>
  __device__ __forceinline__ static int place(int i) {
    const int row = i - 2 * kept_steps<of_values> + (of_values ? queries_there : 0);
    return row * most_threads + static_cast<int>(threadIdx.x);
  }
};

// The sums of all warps to the block's slot, in the order of the weights.
template <typename T>
__device__ __forceinline__ void write_slot(const RcuProblem& m, const RcuGradients& gradients,
                                           const Room<T>& room, const WeightSums& sums) {
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int g = lane_index() / row_lanes, t = lane_index() % row_lanes;
  const std::int64_t matrix = std::int64_t(m.lines) * m.channels;
  float* values = static_cast<float*>(gradients.values) + blockIdx.x * (matrix + m.channels);
  float* queries = static_cast<float*>(gradients.queries) + blockIdx.x * (matrix + m.lines);
  static_assert(both_weights <= tile_words<T>, "they lie where x did");
#pragma unroll
  for (int i = 0; i < 2 * steps; ++i) {
    const int at = g * most_channels + i / 2 * 8 + 2 * t + i % 2;
    room.own_x.set(at, as_word(sums.get<true>(room, i)));
    room.own_x.set(both_weights / 2 + at, as_word(sums.get<false>(room, i)));
  }
  sync_block();
  for (int c = thread; c < m.channels; c += threads) values[matrix + c] = room.bias_sums.get(c);
  for (int line = thread; line < m.lines; line += threads) {
    float sum = 0;
    for (int warp = 0; warp < threads / warp_size; ++warp) {
      sum += room.bias_sums.get(most_channels + warp * lines + line);
    }
    queries[matrix + line] = sum;
  }
  for (int i = thread; i < both_weights; i += threads) {
    float sum = 0;
    for (int warp = 0; warp < threads / warp_size; ++warp) {
      sum += as_float(room.x.get(warp * tile_words<T> + i));
    }
    const int line = i % (both_weights / 2) / most_channels, c = i % most_channels;
    if (line >= m.lines || c >= m.channels) continue;
    if (i < both_weights / 2) {
      values[weight_place<true>(m, line, c)] = sum;
    } else {
      queries[weight_place<false>(m, line, c)] = sum;
    }
  }
}

}  // namespace
}  // namespace cuda
}  // namespace grcsf
