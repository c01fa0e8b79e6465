// SPDX-License-Identifier: Apache-2.0
// rcu on CUDA, backward of a patch by a block (rcu/small_patch/backward.cu): what lies in shared
// memory, what is fetched, and what the block finds out about a patch before it has tables.
//
// Hazards: a tile is a warp's own; a warp starts to fetch only after a barrier of the warp behind
// its last reads.
#pragma once

#include "cuda/rcu/small_patch/tile.cuh"

namespace grcsf {
namespace cuda {
namespace {

constexpr int most_warps = most_voxels / tile_voxels, most_threads = most_warps * warp_size;
constexpr int fields = rcu_table_fields;
constexpr int map_parts = 3;  // of a warp: least, least of -r, sum
constexpr int most_maps = lines, most_inputs = most_channels + most_maps;
constexpr int absent = -1;
constexpr int bias_values = most_channels + most_warps * lines;
constexpr int both_weights = 2 * lines * most_channels;  // of values and queries

// Blocks whose registers a multiprocessor must have.
template <typename T>
constexpr int most_blocks = sizeof(T) == 2 ? 2 : 1;

// Where vectors of a patch lie: from its first voxel, in x; and its place on the axes.
struct VectorPlace {
  int offset, d, h, w;
};

// Steps of whose channels a lane keeps the sums for gradients of weights in registers. The others
// lie in shared memory: with all in registers, two blocks would not fit a multiprocessor.
template <bool of_values>
constexpr int kept_steps = of_values ? 3 : 2;
constexpr int queries_there = 2 * (steps - kept_steps<false>);  // of a thread
constexpr int sums_there = queries_there + 2 * (steps - kept_steps<true>);

// The block's shared memory. First what has a size that the compiler knows, where it may be a
// little more than is used: places that it does not know wait in registers.
template <typename T>
struct Room {
  Shared<unsigned> x, grad, residual;     // [warps][tile] each, [maps][voxels of the patch]
  Shared<float> query, value, spread;     // weights as operands
  Shared<float> query_bias, value_bias;   // [lines], [channels] summed over maps
  Shared<VectorPlace> places;             // [vectors of all tiles]
  Shared<Box> boxes;                      // [2]: of this patch and of the next, in turn
  Shared<float> bias_sums;                // [channels] and [warps][lines], over all patches
  Shared<float> extremes, of_x, of_grad;  // [warps][ranges], [warps][channels] twice
  Shared<float> of_maps, reached;         // [warps][maps][map_parts], [warps]
  Shared<float> passing;                  // [warps]: not 0 where a hidden unit passes
  Shared<float> scores;              // of the patch, its gradient, and one over the patch's voxels
  Shared<float> averages, pull;      // [inputs]: of the patch; what a logit pulls at them
  Shared<float> active, gate;        // [hidden]: before the maximum; weight2 where it passes
  Shared<RcuPlan<float>> plans;      // [maps]
  Shared<float> tables;              // [maps][most_nodes][fields]
  Shared<float> weight_sums;         // [sums_there][most_threads]
  Shared<unsigned> own_x, own_grad;  // of this warp

