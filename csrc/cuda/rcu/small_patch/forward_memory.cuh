// SPDX-License-Identifier: Apache-2.0
// rcu on CUDA, a patch a block (rcu/small_patch/forward.cu): what lies in shared memory, what a
// thread keeps in registers, and the queries of its voxel.
//
// Hazards: the exchanges are by all lanes of a warp, those without a voxel too.
#pragma once

#include "cuda/rcu/small_patch/block.cuh"

namespace grcsf {
namespace cuda {
namespace {

constexpr int most_threads = 512, most_warps = most_threads / warp_size;
constexpr int fields = 2;  // of a node: mean and variance

// The block's shared memory.
struct Space {
  Shared<float> query_weight, value_weight;  // [lines / 4][channels][4]
  Shared<float> query_bias, value_bias;      // [lines], [channels], summed over maps
  Shared<unsigned> next_x, next_maps;        // of the next patch, as they lie in memory
  Shared<float> residual;                    // [maps][voxels]
  Shared<float> sums;                        // [warps][channels]
  Shared<float> extremes;                    // [warps][lines]: least, and least of -a
  Shared<float> averages, score;             // [inputs], of the patch
  Shared<RcuPlan<float>> plans;              // [maps]
  Shared<float> tables;                      // [maps][most_nodes][fields]

  __device__ __forceinline__ Space(const RcuProblem& m, int voxels, int nodes, int bytes) {
    const int words = most_channels * bytes / word_bytes;  // of x that a thread keeps
    SharedArena arena;
    query_weight = arena.take<float>(most_channels * lines);
    value_weight = arena.take<float>(most_channels * lines);
    query_bias = arena.take<float>(lines);
    value_bias = arena.take<float>(most_channels);
    // What has a constant size comes first: its place takes no register.
    sums = arena.take<float>(most_warps * most_channels);
    extremes = arena.take<float>(most_warps * ranges);
    score = arena.take<float>(1);
    next_x = arena.take<unsigned>(static_cast<int>(blockDim.x) * words);
    next_maps = arena.take<unsigned>(m.maps * voxels * bytes / word_bytes);
    residual = arena.take<float>(m.maps * voxels);
    averages = arena.take<float>(m.inputs);
    plans = arena.take<RcuPlan<float>>(m.maps);
    tables = arena.take<float>(m.maps * nodes * fields);
  }
};

inline std::size_t space_bytes(const RcuProblem& m, int voxels, int nodes, int bytes, int threads) {
  const int words = most_channels * bytes / word_bytes;
  return shared_bytes<unsigned>(threads * words) +
         shared_bytes<unsigned>(m.maps * voxels * bytes / word_bytes) +
         2 * shared_bytes<float>(most_channels * lines) + shared_bytes<float>(lines) +
         shared_bytes<float>(most_channels) + shared_bytes<float>(m.maps * voxels) +
         shared_bytes<float>(most_warps * most_channels) +
         shared_bytes<float>(most_warps * ranges) + shared_bytes<float>(m.inputs) +
         shared_bytes<float>(1) + shared_bytes<RcuPlan<float>>(m.maps) +
         shared_bytes<float>(m.maps * nodes * fields);
}

// Where the weights of four lines of a channel lie: lanes with neighboring channels read
// neighboring vectors, from different banks.
__device__ __forceinline__ int weight_at(int channel, int line) {
  return (line / 4 * most_channels + channel) * 4;
}

__device__ __forceinline__ void stage_weights(const RcuProblem& m, const Space& space) {
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
#pragma unroll 1
  for (int i = thread; i < most_channels * lines; i += threads) {
    const int c = i / lines, line = i % lines;
    const bool there = c < m.channels && line < m.lines;
    const auto value = [&](auto of_values, const void* weights) {
      return there ? weights_at<float>(weights)[weight_place<of_values.value>(m, line, c)] : 0.0f;
    };
    const int at = weight_at(c, line) + line % 4;
    space.query_weight.set(at, value(std::false_type(), m.query_weight));
    space.value_weight.set(at, value(std::true_type(), m.value_weight));
  }
  stage_biases(m, space.query_bias, space.value_bias);
}

// A thread's part of a patch: channels group, group + groups, ... of a vector of voxels.
template <typename T>
struct Share {
  static constexpr int groups = full_pack<T>, channels = most_channels / groups;
  Words<T> x[channels];
  float a[lines];  // of the voxel that this lane owns: queries, then expectations

