// SPDX-License-Identifier: Apache-2.0
// Positions of the interpolation of gcu along an axis (align_corners=False, as in
// reference/interpolation.py), exact for every pair of sizes, and fast division for them.
#pragma once

#include "cuda/runtime/launch.cuh"

namespace grcsf {
namespace cuda {
namespace {

// Division by a number that does not change in a launch: a product, where dividends fit 31 bits,
// and else an estimate that is off by one at most, for dividends below 2^52.
struct Divider {
  std::int64_t divisor = 1;
  double inverse = 1;
  std::uint32_t magic = 0;
  int shift = 0;
  bool wide = false;

  __host__ __device__ __forceinline__ std::int64_t quotient(std::int64_t dividend) const {
    if (wide) {
      const auto guess = static_cast<std::int64_t>(static_cast<double>(dividend) * inverse);
      const std::int64_t rest = dividend - guess * divisor;
      return guess + (rest < 0 ? -1 : (rest >= divisor ? 1 : 0));
    }
    const auto narrow = static_cast<std::uint32_t>(dividend);
    const auto high = static_cast<std::uint32_t>(static_cast<std::uint64_t>(magic) * narrow >> 32);
    return (high + narrow) >> shift;
  }
};

// For dividends up to `largest`.
inline Divider divider_of(std::int64_t divisor, std::int64_t largest) {
  Divider result;
  result.divisor = divisor;
  result.inverse = 1 / static_cast<double>(divisor);
  result.wide = largest >= std::int64_t(1) << 31 || divisor >= std::int64_t(1) << 31;
  if (result.wide) return result;
  while ((std::int64_t(1) << result.shift) < divisor) ++result.shift;
  const std::uint64_t over = (std::uint64_t(1) << result.shift) - divisor;
  result.magic = static_cast<std::uint32_t>((over << 32) / divisor + 1);
  return result;
}

// One axis: the position of voxel i is max(0, (i + 0.5) * deep / size - 0.5), a fraction of
// integers over 2 * size, so that its floor and its rest are exact. In float32 it would be off by
// 1e-5 voxels.
struct Axis {
  int size = 1, deep = 1;
  std::int64_t ratio_size = 1, ratio_deep = 1;  // without common divisors
  double inverse = 0.5;                         // 1 / (2 * ratio_size)
  Divider by_size, by_deep;                     // by twice the ratio's

  __host__ __device__ __forceinline__ std::int64_t numerator(int i) const {
    const std::int64_t n = (2 * std::int64_t(i) + 1) * ratio_deep - ratio_size;
    return n < 0 ? 0 : n;
  }

  // The first voxel that takes from deep voxels >= j, and one past the last that takes from those
  // <= j.
  __host__ __device__ __forceinline__ int first_of(int j) const {
    const std::int64_t n = (2 * std::int64_t(j) - 1) * ratio_size - ratio_deep;
    return n < 0 ? 0 : static_cast<int>(by_deep.quotient(n)) + 1;
  }
  __host__ __device__ __forceinline__ int end_of(int j) const {
    if (j >= deep - 1) return size;
    const std::int64_t n = (2 * std::int64_t(j) + 3) * ratio_size - ratio_deep;
    if (n <= 0) return 0;
    const std::int64_t end = by_deep.quotient(n + 2 * ratio_deep - 1);
    return end < size ? static_cast<int>(end) : size;
  }
};

inline Axis axis_of(std::int64_t size, std::int64_t deep) {
  Axis axis;
  axis.size = static_cast<int>(size);
  axis.deep = static_cast<int>(deep);
  std::int64_t common = size, rest = deep;
  while (rest != 0) {
    const std::int64_t next = common % rest;
    common = rest;
    rest = next;
  }
  axis.ratio_size = size / common;
  axis.ratio_deep = deep / common;
  axis.inverse = 0.5 / static_cast<double>(axis.ratio_size);
  const std::int64_t largest = 2 * (size + 2) * axis.ratio_deep + 2 * (deep + 2) * axis.ratio_size;
  axis.by_size = divider_of(2 * axis.ratio_size, largest);
  axis.by_deep = divider_of(2 * axis.ratio_deep, largest);
  return axis;
}

// How far the position of voxel i is past deep voxel j. The weight of j there is 1 - |distance|, or
// 0.
template <typename A>
__device__ __forceinline__ A distance_of(const Axis& axis, int i, int j) {
  const std::int64_t last = 2 * axis.ratio_size * (axis.deep - 1);
  const std::int64_t n = least(axis.numerator(i), last);
  return static_cast<A>(n - 2 * axis.ratio_size * j) * static_cast<A>(axis.inverse);
}

// The lower deep voxel, how far the higher one is (0 at the end of the axis, and where it weighs
// nothing: its NaN does not count), and the weight of that one.
template <typename A>
struct Position {
  int low, step;
  A fraction;
};

template <typename A>
__device__ __forceinline__ Position<A> position_of(const Axis& axis, int i) {
  const std::int64_t n = axis.numerator(i);
  const int low = static_cast<int>(axis.by_size.quotient(n));
  Position<A> position;
  position.low = least(low, axis.deep - 1);
  const std::int64_t rest = n - low * 2 * axis.ratio_size;
  position.step = low < axis.deep - 1 && rest != 0 ? 1 : 0;
  position.fraction =
      position.step == 0 ? A(0) : static_cast<A>(rest) * static_cast<A>(axis.inverse);
  return position;
}

}  // namespace
}  // namespace cuda
}  // namespace grcsf
