// SPDX-License-Identifier: Apache-2.0
// Small matrix products on packed rows of voxels, as rcu needs them: projections of a few channels,
// for all voxels of a patch, and their transposes for the gradients of the weights.
//
// A packed matrix holds one channel a row, `pitch` values apart; the voxels of a row are padded
// with values that do no harm to whole vectors. Tiles of 4 x 3 vectors fill 12 of the 16 registers
// of AVX2: 12 multiply-adds for 7 loads.
#pragma once

#include <type_traits>

#include "cpu/simd/simd.h"

namespace grcsf {
namespace {

template <int N>
using Count = std::integral_constant<int, N>;

// Calls body(first, Count<4>) for whole groups of four of `count`, then once for what is left.
template <typename Body>
inline void by_fours(std::int64_t count, Body body) {
  std::int64_t first = 0;
  for (; first + 4 <= count; first += 4) body(first, Count<4>());
  if (count - first == 3) body(first, Count<3>());
  if (count - first == 2) body(first, Count<2>());
  if (count - first == 1) body(first, Count<1>());
}

// Calls body(first, Count<3 or 1>) for groups of three vectors, then single ones.
template <typename A, typename Body>
inline void by_vectors(std::int64_t voxels, Body body) {
  std::int64_t v = 0;
  for (; v + 3 * lanes<A> <= voxels; v += 3 * lanes<A>) body(v, Count<3>());
  for (; v < voxels; v += lanes<A>) body(v, Count<1>());
}

// For every row m and vector of voxels v: store(m, v, start(m) + sum over k of
// weight[m * depth + k] * values[k * pitch + v]). `voxels` counts whole vectors. between() is
// called once for every few vectors: time for a few prefetches.
template <typename A, typename Start, typename Store, typename Between>
inline void product(const A* weight, std::int64_t rows, std::int64_t depth, const A* values,
                    std::int64_t pitch, std::int64_t voxels, Start start, Store store,
                    Between between) {
  by_vectors<A>(voxels, [&](std::int64_t v, auto columns) {
    constexpr int N = decltype(columns)::value;
    between();
    by_fours(rows, [&](std::int64_t m, auto count) {
      constexpr int M = decltype(count)::value;
      Vec<A> sum[M][N];
      for (int i = 0; i < M; ++i) {
        for (int j = 0; j < N; ++j) sum[i][j] = splat<A>(start(m + i));
      }
      const A* from = weight + m * depth;
      for (std::int64_t k = 0; k < depth; ++k) {
        Vec<A> value[N];
        for (int j = 0; j < N; ++j) value[j] = load(values + k * pitch + v + j * lanes<A>);
        for (int i = 0; i < M; ++i) {
          const Vec<A> factor = splat<A>(from[i * depth + k]);
          for (int j = 0; j < N; ++j) sum[i][j] += factor * value[j];
        }
      }
      for (int i = 0; i < M; ++i) {
        for (int j = 0; j < N; ++j) store(m + i, v + j * lanes<A>, sum[i][j]);
      }
    });
  });
}

// For every pair of rows: add(m, n, sum over voxels of left[m] * right[n]), in a fixed order.
template <typename A, typename Add>
inline void inner_products(const A* left, std::int64_t rows, const A* right, std::int64_t columns,
                           std::int64_t pitch, std::int64_t voxels, Add add) {
  by_fours(rows, [&](std::int64_t m, auto left_count) {
    constexpr int M = decltype(left_count)::value;
    std::int64_t n = 0;
    const auto tile = [&](auto right_count) {
      constexpr int N = decltype(right_count)::value;
      Vec<A> sum[M][N];
      for (int i = 0; i < M; ++i) {
        for (int j = 0; j < N; ++j) sum[i][j] = Vec<A>{};
      }
      for (std::int64_t v = 0; v < voxels; v += lanes<A>) {
        Vec<A> other[N];
        for (int j = 0; j < N; ++j) other[j] = load(right + (n + j) * pitch + v);
        for (int i = 0; i < M; ++i) {
          const Vec<A> own = load(left + (m + i) * pitch + v);
          for (int j = 0; j < N; ++j) sum[i][j] += own * other[j];
        }
      }
      for (int i = 0; i < M; ++i) {
        for (int j = 0; j < N; ++j) add(m + i, n + j, sum_of<A>(sum[i][j]));
      }
      n += N;
    };
    while (n + 3 <= columns) tile(Count<3>());
    while (n < columns) tile(Count<1>());
  });
}

// The sum of a row; its padding counts, and has to be 0.
template <typename A>
inline double row_sum(const A* row, std::int64_t voxels) {
  Vec<A> sum{};
  for (std::int64_t v = 0; v < voxels; v += lanes<A>) sum += load(row + v);
  return sum_of<A>(sum);
}

template <typename A>
struct Range {
  A least, greatest;
};

// The least and the greatest of the first `count` values; NaN is passed over.
template <typename A>
inline Range<A> range_of(const A* row, std::int64_t count) {
  const A infinity = static_cast<A>(__builtin_inf());
  Vec<A> low = splat<A>(infinity), high = splat<A>(-infinity);
  std::int64_t v = 0;
  for (; v + lanes<A> <= count; v += lanes<A>) {
    const Vec<A> value = load(row + v);
    low = value < low ? value : low;
    high = value > high ? value : high;
  }
  Range<A> range{least_of<A>(low), greatest_of<A>(high)};
  for (; v < count; ++v) {
    range.least = row[v] < range.least ? row[v] : range.least;
    range.greatest = row[v] > range.greatest ? row[v] : range.greatest;
  }
  return range;
}

}  // namespace
}  // namespace grcsf
