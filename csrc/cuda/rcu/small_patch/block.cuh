// SPDX-License-Identifier: Apache-2.0
// rcu on CUDA, a patch a block: which calls go that way, exchanges in a warp, and the tables of a
// patch in shared memory. Forward (rcu/small_patch/forward.cu) and backward
// (rcu/small_patch/backward.cu) share it.
#pragma once

#include "cuda/rcu/table.cuh"

namespace grcsf {
namespace cuda {
namespace {

constexpr int most_channels = 32, most_voxels = 512;
constexpr int lines = rcu_outputs_at_once;  // at most
constexpr int ranges = 2 * lines;
constexpr int word_bytes = 4, vector_words = 4;

template <typename T>
constexpr int most_nodes = sizeof(T) == 2 ? 64 : 128;

inline bool begins_vector(const void* data) {
  return reinterpret_cast<std::uintptr_t>(data) % (word_bytes * vector_words) == 0;
}

// Whether a patch is a block's: one map channel, few channels and queries, vectors in its rows.
template <typename T>
bool fits_patch(const RcuProblem& m) {
  constexpr int N = full_pack<T>;
  return m.map_channels == 1 && m.channels <= most_channels && m.lines <= lines &&
         m.stride_w == 1 && m.patch_w % N == 0 && m.width % N == 0 &&
         std::int64_t(m.patch_d) * m.patch_h * m.patch_w <= most_voxels && begins_vector(m.x) &&
         begins_vector(m.residual);
}

// ---- Exchanges ---------------------------------------------------------------------------------

// Joins 2 * kept values a lane with those of the lane at `distance`, and goes on with the half that
// this lane keeps: at the end one value a lane is left.
template <int kept, typename Join>
__device__ __forceinline__ void halve(float* values, int distance, Join join) {
  if constexpr (kept > 0) {
    const bool upper = (lane_index() & distance) != 0;
#pragma unroll
    for (int i = 0; i < kept; ++i) {
      const float given = upper ? values[i] : values[i + kept];
      const float own = upper ? values[i + kept] : values[i];
      values[i] = join(own, shuffle_xor(given, distance));
    }
    halve<kept / 2>(values, distance / 2, join);
  }
}

// 16 values a lane over the warp: lanes 2 i and 2 i + 1 end with that of value i.
template <typename Join>
__device__ __forceinline__ float warp_scatter(float* values, Join join) {
  halve<8>(values, warp_size / 2, join);
  return join(values[0], shuffle_xor(values[0], 1));
}

struct Add {
  __device__ __forceinline__ float operator()(float a, float b) const { return a + b; }
};
struct Least {
  __device__ __forceinline__ float operator()(float a, float b) const { return least(a, b); }
};

// ---- Shared memory -----------------------------------------------------------------------------

// Vector number `vector` of data that was copied as it is.
template <typename T>
__device__ __forceinline__ Words<T> words_at(const Shared<unsigned>& from, int vector) {
  return Words<T>::of(from.template get_pack<vector_words>(vector * vector_words));
}

// Biases: of queries [lines], and of values [channels], summed over maps.
__device__ __forceinline__ void stage_biases(const RcuProblem& m, const Shared<float>& query_bias,
                                             const Shared<float>& value_bias) {
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  for (int line = thread; line < lines; line += threads) {
    query_bias.set(line, line < m.lines ? weights_at<float>(m.query_bias)[line] : 0.0f);
  }
  for (int c = thread; c < most_channels; c += threads) {
    float sum = 0;
    for (int map = 0; c < m.channels && map < m.maps; ++map) {
      sum += weights_at<float>(m.value_bias)[map * m.channels + c];
    }
    value_bias.set(c, sum);
  }
}

// Of the voxels of a map that a lane has seen: least r, least -r, and their sum.
struct Seen {
  float low = __builtin_huge_valf(), high = __builtin_huge_valf(), sum = 0;
};

// The plan of a map and its mean, by one warp; `extremes` [warps][ranges] are of the queries.
template <typename T>
__device__ __forceinline__ void set_plan(const RcuProblem& m, int map, int voxels, const Seen& seen,
                                         const Shared<float>& extremes,
                                         const Shared<float>& averages,
                                         const Shared<RcuPlan<float>>& plans) {
  const int lane = lane_index(), warps = static_cast<int>(blockDim.x) / warp_size;
  float low = __builtin_huge_valf(), high = __builtin_huge_valf();
  for (int i = lane; i < warps * m.heads; i += warp_size) {
    const int at = i / m.heads * ranges + map * m.heads + i % m.heads;
    low = least(low, extremes.get(at));
    high = least(high, extremes.get(at + lines));
  }
  const float mean = warp_sum(seen.sum) / static_cast<float>(voxels);
  const auto plan = plan_of<T, float>(warp_least(low), -warp_least(high), warp_least(seen.low),
                                      -warp_least(seen.high), mean, most_nodes<T>);
  if (lane != 0) return;
  averages.set(m.channels + map, mean);
  plans.set(map, plan);
}

// Means of channels, by one warp; `sums` [warps][channels] are over the voxels of each warp.
__device__ __forceinline__ void average_channels(const RcuProblem& m, int voxels,
                                                 const Shared<float>& sums,
                                                 const Shared<float>& averages) {
  const int c = lane_index(), warps = static_cast<int>(blockDim.x) / warp_size;
  float sum = 0;
  for (int warp = 0; warp < warps; ++warp) sum += sums.get(warp * most_channels + c);
  if (c < m.channels) averages.set(c, sum / static_cast<float>(voxels));
}

// The tables [maps][most_nodes][fields] of a patch; warps take groups of four nodes in turn.
// visit(map, moments) adds the voxels of this lane.
template <typename T, int fields, typename Visit>
__device__ __forceinline__ void make_tables(int maps, const Shared<RcuPlan<float>>& plans,
                                            const Shared<float>& tables, Visit visit) {
  const int lane = lane_index(), warps = static_cast<int>(blockDim.x) / warp_size;
  int item = warp_index();  // of all groups of nodes that are still to come
  for (int map = 0; map < maps; ++map) {
    const RcuPlan<float> plan = plans.get(map);
    const int count = plan.nodes / nodes_at_once;
    for (; item < count; item += warps) {
      Moments<float> moments(plan, item * nodes_at_once);
      visit(map, moments);
      float values[nodes_at_once * rcu_table_fields];
#pragma unroll
      for (int i = 0; i < nodes_at_once * rcu_table_fields; ++i) {
        values[i] = moments.sums[i / rcu_table_fields][i % rcu_table_fields];
      }
      // Two lanes a value, eight a node.
      const float own = warp_scatter(values, Add());
      const int first = lane / 8 * 8;
      Pack<float, rcu_table_fields> sums = {};
#pragma unroll
      for (int i = 0; i <= fields && i < rcu_table_fields; ++i) {
        sums[i] = shuffle_from(own, first + 2 * i);
      }
      if (lane % 8 != 0) continue;
      const auto found = cumulants(sums, plan.center);
      Pack<float, fields> kept;
#pragma unroll
      for (int i = 0; i < fields; ++i) kept[i] = found[i];
      const int node = map * most_nodes<T> + item * nodes_at_once + lane / 8;
      tables.template set_pack<fields>(node * fields, kept);
    }
    item -= count;
  }
}

}  // namespace
}  // namespace cuda
}  // namespace grcsf
