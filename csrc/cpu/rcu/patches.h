// SPDX-License-Identifier: Apache-2.0
// rcu on the CPU: the patches of a volume, and their way into and out of packed buffers.
//
// A packed buffer holds one channel a row and the voxels of a patch in row-major order, in the type
// that is computed with. Packing is where data types and layouts end: everything behind it knows
// neither. It is needed as well: channels of a volume lie a multiple of 64 KiB apart, so that the
// same voxel of all channels falls into one set of the caches.
#pragma once

#include <algorithm>

#include "cpu/rcu/rcu.h"
#include "cpu/simd/packing.h"
#include "cpu/simd/simd.h"

namespace grcsf {
namespace {

struct Sizes {
  std::int64_t batch, channels, maps, map_channels, heads, hidden;
  std::int64_t lines;      // K * h * c: rows of queries, expectations and their gradients
  std::int64_t map_lines;  // K * c
  std::int64_t space[3], patch[3], grid[3];
  std::int64_t patches;  // of one sample

  explicit Sizes(const RcuArguments& arguments) {
    batch = arguments.x.shape[0];
    channels = arguments.x.shape[1];
    maps = arguments.weights.query_weight.shape[0];
    heads = arguments.weights.query_weight.shape[1];
    map_channels = arguments.weights.query_weight.shape[2];
    hidden = arguments.weights.score_weight2.shape[0];
    lines = maps * heads * map_channels;
    map_lines = maps * map_channels;
    patches = 1;
    for (int axis = 0; axis < 3; ++axis) {
      space[axis] = arguments.x.shape[2 + axis];
      patch[axis] = arguments.patch[axis];
      grid[axis] = (space[axis] + patch[axis] - 1) / patch[axis];
      patches *= grid[axis];
    }
  }

  std::int64_t patch_voxels() const { return patch[0] * patch[1] * patch[2]; }
};

// The number of values from one channel to the next in a packed buffer: an odd number of cache
// lines, so that channels fall into different sets.
template <typename A>
std::int64_t channel_pitch(std::int64_t voxels) {
  constexpr std::int64_t line = 64 / sizeof(A);
  const std::int64_t whole = pitch_of(voxels) / line;
  return (whole | 1) * line;
}

// A box of voxels of one sample: a patch, or patches side by side along the last axis.
struct Box {
  std::int64_t sample, origin[3], extent[3];

  std::int64_t rows() const { return extent[0] * extent[1]; }
  std::int64_t voxels() const { return rows() * extent[2]; }
};

// `count` patches side by side, beginning with the one at `cell` of the grid.
inline Box box_of(const Sizes& sizes, std::int64_t sample, const std::int64_t cell[3],
                  std::int64_t count = 1) {
  Box box{};
  box.sample = sample;
  for (int axis = 0; axis < 3; ++axis) {
    box.origin[axis] = cell[axis] * sizes.patch[axis];
    const std::int64_t wanted = sizes.patch[axis] * (axis == 2 ? count : 1);
    box.extent[axis] = std::min(wanted, sizes.space[axis] - box.origin[axis]);
  }
  return box;
}

// The patch with this number, counted over samples and the grid in row-major order.
inline Box nth_patch(const Sizes& sizes, std::int64_t number) {
  const std::int64_t row = number / sizes.grid[2];
  const std::int64_t cell[3] = {row / sizes.grid[1] % sizes.grid[0], row % sizes.grid[1],
                                number % sizes.grid[2]};
  return box_of(sizes, number / sizes.patches, cell);
}

// A volume [B, n, D, H, W] in either layout, or the maps [B, K, c, D, H, W].
template <typename T>
struct Patches {
  T* data;
  std::int64_t sample = 0, channel = 0, axis[3] = {};  // strides
  bool channels_last = false;

  // `channels`: axes between the first and the last three count as one. Gradients that are not
  // asked for have no axes.
  explicit Patches(const TensorView& view) : data(static_cast<T*>(view.data)) {
    if (data == nullptr) return;
    const int spatial = view.axes - 3;
    sample = view.strides[0];
    channel = view.strides[spatial - 1];
    for (int a = 0; a < 3; ++a) axis[a] = view.strides[spatial + a];
    channels_last = view.axes == 5 && view.shape[1] > 1 && channel == 1 && axis[2] != 1;
  }