  __device__ __forceinline__ int group() const { return lane_index() % groups; }
  __device__ __forceinline__ void renew() {
#pragma unroll
    for (int i = 0; i < channels; ++i) x[i].renew();
  }
};

// Starts the copies of this thread's part of a patch, x and maps, if there is such a patch.
template <typename T>
__device__ __forceinline__ void fetch(const RcuProblem& m, const Space& space, std::int64_t patch) {
  constexpr int N = full_pack<T>;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  if (patch < m.patches) {
    const Box box = box_of(m, patch);
    const int voxel = thread / N * N, group = thread % N, vectors = box.voxels / N;
    if (voxel < box.voxels) {
      const T* x = static_cast<const T*>(m.x) + place_of(m, box, voxel).x;
#pragma unroll 1
      for (int i = 0; i < Share<T>::channels; ++i) {
        const int c = i * N + group;
        if (c >= m.channels) continue;
        copy_async<vector_words>(space.next_x, (i * threads + thread) * vector_words,
                                 reinterpret_cast<const unsigned*>(x + c * m.stride_c));
      }
    }
#pragma unroll 1
    for (int i = thread; i < m.maps * vectors; i += threads) {
      const T* from = static_cast<const T*>(m.residual) + i / vectors * m.volume +
                      place_of(m, box, i % vectors * N).map;
      copy_async<vector_words>(space.next_maps, i * vector_words,
                               reinterpret_cast<const unsigned*>(from));
    }
  }
  commit_copies();
}

// What this thread has fetched: x to registers, the residual voxels to shared memory as floats.
template <typename T>
__device__ __forceinline__ void take_fetched(const RcuProblem& m, const Box& box,
                                             const Space& space, Share<T>& share) {
  constexpr int N = full_pack<T>;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const bool exists = thread / N * N < box.voxels;
  wait_copies<0>();
  const int vectors = box.voxels / N;
#pragma unroll 1
  for (int i = thread; i < m.maps * vectors; i += threads) {
    const auto words = words_at<T>(space.next_maps, i);
#pragma unroll
    for (int j = 0; j < N; j += 4) {
      const Pack<float, 4> wide{
          {words.get(j), words.get(j + 1), words.get(j + 2), words.get(j + 3)}};
      space.residual.template set_pack<4>(i * N + j, wide);
    }
  }
#pragma unroll
  for (int i = 0; i < share.channels; ++i) {
    const bool there = exists && i * N + share.group() < m.channels;
    share.x[i] = there ? words_at<T>(space.next_x, i * threads + thread) : Words<T>{};
  }
}

// Sums over the voxels of the warp: lane l has that of channel l / groups * groups + group.
template <typename T>
__device__ __forceinline__ float channel_sum(const Share<T>& share) {
  float own[share.channels];
#pragma unroll
  for (int i = 0; i < share.channels; ++i) {
    own[i] = 0;
#pragma unroll
    for (int j = 0; j < share.groups; ++j) own[i] += share.x[i].get(j);
  }
  // Over the lanes of this group.
  halve<share.channels / 2>(own, warp_size / 2, Add());
  return own[0];
}

// Queries of `count` voxels of the vector from `first` on: sums over `count` neighboring lanes,
// each of which gets those of one voxel. Two voxels at a time: the sums of more do not fit the
// registers.
template <int count, typename T>
__device__ __forceinline__ void collect_queries(const Space& space, Share<T>& share, int first,
                                                float* found) {
  float other[lines] = {};
  if constexpr (count > 2) {
    collect_queries<count / 2>(space, share, first, found);
    collect_queries<count / 2>(space, share, first + count / 2, other);
  } else {
#pragma unroll
    for (int n = 0; n < lines; ++n) found[n] = 0;
#pragma unroll
    for (int i = 0; i < share.channels; ++i) {
      if (i % 4 == 0) sync_warp();  // so that no weights are loaded far ahead, or kept
      const float low = share.x[i].get(first), high = share.x[i].get(first + 1);
#pragma unroll
      for (int n = 0; n < lines; n += 4) {
        const auto weight =
            space.query_weight.template get_pack<4>(weight_at(i * share.groups + share.group(), n));
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          found[n + k] += low * weight[k];
          other[n + k] += high * weight[k];
        }
      }
    }
  }
  const bool upper = (lane_index() & count / 2) != 0;
#pragma unroll
  for (int n = 0; n < lines; ++n) {
    const float own = upper ? other[n] : found[n], given = upper ? found[n] : other[n];
    found[n] = own + shuffle_xor(given, count / 2);
  }
}

// Queries of the voxel that this lane owns: number `group` of its vector.
template <typename T>
__device__ __forceinline__ void find_queries(const Space& space, Share<T>& share) {
  collect_queries<share.groups>(space, share, 0, share.a);
#pragma unroll
  for (int n = 0; n < lines; ++n) share.a[n] += space.query_bias.get(n);
}

}  // namespace
}  // namespace cuda
}  // namespace grcsf
