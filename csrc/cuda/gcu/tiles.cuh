// SPDX-License-Identifier: Apache-2.0
// What the kernels of gcu over voxels share: tiles, and sums over channels.
//
// A warp takes a tile: 32 / G neighboring packs of voxels by G groups of channels, G a power of
// two. A lane holds S packs of P values of skip in registers, loads all of them before it uses the
// first, and takes the sums over its channels; shuffles add them up over the groups. No shared
// memory and no barrier. Lanes that have the same voxels are neighbors.
//
// Three paths, by what a pack is:
// - doubled: up to 16 bytes of neighboring voxels of one channel, in rows of twice the size of the
//   deep row. The deep columns around them are one vector and a value on either side, which are
//   loaded and blended over z and y once.
// - taps: likewise up to 8 bytes, or one value (any layout and alignment), with two deep columns a
//   voxel.
// - channels_last: 16 bytes of neighboring channels of one voxel, with eight deep voxels as
//   vectors.
// More channels than the groups hold are taken in chunks; data is then read again in the second
// pass over them, and found in cache.
#pragma once

#include "common/arguments/gcu.h"
#include "cuda/gcu/axis.cuh"

namespace grcsf {
namespace cuda {
namespace {

constexpr int tile_threads = 128;

enum class Path { doubled, taps, channels_last };

// ---- The work of a launch ----------------------------------------------------------------------

struct Volumes {
  const void *skip, *deep, *skip_gate, *deep_gate, *grad, *grad_dissimilarity;
  void *compensated, *dissimilarity, *grad_skip, *grad_deep;  // gradients: null if not asked for
  Axis z, y, x;
  std::int64_t batch, voxels, deep_voxels;
  std::int64_t channel_stride, deep_channel_stride, voxel_stride;
  int channels;
  bool similarity;
  double eps;

  // Tiles: packs of planes [plane_begin, plane_end).
  int plane_begin, plane_end;
  int group_bits, span;              // log2 of G; channels of a chunk
  std::int64_t step, deep_step;      // from one of a lane's packs to the next
  Divider row_packs, rows, samples;  // samples: by warps
  std::int64_t packs, tiles, warps;  // of a sample

  // Backward.
  void *cross, *radial;  // alpha and beta, [B, ring, H, W]: plane z at z % ring
  int ring;
  void* sums;  // for the gate of skip, [B, C, warps]
  bool adds;   // to the sums of the slabs before
};

// How a lane's packs lie. S of them; the values of a pack are `voxels` voxels by `channels`
// channels, one of which is 1.
template <typename T, Path path, int size>
struct Tiling {
  static constexpr int pack = size;
  static constexpr bool across = path == Path::channels_last;
  static constexpr int voxels = across ? 1 : size;
  static constexpr int channels = across ? size : 1;
  // Of offsets in a plane of one channel, or of all where those are neighbors.
  using Step = std::conditional_t<path == Path::doubled || (voxels > 1), int, std::int64_t>;
};

// Which of the tile a lane takes.
struct Lane {
  int group, column;
};

__device__ __forceinline__ Lane lane_of(int group_bits) {
  return {lane_index() & ((1 << group_bits) - 1), lane_index() >> group_bits};
}

// The first channel of pack s of this lane. Where channels are neighbors, so are the packs of
// neighboring groups; else a lane's packs are, so that their addresses differ by constants.
template <typename Tiling, int packs>
__device__ __forceinline__ int channel_of(int group_bits, const Lane& lane, int c0, int s) {
  if (!Tiling::across) return c0 + lane.group * packs + s;
  return c0 + ((s << group_bits) + lane.group) * Tiling::channels;
}

// The voxels of a lane's packs, and the deep rows around them.
template <typename Tiling, typename A>
struct Place {
  bool exists;
  int z, y, x;
  std::int64_t voxel;     // in the sample
  std::int64_t deep_row;  // offset of the first of four deep rows
  typename Tiling::Step step_z, step_y;
  A fraction_z, fraction_y;
};

template <typename Tiling, typename A>
__device__ __forceinline__ Place<Tiling, A> place_of(const Volumes& m, const Lane& lane,
                                                     std::int64_t tile) {
  Place<Tiling, A> place;
  std::int64_t pack = (tile << (5 - m.group_bits)) + lane.column;
  place.exists = pack < m.packs;
  pack = least(pack, m.packs - 1);
  const std::int64_t row = m.row_packs.quotient(pack);
  place.x = static_cast<int>(pack - row * m.row_packs.divisor) * Tiling::voxels;
  const auto plane = static_cast<int>(m.rows.quotient(row));
  place.y = static_cast<int>(row - plane * m.rows.divisor);
  place.z = m.plane_begin + plane;
  place.voxel = (std::int64_t(place.z) * m.y.size + place.y) * m.x.size + place.x;

  const auto z = position_of<A>(m.z, place.z);
  const auto y = position_of<A>(m.y, place.y);
  using Step = typename Tiling::Step;
  const auto row_stride = static_cast<Step>(m.x.deep * m.voxel_stride);
  place.deep_row = (std::int64_t(z.low) * m.y.deep + y.low) * row_stride;
  place.step_y = y.step * row_stride;
  place.step_z = z.step * row_stride * m.y.deep;
  place.fraction_z = z.fraction;
  place.fraction_y = y.fraction;
  return place;
}

// Sums of voxels over the groups: each lane finishes as many of its pack's voxels as it can, for
// the others have the rest, and the results go to all of them.
template <int voxels>
struct Scatter {
  int lanes;  // groups

