// SPDX-License-Identifier: Apache-2.0
// rcu on the CPU, one map channel: the attention of a patch as a table.
//
// E(a), the mean of the residual voxels r_j under weights exp(a r_j), is a smooth function of the
// number a; all heads of a map share it. It is tabulated at evenly spaced nodes over the range of a
// that occurs in the patch, as a cubic Hermite spline: E' is the variance of r under the same
// weights, and its derivative the third central moment. docs/operators.md bounds the error.
//
// Nodes come in blocks of 16. One exponential a voxel gives the weights at the first node of a
// block, and one more, exp(step r), takes them from node to node: 4 operations a voxel and node,
// all of them multiply-adds. The hazards, and what is done about them:
// - overflow: exponents are a (r - end), `end` being the largest r for a > 0 and the least for a <
// 0;
// - underflow: weights below exp(-80) are 0, so that no product becomes subnormal;
// - cancellation in the variance: moments are taken about the E of the block's first node, of which
//   the others are at most 16 step * variance away, less than 1.6 standard deviations;
// - rounding adds up over 15 products only.
#pragma once

#include <cmath>

#include "cpu/simd/packing.h"
#include "cpu/simd/product.h"
#include "cpu/simd/simd.h"

namespace grcsf {
namespace {

constexpr int block_nodes = 16;
constexpr int moments_kept = 4;  // sums of w, w d, w d^2, w d^3 with d = r - center

// Evenly spaced nodes over the values of a.
struct Nodes {
  double first = 0, step = 0;
  std::int64_t count = 0;          // a multiple of 4; 0: too many, the direct sum is cheaper
  double least = 0, greatest = 0;  // of r

