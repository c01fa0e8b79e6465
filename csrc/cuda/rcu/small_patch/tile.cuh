// SPDX-License-Identifier: Apache-2.0
// rcu on CUDA: the products of one tile, 64 voxels of a patch, on tensor cores (tensor_core.cuh).
//
// A warp has a tile of x and one of grad_out in shared memory, which no other warp touches. A tile
// is eight octets of adjacent voxels. Lane 4 g + t (tensor_core.cuh)
// - reads octet g of channels 8 s + 2 t and 8 s + 2 t + 1 for sums over channels, which leave
//   line g of octets 2 t and 2 t + 1 in its registers: `Line`;
// - reads octets 2 t and 2 t + 1 of channels 8 s + g for sums over voxels, whose other operands are
//   such lines, and for sums over lines, which leave just these octets.
//
// Hazards: vectors of a channel are permuted so that the eight lanes that read at a time find them
// in different banks, in either order; products are by all lanes of a warp, those without a voxel
// too, whose data and lines are 0.
#pragma once

#include "cuda/rcu/small_patch/block.cuh"
#include "cuda/runtime/tensor_core.cuh"

namespace grcsf {
namespace cuda {
namespace {

constexpr int octet = 8, octets = 8, tile_voxels = octet * octets;
constexpr int steps = most_channels / 8;                // of a sum over channels
constexpr int fragment_values = steps * warp_size * 4;  // of a matrix of weights
constexpr int line_values = 2 * octet, row_lanes = 4;   // lanes that share a line

template <typename T>
constexpr int tile_vectors = tile_voxels / full_pack<T>;  // of a channel
template <typename T>
constexpr int tile_words = most_channels * tile_vectors<T> * vector_words;

// Where a vector of a channel lies in a tile.
template <typename T>
__device__ __forceinline__ int vector_place(int channel, int vector) {
  const int moved =
      sizeof(T) == 2 ? vector ^ (channel & 7)
                     : vector ^ (vector >> 3 << 1) ^ ((channel ^ channel >> 1) & 1) ^ (channel & 4);
  return channel * tile_vectors<T> + moved;
}

// `count` adjacent voxels of a channel, of octet `number` from voxel `first` on.
template <typename T, int first, int count>
struct Voxels {
  static constexpr int N = count < full_pack<T> ? count : full_pack<T>, vectors = count / N;
  static constexpr int words_each = N * static_cast<int>(sizeof(T)) / word_bytes;
  Words<T, N> words[vectors];

