// SPDX-License-Identifier: Apache-2.0
// What forward and backward of gcu share: sizes, interpolation along an axis, rows of the
// upsampled tensor, and the sums over channels.
//
// The upsampled tensor is never whole in memory. A deep row y' is blended between two planes z',
// gated and expanded along x once; the two most recent expanded rows stay in cache, and every
// output row is a blend of those two. At twice the size each serves two output rows and costs half
// as much as one. Everything has internal linkage, as in half.h.
#pragma once

#include <cmath>
#include <cstdint>

#include "cpu/gcu/gcu.h"
#include "cpu/runtime/workspace.h"
#include "cpu/simd/packing.h"

namespace grcsf {
namespace {

struct GcuSizes {
  std::int64_t batch, channels, size[3], deep[3];  // z, y, x

  GcuSizes(const GcuArguments& arguments, bool swapped)
      : batch(arguments.skip.shape[0]), channels(arguments.skip.shape[1]) {
    const int from[3] = {swapped ? 3 : 2, swapped ? 2 : 3, 4};
    for (int axis = 0; axis < 3; ++axis) {
      size[axis] = arguments.skip.shape[from[axis]];
      deep[axis] = arguments.deep.shape[from[axis]];
    }
  }
};

// The two deep voxels around a voxel of one axis, and how far it is from the lower one
// (align_corners=False, as in reference/interpolation.py). They are one where the other weighs
// nothing, so that its NaN does not count.
struct Position {
  std::int64_t low, high;
  double fraction;
};

// In whole numbers: what lies on a deep voxel has a fraction of exactly 0.
inline Position position_of(std::int64_t index, std::int64_t size, std::int64_t deep_size) {
  const std::int64_t center = larger((2 * index + 1) * deep_size - size, 0);
  const std::int64_t low = smaller(center / (2 * size), deep_size - 1);
  const std::int64_t rest = center - low * 2 * size;
  if (rest == 0 || low == deep_size - 1) return {low, low, 0};
  return {low, low + 1, static_cast<double>(rest) / static_cast<double>(2 * size)};
}

// Interpolation along x and its transpose, by tables. Rows are cut into blocks of voxels so that
// the packed buffers of all channels stay in the second-level cache.
template <typename A>
class Columns {
 public:
  Columns(std::int64_t channels, std::int64_t size, std::int64_t deep_size)
      : size_(size),
        deep_size_(deep_size),
        low_(1, pitch_of(size)),
        shift_(1, pitch_of(size)),
        weights_(2, pitch_of(size)),
        starts_(1, deep_size + 1) {
    constexpr std::int64_t packed_bytes = 32 << 10;  // of one buffer; backward has six
    const std::int64_t fitting = packed_bytes / static_cast<std::int64_t>(sizeof(A)) / channels;
    const std::int64_t longest = larger(16, fitting / 16 * 16);
    blocks_ = (size + longest - 1) / longest;
    block_ = pitch_of((size + blocks_ - 1) / blocks_);
    blocks_ = (size + block_ - 1) / block_;

    std::int64_t* low = low_.piece(0);
    auto* shift = shift_.piece(0);
    A *low_weight = weights_.piece(0), *high_weight = weights_.piece(1);
    std::int64_t started = 0;
    for (std::int64_t x = 0; x < pitch_of(size); ++x) {
      const Position position = position_of(smaller(x, size - 1), size, deep_size);
      low[x] = position.low;
      shift[x] = static_cast<Integer>(position.low - low[x / lanes<A> * lanes<A>]);
      const bool edge = position.low == position.high;
      high_weight[x] = edge ? A(0) : static_cast<A>(position.fraction);
      low_weight[x] = edge ? A(1) : static_cast<A>(1 - position.fraction);
      for (; x < size && started <= position.low; ++started) starts_.piece(0)[started] = x;
    }
    for (; started <= deep_size; ++started) starts_.piece(0)[started] = size;
    longest_ = 0;
    for (std::int64_t block = 0; block < blocks_; ++block) {
      longest_ = larger(longest_, deep_end(block) - deep_begin(block));
    }
  }

  std::int64_t blocks() const { return blocks_; }
  std::int64_t block() const { return block_; }  // voxels of a block, a multiple of 16
  std::int64_t begin(std::int64_t block) const { return block * block_; }
  std::int64_t count(std::int64_t block) const { return smaller(block_, size_ - begin(block)); }

  // The deep voxels that a block touches, and the most of them.
  std::int64_t deep_begin(std::int64_t block) const { return low_.piece(0)[begin(block)]; }
  std::int64_t deep_end(std::int64_t block) const {
    return smaller(low_.piece(0)[begin(block) + count(block) - 1] + 2, deep_size_);
  }
  std::int64_t longest() const { return longest_; }