  // This lane finishes `count` voxels from `first` on. Where there are more lanes than voxels
  // others finish the same ones; `writes` says whether this one is to write them.
  __device__ __forceinline__ int count() const { return greatest(voxels / lanes, 1); }
  __device__ __forceinline__ bool writes() const { return (lane_index() & (lanes - 1)) < voxels; }
  __device__ __forceinline__ int first() const {
    int result = 0;
#pragma unroll
    for (int half = voxels / 2; half > 0; half /= 2) {
      const int distance = voxels / 2 / half;
      if (distance < lanes && (lane_index() & distance) != 0) result += half;
    }
    return result;
  }

  // Leaves the sums of this lane's voxels in front.
  template <typename A>
  __device__ __forceinline__ void sum(A (&values)[voxels]) const {
#pragma unroll
    for (int half = voxels / 2; half > 0; half /= 2) {
      const int distance = voxels / 2 / half;
      if (distance >= lanes) continue;
      const bool upper = (lane_index() & distance) != 0;
#pragma unroll
      for (int i = 0; i < half; ++i) {
        const A kept = upper ? values[i + half] : values[i];
        const A given = upper ? values[i] : values[i + half];
        values[i] = kept + shuffle_xor(given, distance);
      }
    }
    for (int distance = voxels; distance < lanes; distance *= 2) {
      values[0] += shuffle_xor(values[0], distance);
    }
  }