  __device__ __forceinline__ Voxels(const Shared<unsigned>& tile, int channel, int number) {
#pragma unroll
    for (int i = 0; i < vectors; ++i) {
      const int voxel = first + i * N,
                vector = number * octet / full_pack<T> + voxel / full_pack<T>;
      const int at = vector_place<T>(channel, vector) * vector_words +
                     voxel % full_pack<T> * static_cast<int>(sizeof(T)) / word_bytes;
      words[i] = Words<T, N>::of(tile.template get_pack<words_each>(at));
    }
  }
  __device__ __forceinline__ float get(int i) const { return words[i / N].get(i % N); }
};
template <typename T>
using Octet = Voxels<T, 0, octet>;

// The numbers of this lane, found again at each use: places that follow from them, kept over all
// patches, would not fit the registers.
struct Lane {
  int own = opaque(lane_index()), g = own / row_lanes, t = own % row_lanes;
};

// Line g of octets 2 t and 2 t + 1: value 2 i + h is voxel i of octet 2 t + h.
struct Line {
  float values[line_values];
  __device__ __forceinline__ float& operator[](int i) { return values[i]; }
  __device__ __forceinline__ const float& operator[](int i) const { return values[i]; }
};

// Sums over channels of weights * data, of `count` voxels of every octet from `first` on. Adds to
// `of_channels` the sums over them, of channels 8 s + 2 t and 8 s + 2 t + 1.
template <typename T, int first, int count>
__device__ __forceinline__ void sum_channels(const Shared<unsigned>& tile,
                                             const Shared<float>& weights, int channels, Line& line,
                                             float* of_channels) {
  const Lane lane;
  Fragment sums[count] = {};
#pragma unroll
  for (int s = 0; s < steps; ++s) {
    if (8 * s >= channels) continue;
    sync_warp();  // so that no step's data is loaded far ahead
    const Fragment weight = weights.template get_pack<4>((s * warp_size + lane.own) * 4);
    const int c = 8 * s + 2 * lane.t;
    const Voxels<T, first, count> low(tile, c, lane.g), high(tile, c + 1, lane.g);
#pragma unroll
    for (int i = 0; i < count; ++i) {
      of_channels[2 * s] += low.get(i);
      of_channels[2 * s + 1] += high.get(i);
      multiply_add_data<T>(sums[i], weight, low.get(i), high.get(i));
    }
  }
#pragma unroll
  for (int i = 0; i < count; ++i) {
    line[2 * (first + i)] = sums[i][0] + sums[i][2];
    line[2 * (first + i) + 1] = sums[i][1] + sums[i][3];
  }
}

// Sums over the octets of the warp of what sum_channels() gives: of one channel for each lane.
__device__ __forceinline__ float sum_octets(float* of_channels, int* channel) {
  const Lane lane;
  halve<octets / 2>(of_channels, warp_size / 2, Add());
  *channel = lane.g / 2 * 8 + 2 * lane.t + lane.g % 2;
  return of_channels[0];
}

// Adds the sums over voxels of line * data, for channels 8 s + 2 t and 8 s + 2 t + 1, given the
// octets of channel 8 s + g. The line is split anew each time: its parts, kept for all steps, would
// not fit the registers.
template <typename T>
__device__ __forceinline__ void sum_voxels(const Line& line, const Octet<T>& left,
                                           const Octet<T>& right, float* sums) {
  Fragment found = {};
#pragma unroll
  for (int i = 0; i < octet; ++i) {
    const Fragment rows = split_rows(opaque(line[2 * i]), opaque(line[2 * i + 1]));
    multiply_add_data<T>(found, rows, left.get(i), right.get(i));
  }
  sums[0] += found[0] + found[2];
  sums[1] += found[1] + found[3];
}

// The lines as right operands: values 2 i and 2 i + 1 become lines t and t + 4 of voxel i of octet
// g. Two exchanges a voxel, each of which gives every lane one of the two.
__device__ __forceinline__ void transpose(Line& line) {
  const Lane lane;
  const bool upper = lane.g >= 4, odd = lane.g % 2 == 1;
  const int low = lane.t * row_lanes + lane.g / 2, high = low + 4 * row_lanes;
#pragma unroll
  for (int i = 0; i < octet; ++i) {
    const float even = line[2 * i], uneven = line[2 * i + 1];
    const float one = shuffle_from(upper ? uneven : even, odd ? high : low);
    const float two = shuffle_from(upper ? even : uneven, odd ? low : high);
    line[2 * i] = odd ? two : one;
    line[2 * i + 1] = odd ? one : two;
  }
}

// Sums over lines of weights * line, of channel 8 s + g and voxel i: those of octets 2 t and
// 2 t + 1 are added to `left` and `right`.
template <typename T>
__device__ __forceinline__ void sum_lines(const Fragment& weight, const Line& turned, int i,
                                          float& left, float& right) {
  Fragment found = {};
  const float first = turned[2 * i], second = turned[2 * i + 1];
  const float high0 = tf32_of(first), high1 = tf32_of(second);
  multiply_add(found, weight, high0, high1);
  if (sizeof(T) == 4) multiply_add(found, weight, first - high0, second - high1);
  left += found[0] + found[2];
  right += found[1] + found[3];
}

}  // namespace
}  // namespace cuda
}  // namespace grcsf