  T* at(const Box& box) const {
    T* first = data + box.sample * sample;
    for (int a = 0; a < 3; ++a) first += box.origin[a] * axis[a];
    return first;
  }
};

// `runs` runs of `count` values, `step` apart in the volume, one after the other in the buffer. A
// run is short (8 voxels of a patch): the loop over them has to cost next to nothing, or too few
// cache misses are under way at once.
template <typename T>
inline void pack_runs(const T* from, std::int64_t step, std::int64_t runs, std::int64_t count,
                      ComputeType<T>* to) {
  constexpr int width = lanes<ComputeType<T>>;
  if (count == width) {
    for (std::int64_t run = 0; run < runs; ++run) store(load(from + run * step), to + run * width);
    return;
  }
  for (std::int64_t run = 0; run < runs; ++run, from += step, to += count) {
    std::int64_t i = 0;
    for (; i + width <= count; i += width) store(load(from + i), to + i);
    for (; i < count; ++i) to[i] = widen(from[i]);
  }
}

// The inverse.
template <typename T>
inline void unpack_runs(const ComputeType<T>* from, std::int64_t step, std::int64_t runs,
                        std::int64_t count, T* to) {
  constexpr int width = lanes<ComputeType<T>>;
  if (count == width) {
    for (std::int64_t run = 0; run < runs; ++run) store(load(from + run * width), to + run * step);
    return;
  }
  for (std::int64_t run = 0; run < runs; ++run, from += count, to += step) {
    std::int64_t i = 0;
    for (; i + width <= count; i += width) store(load(from + i), to + i);
    for (; i < count; ++i) narrow(from[i], to[i]);
  }
}

// Where the patches of a group lie in a packed buffer.
template <typename A>
struct Packed {
  A* data;
  std::int64_t patch;  // values from one patch to the next
  std::int64_t pitch;  // values from one channel to the next
};

// Rows [first, last) of a box whose patches are `width` voxels wide, in runs of rows of one slice:
// visit(offset in the volume, offset in the patch, patch, rows, voxels of a row).
template <typename Visit>
inline void for_each_slice(const std::int64_t axis[3], const Box& box, std::int64_t width,
                           std::int64_t first, std::int64_t last, Visit visit) {
  std::int64_t z = first / box.extent[1], y = first % box.extent[1];
  for (std::int64_t row = first; row < last; ++z, y = 0) {
    const std::int64_t rows = std::min(box.extent[1] - y, last - row);
    std::int64_t patch = 0;
    for (std::int64_t x = 0; x < box.extent[2]; x += width, ++patch) {
      const std::int64_t count = std::min(width, box.extent[2] - x);
      visit(z * axis[0] + y * axis[1] + x * axis[2], (row - first) * count, patch, rows, count);
    }
    row += rows;
  }
}

// Voxels of one patch in channels-last layout, in order: each call gives the offset of the next.
struct VoxelWalk {
  std::int64_t slice, row, voxel;  // strides
  std::int64_t height, width;
  std::int64_t z, y, x = 0;

  // `count` voxels of every row of a box, from row `first` on.
  VoxelWalk(const std::int64_t axis[3], const Box& box, std::int64_t first, std::int64_t count)
      : slice(axis[0]),
        row(axis[1]),
        voxel(axis[2]),
        height(box.extent[1]),
        width(count),
        z(first / box.extent[1]),
        y(first % box.extent[1]) {}