  // out = gate * interpolation of `deep`, which begins at deep_begin(block). One value and one
  // vector after its end are read, but count for nothing.
  void expand(std::int64_t block, const A* __restrict deep, A gate, A* __restrict out) const {
    const std::int64_t* __restrict low = low_.piece(0) + begin(block);
    const A* __restrict low_weight = weights_.piece(0) + begin(block);
    const A* __restrict high_weight = weights_.piece(1) + begin(block);
    const A* __restrict from = deep - deep_begin(block);
    const std::int64_t voxels = count(block);
    std::int64_t x = 0;
    if (deep_size_ <= size_) {
      // A vector of voxels lies between `lanes` + 1 deep voxels: two loads hold all neighbors.
      const Integer* __restrict shift = shift_.piece(0) + begin(block);
      for (; x < voxels; x += lanes<A>) {
        Integers<A> indices;
        std::memcpy(&indices, shift + x, sizeof indices);
        const A* window = from + low[x];
        const Vec<A> high = load(high_weight + x);
        const Vec<A> one = permute<A>(load(window), indices);
        Vec<A> two = permute<A>(load(window + 1), indices);
        two = high == A(0) ? Vec<A>{} : two;  // what weighs nothing may be NaN or Inf
        store((one * load(low_weight + x) + two * high) * gate, out + x);
      }
    } else {
      for (; x < voxels; ++x) {
        const A one = from[low[x]], two = high_weight[x] == 0 ? A(0) : from[low[x] + 1];
        out[x] = (one * low_weight[x] + two * high_weight[x]) * gate;
      }
    }
    for (x = voxels; x % lanes<A> != 0; ++x) out[x] = 0;
  }

  // The transpose for `N` rows of `grad`: to[x' - deep_begin(block)] is the sum over the voxels of
  // the block that x' was spread to, in the order of the voxels. Where the size was doubled, a
  // vector is read beyond each end of `grad`; its values before and after the block are 0.
  template <int N>
  void gather(std::int64_t block, const A* __restrict grad, std::int64_t pitch, A* __restrict to,
              std::int64_t to_pitch) const {
    if (size_ == 2 * deep_size_) {
      for (int k = 0; k < N; ++k) gather_halves(block, grad + k * pitch, to + k * to_pitch);
      return;
    }
    const std::int64_t* __restrict starts = starts_.piece(0);
    const A* __restrict low_weight = weights_.piece(0);
    const A* __restrict high_weight = weights_.piece(1);
    const std::int64_t first = begin(block), last = first + count(block);
    const std::int64_t from = deep_begin(block), end = deep_end(block);
    for (std::int64_t j = from; j < end; ++j) {
      A sums[N] = {};
      std::int64_t x = larger(j > 0 ? starts[j - 1] : 0, first);
      for (; x < smaller(j > 0 ? starts[j] : 0, last); ++x) {
        const A weight = high_weight[x];
        if (weight == 0) continue;  // a gradient of NaN stays with the voxels it belongs to
        for (int k = 0; k < N; ++k) sums[k] += grad[k * pitch + x - first] * weight;
      }
      for (x = larger(starts[j], first); x < smaller(starts[j + 1], last); ++x) {
        const A weight = low_weight[x];
        for (int k = 0; k < N; ++k) sums[k] += grad[k * pitch + x - first] * weight;
      }
      for (int k = 0; k < N; ++k) to[k * to_pitch + j - from] = sums[k];
    }
  }

 private:
  using Integer = std::remove_reference_t<decltype(Integers<A>{}[0])>;

  // Where the size was doubled, in[j] = (o[2j-1] + 3 o[2j] + 3 o[2j+1] + o[2j+2]) / 4: two vectors
  // that begin at 2j-1 and 2j+1, weighted in turn by 1/4 and 3/4, hold the four terms of each pair
  // of lanes.
  void gather_halves(std::int64_t block, const A* __restrict grad, A* __restrict to) const {
    Vec<A> outer, inner;
    for (int i = 0; i < lanes<A>; ++i) {
      outer[i] = i % 2 == 0 ? A(0.25) : A(0.75);
      inner[i] = i % 2 == 0 ? A(0.75) : A(0.25);
    }
    const std::int64_t from = deep_begin(block), end = deep_end(block);
    const A* __restrict voxel = grad - begin(block);
    for (std::int64_t j = from; j < end; j += lanes<A>) {
      const A* pair = voxel + 2 * j;
      const Vec<A> one = load(pair - 1) * outer + load(pair + 1) * inner;
      const Vec<A> two = load(pair - 1 + lanes<A>) * outer + load(pair + 1 + lanes<A>) * inner;
      store(add_pairs(one, two, std::make_integer_sequence<int, lanes<A>>{}), to + j - from);
    }
    // At the edges of the volume all of the outermost voxel belongs to its deep voxel.
    if (from == 0) to[0] += A(0.25) * voxel[0];
    if (begin(block) + count(block) == size_) {
      to[deep_size_ - 1 - from] += A(0.25) * voxel[size_ - 1];
    }
  }

