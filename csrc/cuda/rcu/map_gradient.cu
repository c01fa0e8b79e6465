// SPDX-License-Identifier: Apache-2.0
// rcu on CUDA: the gradient of the residual maps, for every key j of a patch
//
//   sum over heads and queries i of  p_ij ((e_i . (r_j - E_i)) a_i + e_i)
//
// by direct sums, so work grows with the square of the voxels of a patch. A first kernel keeps what
// keys need of a query and head, 2 c + 2 numbers; in the second one a thread has one key and goes
// over the queries, which the block stages in shared memory.
//
// What is kept would be larger than the data itself, so patches are taken some at a time, in the
// order of one stream: at least one patch, and no more than fits `kept_bytes`.
// Hazards: a tile of queries in shared memory is written between two barriers.
#include "cuda/rcu/direct.cuh"

namespace grcsf {
namespace cuda {
namespace {

// Of queries that are kept.
inline std::int64_t kept_bytes() { return from_size(64 << 20, 64 << 10); }
constexpr int values_staged = 2048;

// The patches of one launch. A query has [heads of all maps][2 * key_lines + 2]: a in units of
// log2, e, log2 of the sum of weights, e . E; all relative to the patch's first voxel.
struct Part {
  std::int64_t first, patches;
  void* kept;
  const void* grad_means;
  int size, tile;  // values of a query and head, queries in shared memory
};

template <typename A>
__device__ __forceinline__ A* kept_of(const RcuProblem& m, const Part& part, const Unit& unit,
                                      int head, int query) {
  const std::int64_t voxels = std::int64_t(m.patch_d) * m.patch_h * m.patch_w;
  const std::int64_t own = (unit.patch - part.first) * m.maps * m.heads + head;
  return static_cast<A*>(part.kept) + (own * voxels + query) * part.size;
}

template <typename T, bool many>
__global__ void __launch_bounds__(rcu_most_threads, rcu_blocks<T>)
    rcu_keep_kernel(const RcuProblem m, const Part part) {
  using A = ComputeType<T>;
  SharedArena arena;
  const auto stage = arena.take<A>(stage_values);
  const auto keys = arena.take<A>(m.tile_keys * m.key_lines);
  const int thread = static_cast<int>(threadIdx.x);
  A *a = column_of<A>(m, queries, thread), *reach = column_of<A>(m, reaches, thread);
  A* mean = column_of<A>(m, means, thread);
  const std::int64_t last = (part.first + part.patches) * m.pieces;
  for (std::int64_t index = part.first * m.pieces + blockIdx.x; index < last; index += gridDim.x) {
    const Unit unit = unit_of(m, index);
    for (int tile = unit.begin; tile < unit.end; tile += m.threads) {
      const bool exists = tile + thread < unit.end;
      const Place place = place_of(m, unit.box, exists ? tile + thread : tile);
      project<false>(m, static_cast<const T*>(m.x) + place.x, exists, stage, a);
      project<true>(m, static_cast<const T*>(m.grad_out) + place.x, exists, stage, reach);
      for (int head = 0; head < m.maps * m.heads; ++head) {
        const int line = head * m.map_channels;
        const Query<A> query{a + line, reach + line, mean + line, nullptr};
        const auto state = expectation<T, many>(m, unit.box, head / m.heads, exists, keys, query);
        if (!exists) continue;
        A* kept = kept_of<A>(m, part, unit, head, tile + thread);
        A level = 0;
        for (int c = 0; c < m.key_lines; ++c) {
          const bool there = c < m.map_channels;
          kept[c] = there ? query.a[c] * static_cast<A>(rcu_log2e) : A(0);
          kept[m.key_lines + c] = there ? query.reach[c] : A(0);
          if (there) level += query.reach[c] * query.mean[c];
        }
        kept[2 * m.key_lines] = state.greatest + static_cast<A>(log2(state.total));
        kept[2 * m.key_lines + 1] = level;
      }
    }
  }
}

// What one query gives one key: its group `out` of channels.
template <typename A, int G>
__device__ __forceinline__ void add_query(const RcuProblem& m, const Shared<A>& query, const A* key,
                                          const A* own, int out, A* sums) {
  A logit = 0, pull = 0;
  for (int group = 0; group < m.key_lines; group += G) {
    const auto a = query.template get_pack<G>(group);
    const auto reach = query.template get_pack<G>(m.key_lines + group);
#pragma unroll
    for (int g = 0; g < G; ++g) {
      const A r = group == 0 ? own[g] : key[group + g];
      logit += a[g] * r;
      pull += reach[g] * r;
    }
  }
  const A weight = exp2_fast(logit - query.get(2 * m.key_lines));
  // a is in units of log2 here.
  const A through = weight * (pull - query.get(2 * m.key_lines + 1)) / static_cast<A>(rcu_log2e);
  const auto a = query.template get_pack<G>(out);
  const auto reach = query.template get_pack<G>(m.key_lines + out);
#pragma unroll
  for (int g = 0; g < G; ++g) sums[g] += through * a[g] + weight * reach[g];
}

// A block takes a piece of the keys of one patch and map.
template <typename T, bool many>
__global__ void __launch_bounds__(rcu_most_threads, rcu_blocks<T>)
    rcu_map_kernel(const RcuProblem m, const Part part) {
  using A = ComputeType<T>;
  constexpr int G = channels_at_once<A, many>;
  SharedArena arena;
  const auto staged = arena.take<A>(part.tile * part.size);
  const int thread = static_cast<int>(threadIdx.x);
  A* key = column_of<A>(m, queries, thread);
  const T* residual = static_cast<const T*>(m.residual);
  const std::int64_t last = (part.first + part.patches) * m.pieces * m.maps;
  for (std::int64_t index = part.first * m.pieces * m.maps + blockIdx.x; index < last;
       index += gridDim.x) {
    const Unit unit = unit_of(m, index / m.maps);
    const int map = static_cast<int>(index % m.maps), voxels = unit.box.voxels;
    const A score = static_cast<const A*>(m.scores)[unit.patch];
    const A* of_means = static_cast<const A*>(part.grad_means) + unit.patch * m.inputs +
                        m.channels + map * m.map_channels;
    for (int tile = unit.begin; tile < unit.end; tile += m.threads) {
      const bool exists = tile + thread < unit.end;
      const std::int64_t place = place_of(m, unit.box, exists ? tile + thread : tile).map;
      const std::int64_t plane = map * m.map_channels * m.volume;
      A own[G] = {};
      for (int c = 0; exists && c < m.key_lines; ++c) {
        const std::int64_t at = plane + c * m.volume;
        key[c] = c < m.map_channels
                     ? widened(residual[place + at]) - widened(residual[unit.box.map + at])
                     : A(0);
      }
#pragma unroll
      for (int g = 0; g < G; ++g) own[g] = exists ? key[g] : A(0);
      for (int out = 0; out < m.map_channels; out += G) {
        A sums[G] = {};
        for (int head = map * m.heads; head < (map + 1) * m.heads; ++head) {
          for (int first = 0; first < voxels; first += part.tile) {
            const int count = least(part.tile, voxels - first);
            const A* from = kept_of<A>(m, part, unit, head, first);
            sync_block();
            for (int i = thread; i < count * part.size; i += m.threads) staged.set(i, from[i]);
            sync_block();
            if (!exists) continue;
            A parts[G] = {};
            for (int query = 0; query < count; ++query) {
              add_query<A, G>(m, staged.from(query * part.size), key, own, out, parts);
            }
#pragma unroll
            for (int g = 0; g < G; ++g) sums[g] += parts[g];
          }
        }
        if (!exists) continue;
#pragma unroll
        for (int g = 0; g < G; ++g) {
          const int c = out + g;
          if (c >= m.map_channels) continue;
          static_cast<T*>(m.grad_residual)[place + plane + c * m.volume] =
              narrowed<T>(score * sums[g] + of_means[c]);
        }
      }
    }
  }
}

template <typename T>
void map_gradient(const RcuArguments& arguments, const Queue& queue, const RcuProblem& m,
                  const void* grad_means) {
  using A = ComputeType<T>;
  const bool many = m.map_channels > 1;
  const int pack = many ? full_pack<A> : 2;  // queries begin at multiples of a pack
  Part part{};
  part.grad_means = grad_means;
  part.size = static_cast<int>(blocks_for(2 * m.key_lines + 2, pack)) * pack;
  part.tile = greatest(1, values_staged / part.size);
  const std::int64_t voxels = std::int64_t(m.patch_d) * m.patch_h * m.patch_w;
  const std::int64_t of_patch = voxels * m.maps * m.heads * part.size;
  const std::int64_t at_once = least(
      m.patches,
      greatest<std::int64_t>(1, kept_bytes() / static_cast<std::int64_t>(sizeof(A)) / of_patch));
  part.kept = arguments.cuda.take<A>(at_once * of_patch);
  const auto keep = many ? rcu_keep_kernel<T, true> : rcu_keep_kernel<T, false>;
  const auto map = many ? rcu_map_kernel<T, true> : rcu_map_kernel<T, false>;
  for (part.first = 0; part.first < m.patches; part.first += at_once) {
    part.patches = least(at_once, m.patches - part.first);
    const std::int64_t units = part.patches * m.pieces;
    queue.launch("rcu_keep", keep, least<std::int64_t>(m.slots, units), m.threads,
                 shared_bytes<A>(stage_values) + shared_bytes<A>(m.tile_keys * m.key_lines), m,
                 part);
    queue.launch("rcu_map", map, least<std::int64_t>(m.slots, units * m.maps), m.threads,
                 shared_bytes<A>(part.tile * part.size), m, part);
  }
}

}  // namespace

void rcu_map_gradient(const RcuArguments& arguments, const Queue& queue, const RcuProblem& problem,
                      const void* grad_means) {
  for_dtype(arguments.x.dtype, [&](auto type) {
    map_gradient<typename decltype(type)::type>(arguments, queue, problem, grad_means);
  });
}

}  // namespace cuda
}  // namespace grcsf