  __device__ __forceinline__ Room(const RcuProblem& m, int voxels) {
    const int warps = static_cast<int>(blockDim.x) / warp_size;
    SharedArena arena;
    query = arena.take<float>(fragment_values);
    value = arena.take<float>(fragment_values);
    spread = arena.take<float>(fragment_values);
    query_bias = arena.take<float>(lines);
    value_bias = arena.take<float>(most_channels);
    weight_sums = arena.take<float>(sums_there * most_threads);
    extremes = arena.take<float>(most_warps * ranges);
    of_x = arena.take<float>(most_warps * most_channels);
    of_grad = arena.take<float>(most_warps * most_channels);
    reached = arena.take<float>(most_warps);
    passing = arena.take<float>(most_warps);
    scores = arena.take<float>(3);
    boxes = arena.take<Box>(2);
    bias_sums = arena.take<float>(bias_values);
    of_maps = arena.take<float>(most_warps * most_maps * map_parts);
    averages = arena.take<float>(most_inputs);
    pull = arena.take<float>(most_inputs);
    plans = arena.take<RcuPlan<float>>(most_maps);
    places = arena.take<VectorPlace>(warps * tile_vectors<T>);
    x = arena.take<unsigned>(warps * tile_words<T>);
    grad = arena.take<unsigned>(warps * tile_words<T>);
    residual = arena.take<unsigned>(m.maps * voxels * static_cast<int>(sizeof(T)) / word_bytes);
    active = arena.take<float>(m.hidden);
    gate = arena.take<float>(m.hidden);
    tables = arena.take<float>(m.maps * most_nodes<T> * fields);
    own_x = x.from(warp_index() * tile_words<T>);
    own_grad = grad.from(warp_index() * tile_words<T>);
  }
};

template <typename T>
std::size_t room_bytes(const RcuProblem& m, int voxels, int warps) {
  return 3 * shared_bytes<float>(fragment_values) + shared_bytes<float>(lines) +
         shared_bytes<float>(most_channels) + shared_bytes<float>(most_warps * ranges) +
         2 * shared_bytes<float>(most_warps * most_channels) + 2 * shared_bytes<float>(most_warps) +
         shared_bytes<Box>(2) + shared_bytes<float>(3) + shared_bytes<float>(bias_values) +
         shared_bytes<VectorPlace>(warps * tile_vectors<T>) +
         2 * shared_bytes<unsigned>(warps * tile_words<T>) +
         shared_bytes<unsigned>(m.maps * voxels * static_cast<int>(sizeof(T)) / word_bytes) +
         shared_bytes<float>(most_warps * most_maps * map_parts) +
         2 * shared_bytes<float>(most_inputs) + shared_bytes<RcuPlan<float>>(most_maps) +
         2 * shared_bytes<float>(m.hidden) + shared_bytes<float>(m.maps * most_nodes<T> * fields) +
         shared_bytes<float>(sums_there * most_threads);
}

// What does not change from patch to patch.
template <typename T>
__device__ __forceinline__ void stage_constants(const RcuProblem& m, const Room<T>& room) {
  constexpr int N = full_pack<T>;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const auto weight = [&](auto of_values, const void* weights, int line, int c) {
    return line < m.lines && c < m.channels
               ? weights_at<float>(weights)[weight_place<of_values.value>(m, line, c)]
               : 0.0f;
  };
  const std::false_type of_queries;
  const std::true_type of_values;
#pragma unroll 1
  for (int i = thread; i < steps * warp_size; i += threads) {
    const int s = i / warp_size, g = i % warp_size / row_lanes, t = i % row_lanes;
    const int c = 8 * s + 2 * t, row = 8 * s + g;
    room.query.template set_pack<4>(4 * i,
                                    split_rows(weight(of_queries, m.query_weight, g, c),
                                               weight(of_queries, m.query_weight, g, c + 1)));
    room.value.template set_pack<4>(4 * i, split_rows(weight(of_values, m.value_weight, g, c),
                                                      weight(of_values, m.value_weight, g, c + 1)));
    room.spread.template set_pack<4>(
        4 * i, split_rows(weight(of_queries, m.query_weight, t, row),
                          weight(of_queries, m.query_weight, t + row_lanes, row)));
  }
#pragma unroll
  for (int i = 0; i < sums_there; ++i) room.weight_sums.set(i * most_threads + thread, 0);
  for (int i = thread; i < bias_values; i += threads) room.bias_sums.set(i, 0);
  if (thread == 0) room.boxes.set(0, box_of(m, static_cast<int>(blockIdx.x)));
  stage_biases(m, room.query_bias, room.value_bias);
  const int vectors = m.patch_d * m.patch_h * m.patch_w / N;
  for (int i = thread; i < threads / warp_size * tile_vectors<T>; i += threads) {
    const int row = i * N / m.patch_w, w = i * N % m.patch_w;
    const int d = row / m.patch_h, h = row % m.patch_h;
    const int offset = static_cast<int>(d * m.stride_d + h * m.stride_h) + w;
    room.places.set(i, i < vectors ? VectorPlace{offset, d, h, w} : VectorPlace{0, absent, 0, 0});
  }
}

__device__ __forceinline__ bool is_in(const Box& box, const VectorPlace& place) {
  return place.d != absent && place.d < box.depth && place.h < box.height && place.w < box.width;
}

// Starts the copies of a warp's tile of a patch, if there is such a patch. Voxels and channels that
// do not exist are 0.
template <typename T>
__device__ __forceinline__ void fetch_tile(const RcuProblem& m, const Room<T>& room,
                                           const Shared<unsigned>& tile, const void* data,
                                           bool there, int turn) {
  constexpr int vectors = tile_vectors<T>, channels_at_once = warp_size / vectors;
  const Lane lane;
  const int vector = lane.own % vectors;
  if (there) {
    const Box box = room.boxes.get(turn);
    const VectorPlace place = room.places.get(warp_index() * vectors + vector);
    const bool exists = is_in(box, place);
    int c = lane.own / vectors;
    const T* from = static_cast<const T*>(data) + (box.x + place.offset + c * m.stride_c);
#pragma unroll 4
    for (; c < most_channels; c += channels_at_once, from += channels_at_once * m.stride_c) {
      const int at = vector_place<T>(c, vector) * vector_words;
      if (exists && c < m.channels) {
        copy_async<vector_words>(tile, at, reinterpret_cast<const unsigned*>(from));
      } else {
        tile.template set_pack<vector_words>(at, Pack<unsigned, vector_words>{});
      }
    }
  }
  commit_copies();
}

// The same for the maps of the patch, dense; a warp takes 64 voxels of every map.
template <typename T>
__device__ __forceinline__ void fetch_maps(const RcuProblem& m, const Room<T>& room, bool there,
                                           int turn) {
  constexpr int N = full_pack<T>, vectors = tile_vectors<T>;
  if (there) {
    const Box box = room.boxes.get(turn);
#pragma unroll 1
    for (int i = lane_index(); i < m.maps * vectors; i += warp_size) {
      const int map = i / vectors, vector = warp_index() * vectors + i % vectors;
      if (vector * N >= box.voxels) continue;
      const T* from =
          static_cast<const T*>(m.residual) + map * m.volume + place_of(m, box, vector * N).map;
      copy_async<vector_words>(room.residual, (map * box.voxels / N + vector) * vector_words,
                               reinterpret_cast<const unsigned*>(from));
    }
  }
  commit_copies();
}

// Range and sum of the voxels of every map that this lane has fetched, joined over the warp.
template <typename T>
__device__ __forceinline__ void survey_maps(const RcuProblem& m, const Room<T>& room, int turn) {
  const Box box = room.boxes.get(turn);
  constexpr int N = full_pack<T>, vectors = tile_vectors<T>;
  constexpr float none = __builtin_huge_valf();
  for (int begin = 0; begin < m.maps * vectors; begin += warp_size) {
    const int i = begin + lane_index(), map = i / vectors;
    const int vector = warp_index() * vectors + i % vectors;
    float low = none, high = none, sum = 0;
    if (map < m.maps && vector * N < box.voxels) {
      const auto words = words_at<T>(room.residual, map * box.voxels / N + vector);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const float r = words.get(j);
        low = least(low, r);
        high = least(high, -r);
        sum += r;
      }
    }
    low = warp_least(low, vectors);
    high = warp_least(high, vectors);
    sum = warp_sum(sum, vectors);
    if (map >= m.maps || i % vectors != 0) continue;
    const int at = (warp_index() * m.maps + map) * map_parts;
    room.of_maps.set(at, low);
    room.of_maps.set(at + 1, high);
    room.of_maps.set(at + 2, sum);
  }
}

// Which of a lane's 16 voxels exist.
template <typename T>
struct Existing {
  static constexpr int N = full_pack<T>, per_octet = octet / N;
  unsigned bits = 0;
  bool whole;