  // Gives what each lane has in front to all.
  template <typename A>
  __device__ __forceinline__ void share(A (&values)[voxels]) const {
#pragma unroll
    for (int half = 1; half < voxels; half *= 2) {
      const int distance = voxels / 2 / half;
      if (distance >= lanes) continue;
      const bool upper = (lane_index() & distance) != 0;
#pragma unroll
      for (int i = 0; i < half; ++i) {
        const A own = values[i], other = shuffle_xor(own, distance);
        values[i] = upper ? other : own;
        values[i + half] = upper ? own : other;
      }
    }
  }
};

// ---- The host's side ---------------------------------------------------------------------------

// Sizes, strides and inputs of a call.
inline Volumes volumes_of(const GcuArguments& arguments) {
  Volumes m{};
  const TensorView &skip = arguments.skip, &deep = arguments.deep;
  m.skip = skip.data;
  m.deep = deep.data;
  m.skip_gate = arguments.skip_gate.data;
  m.deep_gate = arguments.deep_gate.data;
  m.batch = skip.shape[0];
  m.channels = static_cast<int>(skip.shape[1]);
  m.z = axis_of(skip.shape[2], deep.shape[2]);
  m.y = axis_of(skip.shape[3], deep.shape[3]);
  m.x = axis_of(skip.shape[4], deep.shape[4]);
  m.voxels = skip.shape[2] * skip.shape[3] * skip.shape[4];
  m.deep_voxels = deep.shape[2] * deep.shape[3] * deep.shape[4];
  // A tensor of one voxel has both layouts.
  const TensorView& telling = m.voxels > 1 ? skip : deep;
  const bool last = m.channels > 1 && telling.strides[1] == 1;
  m.channel_stride = last ? 1 : m.voxels;
  m.deep_channel_stride = last ? 1 : m.deep_voxels;
  m.voxel_stride = last ? m.channels : 1;
  m.similarity = arguments.similarity;
  m.eps = arguments.eps;
  m.plane_end = m.z.size;
  return m;
}

inline bool is_channels_last(const Volumes& m) { return m.voxel_stride != 1; }

// Whether vectors of 16 bytes fit where tensors begin.
inline bool is_aligned(const Volumes& m) {
  for (const void* data :
       {m.skip, m.deep, m.grad, m.grad_dissimilarity, (const void*)m.compensated,
        (const void*)m.dissimilarity, (const void*)m.grad_skip, (const void*)m.grad_deep}) {
    if (reinterpret_cast<std::uintptr_t>(data) % 16 != 0) return false;
  }
  return true;
}

template <Path path_, int size_>
struct Choice {
  static constexpr Path path = path_;
  static constexpr int size = size_;
};

// Calls body(Choice) with the fastest tiling for these tensors, and with these sizes of packs.
template <typename T, int doubled_size, int taps_size, typename Body>
void for_tiling(const Volumes& m, Body body) {
  constexpr int whole = full_pack<T>;
  const bool aligned = is_aligned(m);
  if (is_channels_last(m)) {
    if (aligned && m.channels % whole == 0) return body(Choice<Path::channels_last, whole>());
  } else if (aligned) {
    const bool doubled = m.x.size == 2 * m.x.deep;
    if (doubled && m.x.size % whole == 0) {
      return body(Choice<Path::doubled, doubled_size>());
    }
    if (m.x.size % taps_size == 0) return body(Choice<Path::taps, taps_size>());
  }
  return body(Choice<Path::taps, 1>());
}

// Cuts a sample's packs into tiles for lanes with `packs` packs each. As many groups as channels
// need, while a warp reads at least 16 neighboring bytes of a channel.
template <typename T, typename Tiling>
void set_groups(Volumes& m, int packs) {
  const int most = Tiling::across ? warp_size : 2 * Tiling::voxels * static_cast<int>(sizeof(T));
  int groups = 1;
  m.group_bits = 0;
  while (groups * packs * Tiling::channels < m.channels && groups < most) {
    groups *= 2;
    ++m.group_bits;
  }
  m.span = groups * packs * Tiling::channels;
  m.step = Tiling::across ? groups * Tiling::channels : m.channel_stride;
  m.deep_step = Tiling::across ? groups * Tiling::channels : m.deep_channel_stride;
}

template <typename Tiling>
void set_planes(Volumes& m, int begin, int end) {
  m.plane_begin = begin;
  m.plane_end = end;
  const std::int64_t row_packs = m.x.size / Tiling::voxels;
  m.packs = std::int64_t(end - begin) * m.y.size * row_packs;
  m.row_packs = divider_of(row_packs, m.packs);
  m.rows = divider_of(m.y.size, m.packs);
  m.tiles = blocks_for(m.packs, warp_size >> m.group_bits);
}

}  // namespace
}  // namespace cuda
}  // namespace grcsf
