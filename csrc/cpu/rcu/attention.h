// SPDX-License-Identifier: Apache-2.0
// rcu on the CPU: what forward and backward share. Weights in the order that the products want, the
// importance score, and the attention of a chunk of queries.
//
// A patch that fits into a thread's cache is one chunk. A larger one (global attention) is cut into
// chunks of rows, and all threads work on it together: rcu/large_patch.h.
#pragma once

#include <cmath>
#include <limits>

#include "cpu/rcu/direct.h"
#include "cpu/rcu/patches.h"
#include "cpu/rcu/table.h"
#include "cpu/runtime/vector.h"
#include "cpu/runtime/workspace.h"

namespace grcsf {
namespace {

template <typename A>
const A* values_of(const TensorView& view) {
  return static_cast<const A*>(view.data);
}

// The weights; `value` and the transposes are copies in the order in which they are read.
template <typename A>
struct Projections {
  const A* query;        // [lines][C]
  const A* query_bias;   // [lines]
  Vector<A> value;       // [C][lines]
  Vector<A> value_bias;  // [C], summed over maps
  Vector<A> query_t;     // [C][lines]
  Vector<A> value_t;     // [lines][C]

  Projections(const RcuWeights& weights, const Sizes& s)
      : query(values_of<A>(weights.query_weight)),
        query_bias(values_of<A>(weights.query_bias)),
        value(s.channels * s.lines),
        value_bias(s.channels),
        query_t(s.channels * s.lines),
        value_t(s.lines * s.channels) {
    const A* from = values_of<A>(weights.value_weight);
    const A* bias = values_of<A>(weights.value_bias);
    const std::int64_t each = s.heads * s.map_channels;  // lines of one map
    for (std::int64_t k = 0; k < s.maps; ++k) {
      for (std::int64_t c = 0; c < s.channels; ++c) {
        value_bias[c] += bias[k * s.channels + c];
        for (std::int64_t i = 0; i < each; ++i) {
          const A weight = from[(k * s.channels + c) * each + i];
          value[c * s.lines + k * each + i] = weight;
          value_t[(k * each + i) * s.channels + c] = weight;
        }
      }
    }
    for (std::int64_t i = 0; i < s.lines; ++i) {
      for (std::int64_t c = 0; c < s.channels; ++c) {
        query_t[c * s.lines + i] = query[i * s.channels + c];
      }
    }
  }
};

// The scoring network of one patch; `hidden` [m] keeps the values before the rectifier.
template <typename A>
double score_of(const RcuWeights& weights, const Sizes& s, std::int64_t sample, const double* means,
                double* hidden) {
  const A* weight1 = values_of<A>(weights.score_weight1);
  const A* bias1 = values_of<A>(weights.score_bias1) + sample * s.hidden;
  const A* weight2 = values_of<A>(weights.score_weight2);
  const std::int64_t inputs = s.channels + s.map_lines;
  double logit = *values_of<A>(weights.score_bias2);
  for (std::int64_t m = 0; m < s.hidden; ++m) {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (std::int64_t i = 0; i < inputs; ++i) sum += weight1[m * inputs + i] * means[i];
    hidden[m] = sum + bias1[m];
    // Not max(0, .): NaN has to stay.
    logit += weight2[m] * (hidden[m] < 0 ? 0.0 : hidden[m]);
  }
  return 1 / (1 + std::exp(-logit));
}

// Whether a result is too large to stay in the cache.
inline bool is_large(const TensorView& view) {
  std::int64_t values = 1;
  for (int axis = 0; axis < view.axes; ++axis) values *= view.shape[axis];
  return values >= (4 << 20);
}

// Patches side by side that are packed together: so that runs of several cache lines are read and
// written (one line of each row alone takes a fifth longer), as far as half a megabyte of floats
// holds them.
template <typename T>
std::int64_t patches_at_once(const Sizes& s) {
  constexpr std::int64_t run = 256 / sizeof(T), values = 1 << 17;
  const std::int64_t wanted = (run + s.patch[2] - 1) / s.patch[2];
  const std::int64_t fitting = values / (s.patch_voxels() * s.channels);
  return std::max<std::int64_t>(1, std::min({wanted, fitting, s.grid[2]}));
}

// The most nodes that tables of one map may take: above it the direct sum is cheaper, which costs
// about four times as much for each query and key as the table for each key and node.
inline std::int64_t most_nodes(std::int64_t queries, std::int64_t heads) {
  return std::min<std::int64_t>(4 * heads * queries, 4096);
}

// Whether every patch is one thread's work; if not, all threads share one: it is too large for a
// thread's cache, or there are too few of them. A rule that does not depend on the number of
// threads, so neither do the bits.
inline bool patch_by_patch(const Sizes& s) {
  const std::int64_t values = s.patch_voxels() * s.channels;
  return values <= (1 << 18) && (s.batch * s.patches >= 16 || values <= (1 << 14));
}

// Hands out rows of one allocation; with a null base it only counts.
template <typename A>
struct Carver {
  A* base = nullptr;
  std::int64_t used = 0;