  std::int64_t blocks() const { return (count + block_nodes - 1) / block_nodes; }
  std::int64_t in_block(std::int64_t block) const {
    return std::min<std::int64_t>(block_nodes, count - block * block_nodes);
  }
  double at(std::int64_t node) const { return first + step * static_cast<double>(node); }
  // The end of the range of r that the weights of a block are relative to: whether a > 0 in its
  // middle.
  bool rises(std::int64_t block) const { return at(block * block_nodes + in_block(block) / 2) > 0; }
};

// The largest (step of a) * (range of r): the error of E is at most 3.4e-4 step^4 range(r).
template <typename T>
constexpr double widest_step() {
  return std::is_same_v<T, double> ? 0.004 : std::is_same_v<T, float> ? 0.25 : 0.5;
}

inline Nodes nodes_for(double least_a, double greatest_a, double least_r, double greatest_r,
                       double widest, std::int64_t most) {
  Nodes nodes;
  nodes.least = least_r;
  nodes.greatest = greatest_r;
  nodes.first = least_a;
  const double range = greatest_a - least_a;
  const double wanted = range * (greatest_r - least_r) / widest;
  // NaN and infinity too; and a range below 0, which is that of queries that are all NaN.
  if (!(range >= 0 && wanted < static_cast<double>(most - 4))) return nodes;
  nodes.count = (static_cast<std::int64_t>(wanted) + 2 + 3) / 4 * 4;
  nodes.step = range / static_cast<double>(nodes.count - 1);
  return nodes;
}

// The coefficients of splines over the same nodes, four for each interval. Null where not wanted.
template <typename A>
struct Splines {
  A* mean = nullptr;      // E - middle of r
  A* variance = nullptr;  // its derivative; backward
  A* log = nullptr;       // log sum exp(a (r - middle of r)), whose derivative is E - middle
};

template <typename A>
struct Table {
  A first = 0, inverse = 0, middle = 0;
  std::int64_t last = -1;  // last interval; -1: no table
  Splines<A> splines;
};

// The weights of a chunk of voxels: at the node that is reached, and the factor to the next one.
template <typename A>
struct Weights {
  A* now;
  A* factor;
};

// Sets what is after `voxels` values in the last vector to 0.
template <typename A>
inline void clear_padding(A* row, std::int64_t voxels) {
  for (std::int64_t v = voxels; v < whole_vectors<A>(voxels); ++v) row[v] = 0;
}

// exp(step (r - least)): the factor from node to node, relative to the lower end. 0 for padding: it
// lies outside the range of r, where the exponential may overflow, and infinity times its weight of
// 0 is NaN.
template <typename A>
void node_factors(const A* r, std::int64_t voxels, const Nodes& nodes, A* factor) {
  const A rate = static_cast<A>(nodes.step), from = static_cast<A>(nodes.least);
  for (std::int64_t v = 0; v < whole_vectors<A>(voxels); v += lanes<A>) {
    store(exp_of<A>(rate * (load(r + v) - from)), factor + v);
  }
  clear_padding(factor, voxels);
}

// The weights at the first node of a block; adds sum w and sum w (r - about) to `sums`.
template <typename A>
void start_block(const A* r, std::int64_t voxels, const Nodes& nodes, std::int64_t block, A about,
                 A* weights, double sums[2]) {
  const A rate = static_cast<A>(nodes.at(block * block_nodes));
  const A from = static_cast<A>(nodes.rises(block) ? nodes.greatest : nodes.least);
  Vec<A> sum{}, moment{};
  for (std::int64_t v = 0; v < whole_vectors<A>(voxels); v += lanes<A>) {
    const Vec<A> value = load(r + v);
    Vec<A> weight = exp_of<A>(rate * (value - from));
    if (v + lanes<A> > voxels) {  // padding weighs nothing
      for (std::int64_t i = voxels - v; i < lanes<A>; ++i) weight[i] = 0;
    }
    store(weight, weights + v);
    sum += weight;
    moment += weight * (value - about);
  }
  sums[0] += sum_of<A>(sum);
  sums[1] += sum_of<A>(moment);
}

// The moments about `center` at N nodes; the weights move on to the node after them.
template <typename A, int N, int Kept>
void add_nodes(const A* r, std::int64_t voxels, A center, A scale, const Weights<A>& weights,
               double* sums) {
  Vec<A> total[N][Kept];
  for (int n = 0; n < N; ++n) {
    for (int m = 0; m < Kept; ++m) total[n][m] = Vec<A>{};
  }
  const auto add = [&](std::int64_t v, Vec<A> distance) {
    const Vec<A> square = distance * distance;
    const Vec<A> factor = load(weights.factor + v) * scale;
    Vec<A> weight = load(weights.now + v);
    for (int n = 0; n < N; ++n) {
      total[n][0] += weight;
      total[n][1] += weight * distance;
      total[n][2] += weight * square;
      if (Kept > 3) total[n][Kept - 1] += weight * (square * distance);
      weight *= factor;
    }
    store(weight, weights.now + v);
  };
  std::int64_t v = 0;
  for (; v + lanes<A> <= voxels; v += lanes<A>) add(v, load(r + v) - center);
  if (v < voxels) {
    // Padding weighs nothing, but the cube of its distance may be infinite.
    Vec<A> distance = load(r + v) - center;
    for (std::int64_t i = voxels - v; i < lanes<A>; ++i) distance[i] = 0;
    add(v, distance);
  }
  for (int n = 0; n < N; ++n) {
    for (int m = 0; m < Kept; ++m) sums[n * moments_kept + m] = sum_of<A>(total[n][m]);
  }
}

// The moments of a chunk at all nodes of a block, after start_block(). `sums` [nodes][4], of which
// the first `Kept` are set: 3 for E, 4 for the variance as well.
template <typename A, int Kept>
void sum_block(const A* r, std::int64_t voxels, const Nodes& nodes, std::int64_t block, A center,
               const Weights<A>& weights, double* sums) {
  // Registers hold the sums of four nodes, or of two.
  constexpr int together = Kept > 3 ? 2 : 4;
  const double end = nodes.rises(block) ? nodes.least - nodes.greatest : 0;
  const A scale = static_cast<A>(std::exp(nodes.step * end));
  for (std::int64_t n = 0; n < nodes.in_block(block); n += together) {
    add_nodes<A, together, Kept>(r, voxels, center, scale, weights, sums + n * moments_kept);
  }
}

// What a node knows: E, the variance, the third central moment and the sum of the weights.
struct Moments {
  double mean, variance, third, total;
};

inline Moments moments_of(const double* sums, double center) {
  const double first = sums[1] / sums[0], second = sums[2] / sums[0], third = sums[3] / sums[0];
  const double variance = second - first * first;
  return {center + first, variance < 0 ? 0 : variance,
          third - 3 * first * second + 2 * first * first * first, sums[0]};
}

// Cubic Hermite on [0, 1], lowest power first; slopes per interval.
template <typename A>
inline void hermite(double from, double to, double slope_from, double slope_to, A* coefficients) {
  const double rise = to - from;
  coefficients[0] = static_cast<A>(from);
  coefficients[1] = static_cast<A>(slope_from);
  coefficients[2] = static_cast<A>(3 * rise - 2 * slope_from - slope_to);
  coefficients[3] = static_cast<A>(slope_from + slope_to - 2 * rise);
}

// A table without its splines. `range` is that of the argument.
template <typename A>
Table<A> table_over(double first, double range, std::int64_t nodes) {
  Table<A> table;
  table.first = static_cast<A>(first);
  const A inverse = static_cast<A>(static_cast<double>(nodes - 1) / range);
  table.inverse = std::isfinite(inverse) ? inverse : A(0);  // a single value: the first node
  table.last = nodes - 2;
  return table;
}

// The table from the moments at the nodes; every spline has room for [count - 1][4].
template <typename A>
Table<A> table_of(const Nodes& nodes, const Moments* at, const Splines<A>& splines) {
  const double middle = (nodes.least + nodes.greatest) / 2, step = nodes.step;
  const auto log_at = [&](std::int64_t n) {
    const double end = nodes.rises(n / block_nodes) ? nodes.greatest : nodes.least;
    return std::log(at[n].total) + nodes.at(n) * (end - middle);
  };
  for (std::int64_t n = 0; n + 1 < nodes.count; ++n) {
    const Moments &from = at[n], &to = at[n + 1];
    hermite(from.mean - middle, to.mean - middle, step * from.variance, step * to.variance,
            splines.mean + 4 * n);
    if (splines.variance != nullptr) {
      hermite(from.variance, to.variance, step * from.third, step * to.third,
              splines.variance + 4 * n);
    }
    if (splines.log != nullptr) {
      hermite(log_at(n), log_at(n + 1), step * (from.mean - middle), step * (to.mean - middle),
              splines.log + 4 * n);
    }
  }
  Table<A> table =
      table_over<A>(nodes.first, step * static_cast<double>(nodes.count - 1), nodes.count);
  table.splines = splines;
  table.middle = static_cast<A>(middle);
  return table;
}

// The four coefficients of interval index[i], in lane i of four vectors.
template <typename A>
inline void gather(const A* coefficients, Integers<A> index, Vec<A> out[4]) {
  A values[4][lanes<A>];
  for (int i = 0; i < lanes<A>; ++i) {
    for (int m = 0; m < 4; ++m) values[m][i] = coefficients[4 * index[i] + m];
  }
  for (int m = 0; m < 4; ++m) out[m] = load(values[m]);
}

#if defined(__AVX2__) && GRCSF_VECTOR_BYTES == 32
// Eight loads of four coefficients and a transposition: half the time of four gathers.
template <>
inline void gather<float>(const float* coefficients, Integers<float> index, Vec<float> out[4]) {
  alignas(32) std::int32_t at[8];
  std::memcpy(at, &index, sizeof at);
  __m256 row[4];
  for (int i = 0; i < 4; ++i) {
    row[i] = _mm256_insertf128_ps(
        _mm256_castps128_ps256(_mm_loadu_ps(coefficients + 4 * std::int64_t(at[i]))),
        _mm_loadu_ps(coefficients + 4 * std::int64_t(at[i + 4])), 1);
  }
  const __m256 low01 = _mm256_unpacklo_ps(row[0], row[1]),
               high01 = _mm256_unpackhi_ps(row[0], row[1]);
  const __m256 low23 = _mm256_unpacklo_ps(row[2], row[3]),
               high23 = _mm256_unpackhi_ps(row[2], row[3]);
  const auto pair = [](__m256 one, __m256 two, bool high) {
    const __m256d a = _mm256_castps_pd(one), b = _mm256_castps_pd(two);
    return bit_cast<Vec<float>>(high ? _mm256_unpackhi_pd(a, b) : _mm256_unpacklo_pd(a, b));
  };
  out[0] = pair(low01, low23, false);
  out[1] = pair(low01, low23, true);
  out[2] = pair(high01, high23, false);
  out[3] = pair(high01, high23, true);
}
#elif defined(__AVX512F__) && GRCSF_VECTOR_BYTES == 64
template <>
inline void gather<float>(const float* coefficients, Integers<float> index, Vec<float> out[4]) {
  const __m512i at = bit_cast<__m512i>(index * 4);
  for (int m = 0; m < 4; ++m) {
    // The masked form: GCC 12 warns of an uninitialized value inside the plain one.
    out[m] = bit_cast<Vec<float>>(
        _mm512_mask_i32gather_ps(_mm512_setzero_ps(), 0xffff, at, coefficients + m, 4));
  }
}
#endif

template <typename A>
inline Vec<A> cubic(const A* coefficients, Integers<A> index, Vec<A> f) {
  Vec<A> c[4];
  gather<A>(coefficients, index, c);
  return ((c[3] * f + c[2]) * f + c[1]) * f + c[0];
}

// Splines of a table at every value of a row: out[i] from splines[i], and `more` on top of out[0].
template <typename A, int N>
void look_up(const Table<A>& table, const A* argument, std::int64_t voxels,
             const A* const (&splines)[N], A* const (&out)[N], A more = 0) {
  const Vec<A> most = splat<A>(static_cast<A>(table.last + 1));
  const Integers<A> last = Integers<A>{} + static_cast<decltype(Integers<A>{}[0] + 0)>(table.last);
  for (std::int64_t v = 0; v < whole_vectors<A>(voxels); v += lanes<A>) {
    Vec<A> t = (load(argument + v) - table.first) * table.inverse;
    t = at_most(at_least(t, Vec<A>{}), most);
    Integers<A> index = __builtin_convertvector(t, Integers<A>);
    index = index < 0 ? Integers<A>{} : index;  // what NaN converts to
    index = index > last ? last : index;
    const Vec<A> f = t - __builtin_convertvector(index, Vec<A>);
    store(cubic<A>(splines[0], index, f) + more, out[0] + v);
    for (int i = 1; i < N; ++i) store(cubic<A>(splines[i], index, f), out[i] + v);
  }
}

}  // namespace
}  // namespace grcsf
