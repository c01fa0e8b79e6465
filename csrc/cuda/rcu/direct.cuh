// SPDX-License-Identifier: Apache-2.0
// rcu on CUDA: attention as a direct sum over the residual voxels of a patch, for maps of several
// channels and where there is no table.
//
// A thread has one query and goes over all keys of the patch with online softmax, eight logits in
// registers at a time; the block stages the keys in shared memory, from which all threads read the
// same one. Channels of a map come in groups of G: those of the result that are more than a group
// take one more sweep each. Keys are taken relative to the patch's first voxel, so that an offset
// of the map costs no digits and a constant map is exact; logits are in units of log2. Sums are
// taken tile by tile, so that many small weights keep their digits.
//
// Hazard: the tile in shared memory is written between two barriers that all threads reach.
#pragma once

#include "cuda/rcu/product.cuh"
#include "cuda/rcu/table.cuh"

namespace grcsf {
namespace cuda {
namespace {

constexpr int logits_at_once = 8;

// Channels of a map in a group: as many as one instruction reads, or the only one.
template <typename A, bool many>
constexpr int channels_at_once = many ? full_pack<A> : 1;

template <typename A>
__device__ __forceinline__ constexpr A negative_infinity() {
  return -static_cast<A>(__builtin_huge_val());
}

// Keys first..first + tile of one map, [key][key_lines] relative to the patch's first voxel.
template <typename T, typename A = ComputeType<T>>
__device__ __forceinline__ void load_keys(const RcuProblem& m, const Box& box, int map, int first,
                                          const Shared<A>& keys) {
  const T* residual = static_cast<const T*>(m.residual) + map * m.map_channels * m.volume;
  sync_block();
  const int values = m.tile_keys * m.key_lines;
  for (int i = static_cast<int>(threadIdx.x); i < values; i += static_cast<int>(blockDim.x)) {
    const int channel = i / m.tile_keys, key = i % m.tile_keys;
    A value = 0;
    if (channel < m.map_channels && first + key < box.voxels) {
      const T* plane = residual + channel * m.volume;
      value = widened(plane[place_of(m, box, first + key).map]) - widened(plane[box.map]);
    }
    keys.set(key * m.key_lines + channel, value);
  }
  sync_block();
}

// One query of one head: pointers into this thread's columns.
template <typename A>
struct Query {
  const A *a, *reach;
  A* mean;   // E relative to the first voxel
  A* slope;  // the gradient of a
};

// Logits of eight keys from `key` on; `own` is the first group of a, times log2(e).
template <typename A, int G>
__device__ __forceinline__ void logits_of(const RcuProblem& m, const A* a, const A* own,
                                          const Shared<A>& keys, int key, int count, A* logits) {
#pragma unroll
  for (int j = 0; j < logits_at_once; ++j) logits[j] = 0;
  for (int group = 0; group < m.key_lines; group += G) {
    A part[G];
#pragma unroll
    for (int g = 0; g < G; ++g) {
      part[g] = own[g];
      if (group > 0) {
        part[g] = group + g < m.map_channels ? a[group + g] * static_cast<A>(rcu_log2e) : A(0);
      }
    }
#pragma unroll
    for (int j = 0; j < logits_at_once; ++j) {
      const auto r = keys.template get_pack<G>((key + j) * m.key_lines + group);
#pragma unroll
      for (int g = 0; g < G; ++g) logits[j] += part[g] * r[g];
    }
  }
  if (key + logits_at_once <= count) return;
#pragma unroll
  for (int j = 0; j < logits_at_once; ++j) {
    if (key + j >= count) logits[j] = negative_infinity<A>();
  }
}

template <typename A>
struct Softmax {
  A greatest = negative_infinity<A>(), total = 0;
};

// E of a query, relative to the patch's first voxel; returns what its weights are relative to.
template <typename T, bool many, typename A = ComputeType<T>>
__device__ __forceinline__ Softmax<A> expectation(const RcuProblem& m, const Box& box, int map,
                                                  bool exists, const Shared<A>& keys,
                                                  const Query<A>& query) {
  constexpr int G = channels_at_once<A, many>;
  A own[G] = {};
#pragma unroll
  for (int g = 0; g < G; ++g) {
    if (exists && g < m.map_channels) own[g] = query.a[g] * static_cast<A>(rcu_log2e);
  }
  Softmax<A> state;
  for (int out = 0; out < m.map_channels; out += G) {
    A greatest = negative_infinity<A>(), total = 0, mean[G] = {};
    for (int first = 0; first < box.voxels; first += m.tile_keys) {
      load_keys<T>(m, box, map, first, keys);
      if (!exists) continue;
      const int count = least(m.tile_keys, box.voxels - first);
      A part = 0, part_mean[G] = {};
      for (int key = 0; key < count; key += logits_at_once) {
        A logits[logits_at_once];
        logits_of<A, G>(m, query.a, own, keys, key, count, logits);
        A top = greatest;
#pragma unroll
        for (int j = 0; j < logits_at_once; ++j) top = cuda::greatest(top, logits[j]);
        if (top > greatest) {
          const A fade = exp2_fast(greatest - top);
          greatest = top;
          total *= fade;
          part *= fade;
#pragma unroll
          for (int g = 0; g < G; ++g) {
            mean[g] *= fade;
            part_mean[g] *= fade;
          }
        }
#pragma unroll
        for (int j = 0; j < logits_at_once; ++j) {
          const A weight = exp2_fast(logits[j] - greatest);
          const auto r = keys.template get_pack<G>((key + j) * m.key_lines + out);
          part += weight;
#pragma unroll
          for (int g = 0; g < G; ++g) part_mean[g] += weight * r[g];
        }
      }
      total += part;
#pragma unroll
      for (int g = 0; g < G; ++g) mean[g] += part_mean[g];
    }
    state.greatest = greatest;
    state.total = total;
    if (!exists) continue;
#pragma unroll
    for (int g = 0; g < G; ++g) {
      if (out + g < m.map_channels) query.mean[out + g] = mean[g] / total;
    }
  }
  return state;
}

// The gradient of a query after expectation(): sum_j p_j (e . (r_j - E)) (r_j - E). Differences are
// taken for each key, so that nothing large cancels.
template <typename T, bool many, typename A = ComputeType<T>>
__device__ __forceinline__ void slope(const RcuProblem& m, const Box& box, int map, bool exists,
                                      const Shared<A>& keys, const Softmax<A>& state,
                                      const Query<A>& query) {
  constexpr int G = channels_at_once<A, many>;
  A own[G] = {};
#pragma unroll
  for (int g = 0; g < G; ++g) {
    if (exists && g < m.map_channels) own[g] = query.a[g] * static_cast<A>(rcu_log2e);
  }
  for (int out = 0; out < m.map_channels; out += G) {
    A sums[G] = {};
    for (int first = 0; first < box.voxels; first += m.tile_keys) {
      load_keys<T>(m, box, map, first, keys);
      if (!exists) continue;
      const int count = least(m.tile_keys, box.voxels - first);
      A parts[G] = {};
      for (int key = 0; key < count; key += logits_at_once) {
        A logits[logits_at_once], pull[logits_at_once] = {};
        logits_of<A, G>(m, query.a, own, keys, key, count, logits);
        for (int group = 0; group < m.map_channels; group += G) {
          A reach[G], mean[G];
#pragma unroll
          for (int g = 0; g < G; ++g) {
            const bool there = group + g < m.map_channels;
            reach[g] = there ? query.reach[group + g] : A(0);
            mean[g] = there ? query.mean[group + g] : A(0);
          }
#pragma unroll
          for (int j = 0; j < logits_at_once; ++j) {
            const auto r = keys.template get_pack<G>((key + j) * m.key_lines + group);
#pragma unroll
            for (int g = 0; g < G; ++g) pull[j] += reach[g] * (r[g] - mean[g]);
          }
        }
        A mean[G];
#pragma unroll
        for (int g = 0; g < G; ++g) {
          mean[g] = out + g < m.map_channels ? query.mean[out + g] : A(0);
        }
#pragma unroll
        for (int j = 0; j < logits_at_once; ++j) {
          const A weight = exp2_fast(logits[j] - state.greatest) * pull[j];
          const auto r = keys.template get_pack<G>((key + j) * m.key_lines + out);
#pragma unroll
          for (int g = 0; g < G; ++g) parts[g] += weight * (r[g] - mean[g]);
        }
      }
#pragma unroll
      for (int g = 0; g < G; ++g) sums[g] += parts[g];
    }
    if (!exists) continue;
#pragma unroll
    for (int g = 0; g < G; ++g) {
      if (out + g < m.map_channels) query.slope[out + g] = sums[g] / state.total;
    }
  }
}

// E of all lines of this thread's voxel into its column of means; with `backward` the gradients of
// its queries into that of slopes instead, from what reaches E.
template <typename T, bool many, bool backward, typename A = ComputeType<T>>
__device__ __forceinline__ void attend(const RcuProblem& m, const Unit& unit, bool exists,
                                       const Shared<A>& keys) {
  const int thread = static_cast<int>(threadIdx.x);
  const A *a = column_of<A>(m, queries, thread), *reach = column_of<A>(m, reaches, thread);
  A *mean = column_of<A>(m, means, thread), *found = column_of<A>(m, slopes, thread);
  for (int map = 0; map < m.maps; ++map) {
    if constexpr (!many && !std::is_same_v<A, double>) {
      const std::int64_t table = unit.patch * m.maps + map;
      if (m.most_nodes > 0 && static_cast<const RcuPlan<A>*>(m.plans)[table].nodes > 0) {
        const RcuPlan<A> plan = static_cast<const RcuPlan<A>*>(m.plans)[table];
        const A* nodes = static_cast<const A*>(m.tables) + table * m.most_nodes * rcu_table_fields;
        for (int line = map * m.heads; exists && line < (map + 1) * m.heads; ++line) {
          const Interval<A> at(plan, a[line]);
          const auto left = load_pack<A, rcu_table_fields>(nodes + at.node * rcu_table_fields);
          const auto right =
              load_pack<A, rcu_table_fields>(nodes + (at.node + 1) * rcu_table_fields);
          if (backward) {
            found[line] = reach[line] * variance_between(left, right, plan.step, at.fraction);
          } else {
            mean[line] = mean_between(left, right, plan.step, at.fraction);
          }
        }
        continue;
      }
    }
    const T* residual = static_cast<const T*>(m.residual) + unit.box.map;
    for (int head = map * m.heads; head < (map + 1) * m.heads; ++head) {
      const int line = head * m.map_channels;
      const Query<A> query{a + line, reach + line, mean + line, found + line};
      const Softmax<A> state = expectation<T, many>(m, unit.box, map, exists, keys, query);
      if constexpr (backward) {
        slope<T, many>(m, unit.box, map, exists, keys, state, query);
      } else {
        for (int c = 0; exists && c < m.map_channels; ++c) {
          mean[line + c] += widened(residual[(map * m.map_channels + c) * m.volume]);
        }
      }
    }
  }
}

}  // namespace
}  // namespace cuda
}  // namespace grcsf