  A* take(std::int64_t count) {
    A* piece = base == nullptr ? nullptr : base + used;
    used += pitch_of(count);
    return piece;
  }
};

// One Space for each thread, in one allocation.
template <typename Space, typename A>
class Spaces {
 public:
  template <typename... Arguments>
  explicit Spaces(int threads, const Arguments&... arguments)
      : spaces_(std::max(threads, 1)), memory_(std::max(threads, 1), size_of(arguments...)) {
    for (std::size_t i = 0; i < spaces_.size(); ++i) {
      Carver<A> carver{memory_.piece(static_cast<std::int64_t>(i))};
      spaces_[i].carve(carver, arguments...);
    }
  }

  Space& operator[](int thread) const { return spaces_[thread]; }

 private:
  template <typename... Arguments>
  static std::int64_t size_of(const Arguments&... arguments) {
    Carver<A> counter;
    Space().carve(counter, arguments...);
    return counter.used;
  }

  mutable Vector<Space> spaces_;
  const Workspace<A> memory_;
};

// What the attention of a call has to give.
enum class Wanted { forward, backward, map_gradient };

// A thread's scratch for tables of all maps, built from chunks of up to `voxels` residual voxels.
template <typename A>
struct TableSpace {
  std::int64_t most;   // nodes of one map, all heads together
  Splines<A> splines;  // [K][most][4] each
  Weights<A> weights;

  void carve(Carver<A>& carver, const Sizes& s, std::int64_t voxels, std::int64_t nodes,
             Wanted wanted) {
    most = nodes;
    const std::int64_t size = s.maps * most * 4;
    splines.mean = carver.take(size);
    splines.variance = wanted == Wanted::forward ? nullptr : carver.take(size);
    splines.log = wanted == Wanted::map_gradient ? carver.take(size) : nullptr;
    weights = {carver.take(voxels), carver.take(voxels)};
  }

  // The splines from node `first` on.
  Splines<A> from(std::int64_t first) const {
    Splines<A> moved = splines;
    for (A** spline : {&moved.mean, &moved.variance, &moved.log}) {
      if (*spline != nullptr) *spline += 4 * first;
    }
    return moved;
  }
};

// Which nodes each head of a map gets: all heads share one table where that takes no more nodes
// than one each. `ranges` of a, one a head.
template <typename T>
void plan_nodes(const Range<ComputeType<T>>* ranges, std::int64_t heads, double least_r,
                double greatest_r, std::int64_t most, Vector<Nodes>& nodes, bool& shared) {
  const double widest = widest_step<T>();
  double least = ranges[0].least, greatest = ranges[0].greatest;
  std::int64_t apart = 0;
  bool all = true;
  nodes.assign(heads, Nodes{});
  shared = false;
  // Tables need the third moment; the direct sum does not, and overflows much later.
  const double range_r = greatest_r - least_r, cubed = range_r * range_r * range_r;
  constexpr double most_cubed = 1e-6 * std::numeric_limits<ComputeType<T>>::max();
  if (!(cubed < most_cubed)) return;
  for (std::int64_t h = 0; h < heads; ++h) {
    least = std::min<double>(least, ranges[h].least);
    greatest = std::max<double>(greatest, ranges[h].greatest);
    nodes[h] =
        nodes_for(ranges[h].least, ranges[h].greatest, least_r, greatest_r, widest, most - apart);
    apart += nodes[h].count;
    all = all && nodes[h].count > 0;
  }
  const Nodes together = nodes_for(least, greatest, least_r, greatest_r, widest, most);
  shared = together.count > 0 && (!all || together.count <= apart);
  if (shared) nodes.assign(1, together);
}

// The table over `nodes` from one chunk that holds all residual voxels of a patch.
template <typename A, int Kept>
Table<A> build_table(const A* r, std::int64_t voxels, const Nodes& nodes, const Weights<A>& weights,
                     Moments* moments, const Splines<A>& splines) {
  constexpr std::int64_t most = 1024;  // voxels that are summed in A: more would round too much
  const A about = static_cast<A>((nodes.least + nodes.greatest) / 2);
  node_factors(r, voxels, nodes, weights.factor);
  for (std::int64_t block = 0; block < nodes.blocks(); ++block) {
    double start[2] = {}, sums[block_nodes * moments_kept] = {}, own[block_nodes * moments_kept];
    start_block(r, voxels, nodes, block, about, weights.now, start);
    const A center = static_cast<A>(about + start[1] / start[0]);
    for (std::int64_t v = 0; v < voxels; v += most) {
      sum_block<A, Kept>(r + v, std::min(most, voxels - v), nodes, block, center,
                         {weights.now + v, weights.factor + v}, own);
      for (std::int64_t n = 0; n < nodes.in_block(block); ++n) {
        for (int m = 0; m < Kept; ++m) sums[n * moments_kept + m] += own[n * moments_kept + m];
      }
    }
    for (std::int64_t n = 0; n < nodes.in_block(block); ++n) {
      moments[block * block_nodes + n] = moments_of(sums + n * moments_kept, center);
    }
  }
  return table_of(nodes, moments, splines);
}

// What a thread needs to attend with one chunk of queries.
template <typename A>
struct Attention {
  Rows<A> a, mean;          // [lines]: queries and E
  Rows<A> reach, slope;     // [lines], backward: gradient of E and of the queries, before the score
  Rows<A> greatest, total;  // of the softmax: forward one row, backward one a head
  Rows<A> level, rest;      // one a head, backward
  TableSpace<A> space;
  Vector<Moments> moments;
  Vector<Nodes> nodes;
  Vector<Range<A>> ranges;
  Vector<Table<A>> tables;  // one a head
  Vector<A> centers;        // [K * c]: what keys of direct sums are relative to
  Vector<double> means, hidden;

