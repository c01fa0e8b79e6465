// SPDX-License-Identifier: Apache-2.0
// rcu on the CPU: attention as a direct sum over residual voxels, for maps of several channels and
// where a table would not pay. Online softmax, eight keys at a time: no matrix is stored.
//
// Queries lie across the lanes of a vector and keys are broadcast, so that nothing is reduced
// across lanes and the order of every sum is fixed. Rows are packed: `c` rows a head, `pitch`
// apart. Keys are taken relative to the first voxel of the patch, so that an offset of the map
// costs no digits of the logits and a constant map is exact.
#pragma once

#include <algorithm>

#include "cpu/simd/product.h"
#include "cpu/simd/simd.h"

namespace grcsf {
namespace {

constexpr int keys_at_once = 8;
constexpr std::int64_t keys_summed = 256;

// Rows of one map and head.
template <typename A>
struct Rows {
  A* data;
  std::int64_t pitch;

  A* operator[](std::int64_t row) const { return data + row * pitch; }
};

// The softmax of the queries so far: the greatest logit, sum exp(logit - greatest), and E, relative
// to the center of the keys, as a sum.
//
// Backward also has `level`, reach . E for the gradient `reach` of E, and `rest`: what the rounded
// level is short of sum p (reach . r). Gradients hold p_j (reach . r_j - level), which is next to
// nothing where one key has nearly all the weight, and would be all rounding without it.
template <typename A>
struct Softmax {
  A* greatest;
  A* total;
  Rows<A> mean;
  A* level = nullptr;
  A* rest = nullptr;
};

// Residual voxels, about their center: `count` of them in c rows.
template <typename A>
struct Keys {
  Rows<const A> rows;
  std::int64_t count;
};

template <typename A>
void start_softmax(std::int64_t channels, std::int64_t voxels, const Softmax<A>& state) {
  const std::int64_t whole = (voxels + lanes<A> - 1) / lanes<A> * lanes<A>;
  for (std::int64_t v = 0; v < whole; ++v) {
    state.greatest[v] = -static_cast<A>(__builtin_inf());
    state.total[v] = 0;
  }
  for (std::int64_t c = 0; c < channels; ++c) {
    for (std::int64_t v = 0; v < whole; ++v) state.mean[c][v] = 0;
  }
}

// The logits of one vector of queries against N keys from `key` on.
template <typename A, int N>
inline void logits(const Rows<const A>& own, const Rows<const A>& other, std::int64_t channels,
                   std::int64_t v, std::int64_t key, Vec<A> out[N]) {
  for (int j = 0; j < N; ++j) out[j] = Vec<A>{};
  for (std::int64_t c = 0; c < channels; ++c) {
    const Vec<A> mine = load(own[c] + v);
    for (int j = 0; j < N; ++j) out[j] += mine * other[c][key + j];
  }
}

// Calls body(first, Count) for groups of eight of `count`, then for single ones.
template <typename Body>
inline void by_keys(std::int64_t count, Body body) {
  std::int64_t first = 0;
  for (; first + keys_at_once <= count; first += keys_at_once) body(first, Count<keys_at_once>());
  for (; first < count; ++first) body(first, Count<1>());
}

// Calls body(first, count) for pieces of up to 256 of `count`.
template <typename Body>
inline void by_pieces(std::int64_t count, Body body) {
  for (std::int64_t first = 0; first < count; first += keys_summed) {
    body(first, std::min(keys_summed, count - first));
  }
}

// The sum over `count` keys from `first` on of weight[j] * row[first + j].
template <typename A>
inline Vec<A> weighted_sum(const Vec<A>* weight, const A* row, std::int64_t first,
                           std::int64_t count) {
  Vec<A> sum[4] = {Vec<A>{}, Vec<A>{}, Vec<A>{}, Vec<A>{}};  // four chains: additions take time
  std::int64_t j = 0;
  for (; j + 4 <= count; j += 4) {
    for (int i = 0; i < 4; ++i) sum[i] += weight[j + i] * row[first + j + i];
  }
  for (; j < count; ++j) sum[0] += weight[j] * row[first + j];
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// Takes more keys into the softmax of `queries`.
template <typename A>
void add_keys(const Rows<const A>& queries, std::int64_t channels, std::int64_t voxels,
              const Keys<A>& keys, const Softmax<A>& state) {
  for (std::int64_t v = 0; v < voxels; v += lanes<A>) {
    by_pieces(keys.count, [&](std::int64_t first, std::int64_t count) {
      Vec<A> weight[keys_summed];
      const Vec<A> before = load(state.greatest + v);
      Vec<A> greatest = before;
      by_keys(count, [&](std::int64_t key, auto many) {
        constexpr int N = decltype(many)::value;
        logits<A, N>(queries, keys.rows, channels, v, first + key, weight + key);
        for (int j = 0; j < N; ++j) greatest = at_least(weight[key + j], greatest);
      });
      Vec<A> total{};
      for (std::int64_t j = 0; j < count; ++j) {
        weight[j] = exp_of<A>(weight[j] - greatest);
        total += weight[j];
      }
      const Vec<A> fade = exp_of<A>(before - greatest);
      store(greatest, state.greatest + v);
      store(load(state.total + v) * fade + total, state.total + v);
      for (std::int64_t c = 0; c < channels; ++c) {
        const Vec<A> sum = weighted_sum<A>(weight, keys.rows[c], first, count);
        store(load(state.mean[c] + v) * fade + sum, state.mean[c] + v);
      }
    });
  }
}

// Subtracts the value of its center from each of `channels` rows of keys.
template <typename A>
void center_keys(const Rows<A>& rows, std::int64_t channels, std::int64_t count, const A* center) {
  for (std::int64_t c = 0; c < channels; ++c) {
    A* row = rows[c];
    const A own = center[c];
    for (std::int64_t v = 0; v < count; ++v) row[v] -= own;
  }
}

// Makes E of a head absolute.
template <typename A>
void add_center(const Rows<A>& mean, std::int64_t channels, std::int64_t voxels, const A* center) {
  for (std::int64_t c = 0; c < channels; ++c) {
    const A own = center[c];
    for (std::int64_t v = 0; v < voxels; v += lanes<A>) {
      store(load(mean[c] + v) + own, mean[c] + v);
    }
  }
}

// Turns sums into E, and totals into their inverses.
template <typename A>
void end_softmax(std::int64_t channels, std::int64_t voxels, const Softmax<A>& state) {
  for (std::int64_t v = 0; v < voxels; v += lanes<A>) {
    const Vec<A> inverse = A(1) / load(state.total + v);
    store(inverse, state.total + v);
    for (std::int64_t c = 0; c < channels; ++c) {
      store(load(state.mean[c] + v) * inverse, state.mean[c] + v);
    }
  }
}

// The sum over channels of grad E * E, one value a query.
template <typename A>
void level_of(const Rows<const A>& grad, const Rows<const A>& mean, std::int64_t channels,
              std::int64_t voxels, A* level) {
  for (std::int64_t v = 0; v < voxels; v += lanes<A>) {
    Vec<A> sum{};
    for (std::int64_t c = 0; c < channels; ++c) sum += load(grad[c] + v) * load(mean[c] + v);
    store(sum, level + v);
  }
}

// Adds what a chunk of keys gives to the gradient of the queries, where `out` has rows:
// sum over j of p_j (reach . r_j - level) (r_j - E), p from the finished softmax; and to its rest.
// Without E the sum would be the same but for the rounding of the level.
template <typename A>
void add_query_gradient(const Rows<const A>& queries, const Rows<const A>& grad,
                        std::int64_t channels, std::int64_t voxels, const Keys<A>& keys,
                        const Softmax<A>& state, const Rows<A>& out) {
  for (std::int64_t v = 0; v < voxels; v += lanes<A>) {
    const Vec<A> greatest = load(state.greatest + v), inverse = load(state.total + v);
    const Vec<A> level = load(state.level + v);
    by_pieces(keys.count, [&](std::int64_t first, std::int64_t count) {
      Vec<A> weight[keys_summed], total{};
      by_keys(count, [&](std::int64_t key, auto many) {
        constexpr int N = decltype(many)::value;
        Vec<A> reach[N];
        Vec<A>* own = weight + key;
        logits<A, N>(queries, keys.rows, channels, v, first + key, own);
        logits<A, N>(grad, keys.rows, channels, v, first + key, reach);
        for (int j = 0; j < N; ++j) {
          own[j] = exp_of<A>(own[j] - greatest) * inverse * (reach[j] - level);
          total += own[j];
        }
      });
      store(load(state.rest + v) + total, state.rest + v);
      for (std::int64_t c = 0; c < channels && out.data != nullptr; ++c) {
        const Vec<A> sum = weighted_sum<A>(weight, keys.rows[c], first, count);
        store(load(out[c] + v) + (sum - total * load(state.mean[c] + v)), out[c] + v);
      }
    });
  }
}

// Adds what a chunk of queries gives to the gradient of the keys, which lie across the lanes here:
// sum over i of p_i (reach_i + (reach_i . r - level_i - rest_i) a_i).
template <typename A>
void add_key_gradient(const Rows<const A>& queries, const Rows<const A>& grad,
                      std::int64_t channels, std::int64_t count, const Softmax<A>& state,
                      const Rows<const A>& keys, std::int64_t voxels, const Rows<A>& out) {
  for (std::int64_t v = 0; v < voxels; v += lanes<A>) {
    by_pieces(count, [&](std::int64_t first, std::int64_t part) {
      Vec<A> weight[keys_summed], reach[keys_summed];
      by_keys(part, [&](std::int64_t query, auto many) {
        constexpr int N = decltype(many)::value;
        logits<A, N>(keys, queries, channels, v, first + query, weight + query);
        logits<A, N>(keys, grad, channels, v, first + query, reach + query);
        for (std::int64_t i = query; i < query + N; ++i) {
          const std::int64_t at = first + i;
          weight[i] = exp_of<A>(weight[i] - state.greatest[at]) * state.total[at];
          reach[i] = weight[i] * ((reach[i] - state.level[at]) - state.rest[at]);
        }
      });
      for (std::int64_t c = 0; c < channels; ++c) {
        const Vec<A> sum = weighted_sum<A>(weight, grad[c], first, part) +
                           weighted_sum<A>(reach, queries[c], first, part);
        store(load(out[c] + v) + sum, out[c] + v);
      }
    });
  }
}

}  // namespace
}  // namespace grcsf