  std::int64_t next() {
    const std::int64_t offset = z * slice + y * row + x * voxel;
    if (++x == width) {
      x = 0;
      if (++y == height) {
        y = 0;
        ++z;
      }
    }
    return offset;
  }
};

// Channels-last voxels to packed rows: squares of lanes x lanes values are transposed in registers.
template <typename T>
void pack_voxels(const T* from, VoxelWalk walk, std::int64_t voxels, std::int64_t channels,
                 ComputeType<T>* to, std::int64_t pitch) {
  using A = ComputeType<T>;
  constexpr int step = lanes<A>;
  const std::int64_t whole = channels / step * step;
  for (std::int64_t v = 0; v < voxels; v += step) {
    const int present = static_cast<int>(std::min<std::int64_t>(step, voxels - v));
    const T* at[step];
    for (int i = 0; i < step; ++i) at[i] = i < present ? from + walk.next() : at[0];
    for (std::int64_t c = 0; c < whole; c += step) {
      Vec<A> square[step];
      for (int i = 0; i < step; ++i) square[i] = load(at[i] + c);
      transpose<A>(square);
      for (int i = 0; i < step; ++i) store(square[i], to + (c + i) * pitch + v);
    }
    for (std::int64_t c = whole; c < channels; ++c) {
      for (int i = 0; i < step; ++i) to[c * pitch + v + i] = widen(at[i][c]);
    }
  }
}

// The inverse.
template <typename T>
void unpack_voxels(const ComputeType<T>* from, std::int64_t pitch, VoxelWalk walk,
                   std::int64_t voxels, std::int64_t channels, T* to) {
  using A = ComputeType<T>;
  constexpr int step = lanes<A>;
  const std::int64_t whole = channels / step * step;
  for (std::int64_t v = 0; v < voxels; v += step) {
    const int present = static_cast<int>(std::min<std::int64_t>(step, voxels - v));
    T* at[step];
    for (int i = 0; i < present; ++i) at[i] = to + walk.next();
    for (std::int64_t c = 0; c < whole; c += step) {
      Vec<A> square[step];
      for (int i = 0; i < step; ++i) square[i] = load(from + (c + i) * pitch + v);
      transpose<A>(square);
      for (int i = 0; i < present; ++i) store(square[i], at[i] + c);
    }
    for (std::int64_t c = whole; c < channels; ++c) {
      for (int i = 0; i < present; ++i) narrow(from[c * pitch + v + i], at[i][c]);
    }
  }
}

// Calls visit(patch, its first column in the group, its width) for the patches of a group.
template <typename Visit>
inline void for_each_patch(const Box& box, std::int64_t width, Visit visit) {
  std::int64_t patch = 0;
  for (std::int64_t x = 0; x < box.extent[2]; x += width, ++patch) {
    visit(patch, x, std::min(width, box.extent[2] - x));
  }
}

// Fills up every channel of every patch with zeros to whole vectors.
template <typename A>
inline void pad(const Box& box, std::int64_t width, std::int64_t rows, std::int64_t channels,
                const Packed<A>& packed) {
  for_each_patch(box, width, [&](std::int64_t patch, std::int64_t, std::int64_t wide) {
    const std::int64_t count = rows * wide, whole = whole_vectors<A>(count);
    if (count == whole) return;
    for (std::int64_t c = 0; c < channels; ++c) {
      A* row = packed.data + patch * packed.patch + c * packed.pitch;
      for (std::int64_t i = count; i < whole; ++i) row[i] = 0;
    }
  });
}

// Rows [first, last) of a box, all channels, into packed patches of `width` voxels a row.
template <typename T>
void pack(const Patches<T>& volume, const Box& box, std::int64_t width, std::int64_t first,
          std::int64_t last, std::int64_t channels, const Packed<ComputeType<T>>& packed) {
  const T* from = volume.at(box);
  if (volume.channels_last) {
    for_each_patch(box, width, [&](std::int64_t patch, std::int64_t x, std::int64_t count) {
      pack_voxels(from + x * volume.axis[2], VoxelWalk(volume.axis, box, first, count),
                  (last - first) * count, channels, packed.data + patch * packed.patch,
                  packed.pitch);
    });
  } else {
    for (std::int64_t c = 0; c < channels; ++c) {
      for_each_slice(volume.axis, box, width, first, last,
                     [&](std::int64_t slice, std::int64_t at, std::int64_t patch, std::int64_t rows,
                         std::int64_t count) {
                       pack_runs(from + c * volume.channel + slice, volume.axis[1], rows, count,
                                 packed.data + patch * packed.patch + c * packed.pitch + at);
                     });
    }
  }
  pad(box, width, last - first, channels, packed);
}

// Asks for the rows of a box before they are packed, a few at a time. Runs of one cache line at a
// stride are more than the hardware foresees.
template <typename T>
class Prefetcher {
 public:
  Prefetcher() = default;
  // All rows of `box` within about `steps` calls of step().
  Prefetcher(const Patches<const T>& volume, const Box& box, std::int64_t channels,
             std::int64_t steps)
      : first_(volume.at(box)),
        channel_(volume.channel),
        row_{volume.axis[0], volume.axis[1]},
        extent_{box.extent[0], box.extent[1]},
        bytes_(box.extent[2] * (volume.channels_last ? channels : 1) *
               static_cast<std::int64_t>(sizeof(T))),
        channels_(volume.channels_last ? 1 : channels) {
    const std::int64_t runs = channels_ * box.rows();
    at_once_ = (runs + steps - 1) / std::max<std::int64_t>(steps, 1);
  }