  void carve(Carver<A>& carver, const Sizes& s, std::int64_t voxels, std::int64_t most,
             Wanted wanted) {
    const std::int64_t pitch = channel_pitch<A>(voxels);
    const bool backward = wanted != Wanted::forward;
    for (Rows<A>* rows : {&a, &mean}) *rows = {carver.take(s.lines * pitch), pitch};
    for (Rows<A>* rows : {&reach, &slope}) {
      *rows = {backward ? carver.take(s.lines * pitch) : nullptr, pitch};
    }
    const std::int64_t heads = backward ? s.maps * s.heads : 1;
    for (Rows<A>* rows : {&greatest, &total}) *rows = {carver.take(heads * pitch), pitch};
    for (Rows<A>* rows : {&level, &rest}) {
      *rows = {backward ? carver.take(heads * pitch) : nullptr, pitch};
    }
    space.carve(carver, s, voxels, most, wanted);
    if (carver.base == nullptr) return;
    moments.resize(most);
    nodes.reserve(s.heads);
    ranges.resize(s.heads);
    tables.resize(s.maps * s.heads);
    centers.resize(s.map_lines);
    means.resize(s.channels + s.map_lines);
    hidden.resize(s.hidden);
  }
};

// A table for every head, over the range of its queries; none where the direct sum is cheaper or a
// map has several channels. `r` [K] rows hold all residual voxels of the patch.
template <typename T, int Kept>
void build_tables(const Sizes& s, const Rows<ComputeType<T>>& r, std::int64_t voxels,
                  Attention<ComputeType<T>>& own) {
  using A = ComputeType<T>;
  if (s.map_channels > 1) return;
  const std::int64_t most = std::min(own.space.most, most_nodes(voxels, s.heads));
  for (std::int64_t k = 0; k < s.maps; ++k) {
    for (std::int64_t h = 0; h < s.heads; ++h) {
      own.ranges[h] = range_of(own.a[k * s.heads + h], voxels);
    }
    const Range<A> of_r = range_of(r[k], voxels);
    bool shared = false;
    plan_nodes<T>(own.ranges.data(), s.heads, of_r.least, of_r.greatest, most, own.nodes, shared);
    std::int64_t used = k * own.space.most;
    for (std::int64_t h = 0; h < s.heads; ++h) {
      Table<A>& table = own.tables[k * s.heads + h];
      const Nodes& nodes = own.nodes[shared ? 0 : h];
      if (shared && h > 0) {
        table = own.tables[k * s.heads];
      } else if (nodes.count == 0) {
        table = Table<A>();
      } else {
        table = build_table<A, Kept>(r[k], voxels, nodes, own.space.weights, own.moments.data(),
                                     own.space.from(used));
        used += nodes.count;
      }
    }
  }
}

// Makes the residual voxels of a map relative to the first one.
template <typename A>
void center_map(const Sizes& s, const Rows<A>& maps, std::int64_t k, std::int64_t voxels,
                Attention<A>& own) {
  const std::int64_t c = s.map_channels;
  A* center = own.centers.data() + k * c;
  for (std::int64_t i = 0; i < c; ++i) center[i] = maps[k * c + i][0];
  center_keys<A>({maps[k * c], maps.pitch}, c, voxels, center);
}

// The same for all maps of which heads sum over the voxels directly. Nothing that reads these as
// they are may come after it.
template <typename A>
void center_maps(const Sizes& s, const Rows<A>& maps, std::int64_t voxels, Attention<A>& own) {
  for (std::int64_t k = 0; k < s.maps; ++k) {
    bool direct = false;
    for (std::int64_t h = 0; h < s.heads; ++h) {
      direct = direct || own.tables[k * s.heads + h].last < 0;
    }
    if (direct) center_map(s, maps, k, voxels, own);
  }
}

// The rows of one map and head, and of one map.
template <typename A>
Rows<A> head_rows(const Rows<A>& rows, const Sizes& s, std::int64_t head) {
  return {rows[head * s.map_channels], rows.pitch};
}

template <typename A>
const A* center_of(const Attention<A>& own, const Sizes& s, std::int64_t head) {
  return own.centers.data() + head / s.heads * s.map_channels;
}

template <typename A>
Rows<const A> constant(const Rows<A>& rows) {
  return {rows.data, rows.pitch};
}

// The queries of a chunk: a = query_weight x + query_bias.
template <typename A, typename Between>
void project_queries(const Projections<A>& projections, const Sizes& s, const A* x,
                     std::int64_t pitch, std::int64_t voxels, const Rows<A>& a, Between between) {
  product<A>(
      projections.query, s.lines, s.channels, x, pitch, whole_vectors<A>(voxels),
      [&](std::int64_t line) { return projections.query_bias[line]; },
      [&](std::int64_t line, std::int64_t v, Vec<A> sum) { store(sum, a[line] + v); }, between);
}

// The means of a patch over its voxels, from packed rows.
template <typename A>
void means_of(const Sizes& s, const A* x, std::int64_t pitch, const Rows<A>& r, std::int64_t voxels,
              double* means) {
  const std::int64_t whole = whole_vectors<A>(voxels);
  const auto count = static_cast<double>(voxels);
  for (std::int64_t c = 0; c < s.channels; ++c) means[c] = row_sum(x + c * pitch, whole) / count;
  for (std::int64_t k = 0; k < s.map_lines; ++k)
    means[s.channels + k] = row_sum(r[k], whole) / count;
}

// E of a chunk of queries, every head. `each_keys(map, body)` calls body(Keys) for all residual
// voxels of the patch about own.centers, chunk by chunk.
template <typename A, typename EachKeys>
void expect(const Sizes& s, const Vector<Table<A>>& tables, std::int64_t voxels,
            const Attention<A>& own, EachKeys each_keys) {
  const std::int64_t whole = whole_vectors<A>(voxels);
  for (std::int64_t head = 0; head < s.maps * s.heads; ++head) {
    if (tables[head].last >= 0) {
      look_up<A, 1>(tables[head], own.a[head], whole, {tables[head].splines.mean}, {own.mean[head]},
                    tables[head].middle);
      continue;
    }
    const Softmax<A> state{own.greatest[0], own.total[0], head_rows(own.mean, s, head)};
    const Rows<const A> queries = constant(head_rows(own.a, s, head));
    start_softmax<A>(s.map_channels, whole, state);
    each_keys(head / s.heads, [&](const Keys<A>& keys) {
      add_keys<A>(queries, s.map_channels, whole, keys, state);
    });
    end_softmax<A>(s.map_channels, whole, state);
    add_center(state.mean, s.map_channels, whole, center_of(own, s, head));
  }
}

// x + score * (value E + bias) of a chunk, in place.
template <typename A, typename Between>
void add_attended(const Projections<A>& projections, const Sizes& s, const Rows<A>& mean,
                  double score, std::int64_t voxels, A* x, std::int64_t pitch, Between between) {
  const A factor = static_cast<A>(score);
  product<A>(
      projections.value.data(), s.channels, s.lines, mean.data, mean.pitch,
      whole_vectors<A>(voxels), [&](std::int64_t c) { return projections.value_bias[c]; },
      [&](std::int64_t c, std::int64_t v, Vec<A> sum) {
        A* at = x + c * pitch + v;
        store(load(at) + factor * sum, at);
      },
      between);
}

}  // namespace
}  // namespace grcsf