  template <int... lane>
  static Vec<A> add_pairs(Vec<A> one, Vec<A> two, std::integer_sequence<int, lane...>) {
    return select_lanes<A, (2 * lane)...>(one, two) + select_lanes<A, (2 * lane + 1)...>(one, two);
  }

  std::int64_t size_, deep_size_, blocks_, block_, longest_;
  Workspace<std::int64_t> low_;     // the lower deep voxel
  Workspace<Integer> shift_;        // its distance from that of the first voxel of the same vector
  Workspace<A> weights_;            // of the lower and the higher deep voxel
  Workspace<std::int64_t> starts_;  // per deep voxel: the first voxel whose lower one it is
};

// Packed rows [C][pitch]: 16 zeros before every row (and a row of them after the last), which
// Columns::gather reads.
constexpr std::int64_t row_margin = 16;

template <typename A>
std::int64_t row_pitch(const Columns<A>& columns) {
  return columns.block() + row_margin;
}

// Values of one packed buffer.
template <typename A>
std::int64_t buffer_size(const Columns<A>& columns, std::int64_t channels) {
  return row_margin + (channels + 1) * row_pitch(columns) + 2 * 16;
}

// How far ahead contiguous channels are asked for. As many streams as there are channels are too
// many for the hardware's prefetcher; and as their distance is often a multiple of 64 KiB, they
// share the sets of both caches, so that what is asked for further ahead than the number of ways
// would be lost again before it is read.
constexpr std::int64_t prefetched_channels = 4;

// The deep rows of one (sample, z, block), gated and interpolated along z and x.
template <typename T>
class DeepRows {
 public:
  using A = ComputeType<T>;

  static std::int64_t scratch_size(const GcuSizes& sizes, const Columns<A>& columns) {
    return 2 * buffer_size(columns, sizes.channels) +
           sizes.channels * pitch_of(columns.longest() + 1) + 4 * 16;
  }

  DeepRows(const Volume<const T>& deep, const A* gate, const GcuSizes& sizes,
           const Columns<A>& columns, A* scratch)
      : deep_(deep), gates_(gate), sizes_(sizes), columns_(columns) {
    const std::int64_t size = buffer_size(columns, sizes.channels);
    rows_[0] = scratch + row_margin;
    rows_[1] = scratch + size + row_margin;
    packed_ = scratch + 2 * size;
  }

  void enter(std::int64_t b, const Position& z, std::int64_t block) {
    b_ = b;
    z_ = z;
    block_ = block;
    held_[0] = held_[1] = -1;
  }

  // Row y' as [C][pitch]. Neighbors lie in different buffers: both stay valid.
  const A* row(std::int64_t y) {
    A* out = rows_[y & 1];
    if (held_[y & 1] == y) return out;
    held_[y & 1] = y;
    const T* low = deep_.row(b_, z_.low, y, columns_.deep_begin(block_));
    if (z_.low == z_.high) {
      fill(OneRow<T>{low}, out);
    } else {
      const T* high = low + (z_.high - z_.low) * deep_.z;
      fill(TwoRows<T>{low, high, static_cast<A>(1 - z_.fraction), static_cast<A>(z_.fraction)},
           out);
    }
    return out;
  }

 private:
  template <typename Source>
  void fill(const Source& source, A* out) const {
    const std::int64_t pitch = row_pitch(columns_);
    const std::int64_t count = columns_.deep_end(block_) - columns_.deep_begin(block_);
    const std::int64_t packed_pitch = deep_.channels_last ? pitch_of(columns_.longest() + 1) : 0;
    if (deep_.channels_last) {
      pack_channels_last(source, sizes_.channels, count, packed_, packed_pitch);
    }
    for (std::int64_t c = 0; c < sizes_.channels; ++c) {
      A* line = packed_ + c * packed_pitch;
      if (!deep_.channels_last) {
        const std::int64_t ahead = c + prefetched_channels;
        if (ahead < sizes_.channels) source.prefetch(ahead * deep_.channel, count);
        pack_run(source, c * deep_.channel, count, line);
      }
      line[count] = line[count - 1];  // beyond the edge, with weight 0
      columns_.expand(block_, line, gates_[b_ * sizes_.channels + c], out + c * pitch);
    }
  }

  const Volume<const T>& deep_;
  const A* gates_;
  const GcuSizes& sizes_;
  const Columns<A>& columns_;
  A* rows_[2];
  A* packed_;
  std::int64_t held_[2] = {-1, -1};
  std::int64_t b_ = 0, block_ = 0;
  Position z_{};
};

// An output row as a blend of two expanded deep rows, [C][pitch] each.
template <typename A>
struct UpRow {
  const A *low, *high;
  A low_weight, high_weight;