  void step() {
    for (std::int64_t i = 0; i < at_once_ && c_ < channels_; ++i) {
      prefetch_bytes(first_ + c_ * channel_ + z_ * row_[0] + y_ * row_[1], bytes_);
      if (++y_ < extent_[1]) continue;
      y_ = 0;
      if (++z_ < extent_[0]) continue;
      z_ = 0;
      ++c_;
    }
  }

 private:
  const T* first_ = nullptr;
  std::int64_t channel_ = 0, row_[2] = {}, extent_[2] = {}, bytes_ = 0, channels_ = 0;
  std::int64_t at_once_ = 0, c_ = 0, z_ = 0, y_ = 0;
};

// One channel past the cache, row by row across the patches, so that cache lines fill up at once.
// All runs are whole vectors.
template <typename T>
void stream_rows(const Packed<ComputeType<T>>& packed, std::int64_t channel, const Box& box,
                 std::int64_t width, std::int64_t first, std::int64_t last,
                 const Patches<T>& volume, T* to) {
  using A = ComputeType<T>;
  const A* rows = packed.data + channel * packed.pitch;
  std::int64_t z = first / box.extent[1], y = first % box.extent[1];
  for (std::int64_t row = 0; row < last - first; ++row) {
    T* line = to + z * volume.axis[0] + y * volume.axis[1];
    const A* from = rows;
    for (std::int64_t x = 0; x < box.extent[2]; x += width, from += packed.patch) {
      const std::int64_t count = std::min(width, box.extent[2] - x);
      for (std::int64_t i = 0; i < count; i += lanes<A>) {
        stream(load(from + row * count + i), line + x + i);
      }
    }
    if (++y < box.extent[1]) continue;
    y = 0;
    ++z;
  }
}

// The inverse of pack().
template <typename T>
void unpack(const Packed<ComputeType<T>>& packed, const Box& box, std::int64_t width,
            std::int64_t first, std::int64_t last, std::int64_t channels, bool past_cache,
            const Patches<T>& volume) {
  using A = ComputeType<T>;
  T* to = volume.at(box);
  if (volume.channels_last) {
    for_each_patch(box, width, [&](std::int64_t patch, std::int64_t x, std::int64_t count) {
      unpack_voxels(packed.data + patch * packed.patch, packed.pitch,
                    VoxelWalk(volume.axis, box, first, count), (last - first) * count, channels,
                    to + x * volume.axis[2]);
    });
    return;
  }
  if (past_cache && width % lanes<A> == 0 && box.extent[2] % lanes<A> == 0) {
    for (std::int64_t c = 0; c < channels; ++c) {
      stream_rows(packed, c, box, width, first, last, volume, to + c * volume.channel);
    }
    return;
  }
  for (std::int64_t c = 0; c < channels; ++c) {
    for_each_slice(volume.axis, box, width, first, last,
                   [&](std::int64_t slice, std::int64_t at, std::int64_t patch, std::int64_t rows,
                       std::int64_t count) {
                     unpack_runs(packed.data + patch * packed.patch + c * packed.pitch + at,
                                 volume.axis[1], rows, count, to + c * volume.channel + slice);
                   });
  }
}

}  // namespace
}  // namespace grcsf
