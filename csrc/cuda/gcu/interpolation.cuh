// SPDX-License-Identifier: Apache-2.0
// The upsampled tile of gcu: deep values around a lane's packs, blended over z and y and then
// along x. It exists in registers alone.
#pragma once

#include "cuda/gcu/tiles.cuh"

namespace grcsf {
namespace cuda {
namespace {

// Where along x the deep values of a pack of voxels lie, and what they weigh.
template <typename T, Path path, int size, typename A = ComputeType<T>>
struct Columns;

template <typename T, int size, typename A>
struct Columns<T, Path::doubled, size, A> {
  static_assert(size % 2 == 0, "packs begin at a deep column");
  int origin;  // offset of the first deep column in its row
  bool has_left, has_right;

  __device__ __forceinline__ Columns(const Volumes& m, int x) {
    origin = x / 2;
    has_left = origin > 0;
    has_right = origin + size / 2 < m.x.deep;
  }

  // The gated values of a pack from deep rows of its channel, which begin at `origin`. The column
  // beside an edge is the edge's own.
  template <typename Rows>
  __device__ __forceinline__ void interpolate(const Rows& rows, const A* gates, A* up) const {
    A columns[size / 2 + 2] = {};
    rows.each([&](const T* row, A weight) {
      const auto middle = Words<T, size / 2>::load(row);
      A left = middle.get(0), right = middle.get(size / 2 - 1);
      if (has_left) left = widened(row[-1]);
      if (has_right) right = widened(row[size / 2]);
      columns[0] += weight * left;
#pragma unroll
      for (int j = 0; j < size / 2; ++j) columns[j + 1] += weight * middle.get(j);
      columns[size / 2 + 1] += weight * right;
    });
    const A near = A(0.75) * gates[0], far = A(0.25) * gates[0];
#pragma unroll
    for (int j = 0; j < size / 2; ++j) {
      up[2 * j] = far * columns[j] + near * columns[j + 1];
      up[2 * j + 1] = near * columns[j + 1] + far * columns[j + 2];
    }
  }
};

template <typename T, int size, typename A>
struct Columns<T, Path::taps, size, A> {
  static constexpr int origin = 0;
  int low[size], high[size];
  A fraction[size];

  __device__ __forceinline__ Columns(const Volumes& m, int x) {
#pragma unroll
    for (int e = 0; e < size; ++e) {
      const auto position = position_of<A>(m.x, x + e);
      low[e] = position.low * static_cast<int>(m.voxel_stride);
      high[e] = (position.low + position.step) * static_cast<int>(m.voxel_stride);
      fraction[e] = position.fraction;
    }
  }

  template <typename Rows>
  __device__ __forceinline__ void interpolate(const Rows& rows, const A* gates, A* up) const {
#pragma unroll
    for (int e = 0; e < size; ++e) up[e] = 0;
    rows.each([&](const T* row, A weight) {
#pragma unroll
      for (int e = 0; e < size; ++e) {
        const A left = widened(row[low[e]]), right = widened(row[high[e]]);
        up[e] += weight * (left + fraction[e] * (right - left));
      }
    });
#pragma unroll
    for (int e = 0; e < size; ++e) up[e] *= gates[0];
  }
};

template <typename T, int size, typename A>
struct Columns<T, Path::channels_last, size, A> {
  int origin, step;
  A fraction;

  __device__ __forceinline__ Columns(const Volumes& m, int x) {
    const auto position = position_of<A>(m.x, x);
    origin = position.low * m.channels;
    step = position.step * m.channels;
    fraction = position.fraction;
  }

  template <typename Rows>
  __device__ __forceinline__ void interpolate(const Rows& rows, const A* gates, A* up) const {
#pragma unroll
    for (int e = 0; e < size; ++e) up[e] = 0;
    rows.each([&](const T* row, A weight) {
      const auto left = Words<T, size>::load(row);
      const auto right = Words<T, size>::load(row + step);
      const A right_weight = weight * fraction, left_weight = weight - right_weight;
#pragma unroll
      for (int e = 0; e < size; ++e) {
        up[e] += left_weight * left.get(e) + right_weight * right.get(e);
      }
    });
#pragma unroll
    for (int e = 0; e < size; ++e) up[e] *= gates[e];
  }
};

// The four deep rows around a pack, of one channel or a pack of them.
template <typename T, typename Place>
struct DeepRows {
  const T* first;
  const Place& place;
  bool planes;  // there is more than one

  template <typename Body>
  __device__ __forceinline__ void each(Body body) const {
    using A = ComputeType<T>;
    const A high = planes ? place.fraction_z : A(0), low = 1 - high;
    body(first, low * (1 - place.fraction_y));
    body(first + place.step_y, low * place.fraction_y);
    if (!planes) return;
    body(first + place.step_z, high * (1 - place.fraction_y));
    body(first + (place.step_z + place.step_y), high * place.fraction_y);
  }
};

template <typename T, typename Place>
__device__ __forceinline__ DeepRows<T, Place> deep_rows(const Volumes& m, const T* first,
                                                        const Place& place) {
  return {first, place, m.z.deep > 1};
}

// Gates of the channels of one pack.
template <typename Tiling, typename A>
struct Gates {
  A skip[Tiling::channels], deep[Tiling::channels];

  __device__ __forceinline__ Gates(const Volumes& m, std::int64_t sample, int channel) {
    const std::int64_t first = sample * m.channels + channel;
#pragma unroll
    for (int e = 0; e < Tiling::channels; ++e) {
      skip[e] = static_cast<const A*>(m.skip_gate)[first + e];
      deep[e] = static_cast<const A*>(m.deep_gate)[first + e];
    }
  }
};

// 1 / max(norm, eps) from the sum of squares, and whether the norm is above eps.
template <typename A>
struct InverseNorm {
  A value;
  bool above;

  __device__ __forceinline__ InverseNorm(A squares, A eps) {
    const A inverse = inverse_sqrt(squares), most = 1 / eps;
    above = !(inverse >= most);  // NaN stays NaN
    value = above ? inverse : most;
  }
};

// Sum over the lanes of a warp that have the same channels, in a fixed order.
template <typename A>
__device__ __forceinline__ A column_sum(int group_bits, A value) {
  for (int distance = 1 << group_bits; distance < warp_size; distance *= 2) {
    value += shuffle_xor(value, distance);
  }
  return value;
}

}  // namespace
}  // namespace cuda
}  // namespace grcsf