  __device__ __forceinline__ Existing(const Room<T>& room, const Box& box, int voxels)
      : whole(box.voxels == voxels && voxels % tile_voxels == 0) {
    const int first = warp_index() * tile_vectors<T> + lane_index() % row_lanes * 2 * per_octet;
#pragma unroll
    for (int i = 0; i < 2 * per_octet; ++i) {
      bits |= unsigned(is_in(box, room.places.get(first + i))) << i;
    }
  }
  // Voxel i of octet 2 t + h.
  __device__ __forceinline__ bool has(int i, int h) const {
    return (bits >> (h * per_octet + i / N) & 1) != 0;
  }
};

// Queries, their ranges and the sums of channels.
template <typename T>
__device__ __forceinline__ Line find_queries(const RcuProblem& m, const Room<T>& room, int voxels,
                                             int turn) {
  float of_channels[2 * steps] = {};
  int channel;
  Line a;
  sum_channels<T, 0, octet>(room.own_x, room.query, m.channels, a, of_channels);
  const float of_x = sum_octets(of_channels, &channel);
  room.of_x.set(warp_index() * most_channels + channel, of_x);
  const float bias = room.query_bias.get(lane_index() / row_lanes);
#pragma unroll
  for (int i = 0; i < line_values; ++i) a[i] += bias;
  const Existing<T> existing(room, room.boxes.get(turn), voxels);
  constexpr float none = __builtin_huge_valf();
  float low = none, high = none;
#pragma unroll
  for (int i = 0; i < line_values; ++i) {
    if (!existing.whole && !existing.has(i / 2, i % 2)) continue;
    low = least(low, a[i]);
    high = least(high, -a[i]);
  }
  low = warp_least(low, row_lanes);
  high = warp_least(high, row_lanes);
  if (lane_index() % row_lanes == 0) {
    const int at = warp_index() * ranges + lane_index() / row_lanes;
    room.extremes.set(at, low);
    room.extremes.set(at + lines, high);
  }
  return a;
}

// The plan of a map by one warp, and its mean.
template <typename T>
__device__ __forceinline__ void plan_map(const RcuProblem& m, const Room<T>& room, int map,
                                         int turn) {
  const int lane = lane_index(), warps = static_cast<int>(blockDim.x) / warp_size;
  Seen seen;
  if (lane < warps) {
    const int at = (lane * m.maps + map) * map_parts;
    seen = {room.of_maps.get(at), room.of_maps.get(at + 1), room.of_maps.get(at + 2)};
  }
  set_plan<T>(m, map, room.boxes.get(turn).voxels, seen, room.extremes, room.averages, room.plans);
}

}  // namespace
}  // namespace cuda
}  // namespace grcsf