  Vec<A> at(std::int64_t offset) const {
    return load(low + offset) * low_weight + load(high + offset) * high_weight;
  }
};

template <typename T, typename A = ComputeType<T>>
inline UpRow<A> up_row(DeepRows<T>& rows, const Position& y) {
  const A* low = rows.row(y.low);
  // One row alone is its half twice: times 0 its Inf would be NaN.
  if (y.high == y.low) return {low, low, A(0.5), A(0.5)};
  return {low, rows.row(y.high), static_cast<A>(1 - y.fraction), static_cast<A>(y.fraction)};
}

// Sums over channels, per voxel of a row.
template <typename A>
struct VoxelSums {
  A *products, *skip_squares, *up_squares;  // <f, u>, |f|^2, |u|^2
  A* grad_products;                         // <gradient, skip>; backward only
};

// Adds N channels of a packed row, from channel `c`. Groups are summed apart, so that rounding
// grows with C / N.
template <int N, bool backward, typename A>
inline void add_channels(const A* __restrict skip, const A* __restrict grad, const UpRow<A>& up,
                         std::int64_t c, std::int64_t pitch, std::int64_t width,
                         const A* __restrict gates, const VoxelSums<A>& sums) {
  for (std::int64_t x = 0; x < width; x += lanes<A>) {
    Vec<A> products{}, skip_squares{}, up_squares{}, grad_products{};
#pragma GCC unroll 4
    for (int k = 0; k < N; ++k) {
      const std::int64_t offset = (c + k) * pitch + x;
      const Vec<A> s = load(skip + offset);
      const Vec<A> f = s * gates[c + k];
      const Vec<A> u = up.at(offset);
      products += f * u;
      skip_squares += f * f;
      up_squares += u * u;
      if constexpr (backward) grad_products += s * load(grad + offset);
    }
    store(load(sums.products + x) + products, sums.products + x);
    store(load(sums.skip_squares + x) + skip_squares, sums.skip_squares + x);
    store(load(sums.up_squares + x) + up_squares, sums.up_squares + x);
    if constexpr (backward) {
      store(load(sums.grad_products + x) + grad_products, sums.grad_products + x);
    }
  }
}

// Packs a row of skip (and of the gradient) and takes the sums over its channels. Contiguous
// channels are packed in groups right before they are added, while they are in the first-level
// cache; the next row of the same channels is asked for meanwhile, because as many streams as
// there are channels are too many for the hardware's prefetcher.
template <bool backward, typename T>
inline void sum_channels(const Volume<const T>& layout, const T* skip_row, const T* grad_row,
                         std::int64_t count, ComputeType<T>* skip, ComputeType<T>* grad,
                         const UpRow<ComputeType<T>>& up, std::int64_t channels, std::int64_t pitch,
                         const ComputeType<T>* gates, const VoxelSums<ComputeType<T>>& sums) {
  using A = ComputeType<T>;
  constexpr int group = 4;
  const std::int64_t width = whole_vectors<A>(count);
  for (std::int64_t x = 0; x < width; ++x) {
    sums.products[x] = sums.skip_squares[x] = sums.up_squares[x] = 0;
    if (backward) sums.grad_products[x] = 0;
  }
  if (layout.channels_last) {
    pack_channels_last(OneRow<T>{skip_row}, channels, count, skip, pitch);
    if (backward) pack_channels_last(OneRow<T>{grad_row}, channels, count, grad, pitch);
  }
  for (std::int64_t c = 0; c < channels; c += group) {
    const std::int64_t own = smaller(group, channels - c);
    for (std::int64_t k = c; k < c + own && !layout.channels_last; ++k) {
      const bool wraps = k + prefetched_channels >= channels;
      const std::int64_t ahead =
          wraps ? larger(k + prefetched_channels - channels, 0) : k + prefetched_channels;
      const std::int64_t next = ahead * layout.channel + (wraps ? layout.y : 0);
      OneRow<T>{skip_row}.prefetch(next, count);
      pack_run(OneRow<T>{skip_row}, k * layout.channel, count, skip + k * pitch);
      if (backward) {
        OneRow<T>{grad_row}.prefetch(next, count);
        pack_run(OneRow<T>{grad_row}, k * layout.channel, count, grad + k * pitch);
      }
    }
    if (own == group) {
      add_channels<group, backward>(skip, grad, up, c, pitch, width, gates, sums);
    } else {
      for (std::int64_t k = c; k < c + own; ++k) {
        add_channels<1, backward>(skip, grad, up, k, pitch, width, gates, sums);
      }
    }
  }
}

}  // namespace
}  // namespace grcsf
