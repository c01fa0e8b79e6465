// SPDX-License-Identifier: Apache-2.0
// rcu on CUDA: what is known of a patch before its voxels are gone through with it: means, scores,
// ranges of queries and maps, and the tables of its attention.
//
// In launches that follow each other: a survey of every piece; for each patch the sum of its
// pieces, its score and how many nodes its tables have, which the host never sees; sums at the
// nodes, by groups of four nodes and splits of the voxels; the sum of the splits.
//
// Bytes: x once, a map once and once more for its table, from cache where patches are small.
// Hazards: every value of scratch is written by one thread of one block.
#include "cuda/rcu/product.cuh"
#include "cuda/rcu/table.cuh"

namespace grcsf {
namespace cuda {
namespace {

constexpr int small_threads = 128;  // of a block for a patch
constexpr int table_threads = 256;

// A survey: least and greatest query of each map, least and greatest value of each, then sums of
// channels and of map lines.
__device__ __forceinline__ int survey_size(const RcuProblem& m) { return 4 * m.maps + m.inputs; }

template <typename A>
__device__ __forceinline__ constexpr A infinity() {
  return static_cast<A>(__builtin_huge_val());
}

// The sum over the voxels of a unit, in all lanes of the warp.
template <typename T, typename A = ComputeType<T>>
__device__ __forceinline__ A sum_of_line(const RcuProblem& m, const Unit& unit, int line) {
  const bool of_x = line < m.channels;
  const T* data = of_x ? static_cast<const T*>(m.x) + line * m.stride_c
                       : static_cast<const T*>(m.residual) + (line - m.channels) * m.volume;
  A sum = 0;
#pragma unroll 4
  for (int v = unit.begin + lane_index(); v < unit.end; v += warp_size) {
    const Place place = place_of(m, unit.box, v);
    sum += widened(data[of_x ? place.x : place.map]);
  }
  return warp_sum(sum);
}

template <typename T, typename A = ComputeType<T>>
__device__ __forceinline__ void range_of_map(const RcuProblem& m, const Unit& unit, int map,
                                             A* survey) {
  const T* data = static_cast<const T*>(m.residual) + map * m.volume;
  A low = infinity<A>(), high = -infinity<A>();
  for (int v = unit.begin + lane_index(); v < unit.end; v += warp_size) {
    const A value = widened(data[place_of(m, unit.box, v).map]);
    low = least(low, value);
    high = greatest(high, value);
  }
  low = warp_least(low);
  high = warp_greatest(high);
  if (lane_index() != 0) return;
  survey[2 * m.maps + map] = low;
  survey[3 * m.maps + map] = high;
}

// `ranges` [warps][2 * maps]: those of each warp so far.
template <typename T, typename A = ComputeType<T>>
__device__ __forceinline__ void range_of_queries(const RcuProblem& m, const Unit& unit,
                                                 const Shared<A>& stage, const Shared<A>& ranges,
                                                 A* survey) {
  const int thread = static_cast<int>(threadIdx.x), warps = m.threads / warp_size;
  A* column = column_of<A>(m, queries, thread);
  const auto own = ranges.from(warp_index() * 2 * m.maps);
  for (int tile = unit.begin; tile < unit.end; tile += m.threads) {
    const bool exists = tile + thread < unit.end;
    const Place place = place_of(m, unit.box, exists ? tile + thread : tile);
    project<false>(m, static_cast<const T*>(m.x) + place.x, exists, stage, column);
    for (int map = 0; map < m.maps; ++map) {
      A low = infinity<A>(), high = -infinity<A>();
      for (int line = map * m.heads; exists && line < (map + 1) * m.heads; ++line) {
        low = least(low, column[line]);
        high = greatest(high, column[line]);
      }
      low = warp_least(low);
      high = warp_greatest(high);
      if (lane_index() != 0) continue;
      const bool first = tile == unit.begin;
      own.set(2 * map, first ? low : least(low, own.get(2 * map)));
      own.set(2 * map + 1, first ? high : greatest(high, own.get(2 * map + 1)));
    }
  }
  sync_block();
  for (int map = thread; map < m.maps && unit.end > unit.begin; map += m.threads) {
    A low = infinity<A>(), high = -infinity<A>();
    for (int warp = 0; warp < warps; ++warp) {
      low = least(low, ranges.get((warp * m.maps + map) * 2));
      high = greatest(high, ranges.get((warp * m.maps + map) * 2 + 1));
    }
    survey[map] = low;
    survey[m.maps + map] = high;
  }
  sync_block();
}

template <typename T>
__global__ void __launch_bounds__(rcu_most_threads, rcu_blocks<T>)
    rcu_survey_kernel(const RcuProblem m) {
  using A = ComputeType<T>;
  SharedArena arena;
  const auto stage = arena.take<A>(stage_values);
  const auto ranges = arena.take<A>(m.threads / warp_size * 2 * m.maps);
  const int warps = m.threads / warp_size;
  for (std::int64_t index = blockIdx.x; index < m.units; index += m.slots) {
    const Unit unit = unit_of(m, index);
    A* survey = static_cast<A*>(m.surveys) + index * survey_size(m);
    for (int line = warp_index(); line < m.inputs; line += warps) {
      const A sum = sum_of_line<T>(m, unit, line);
      if (lane_index() == 0) survey[4 * m.maps + line] = sum;
    }
    if (m.most_nodes == 0) continue;
    for (int map = warp_index(); map < m.maps; map += warps) range_of_map<T>(m, unit, map, survey);
    range_of_queries<T>(m, unit, stage, ranges, survey);
  }
}

// The least of a survey's value over the pieces of a patch, or the greatest.
template <bool of_greatest, typename A>
__device__ __forceinline__ A extreme(const RcuProblem& m, const A* surveys, int pieces, int value) {
  A found = of_greatest ? -infinity<A>() : infinity<A>();
  for (int piece = lane_index(); piece < pieces; piece += warp_size) {
    const A own = surveys[std::int64_t(piece) * survey_size(m) + value];
    found = of_greatest ? greatest(found, own) : least(found, own);
  }
  return of_greatest ? warp_greatest(found) : warp_least(found);
}

// A block a patch. Pieces of edge patches that have no voxel are left out.
template <typename T>
__global__ void __launch_bounds__(small_threads)
    rcu_merge_kernel(const RcuProblem m, bool writes_scores) {
  using A = ComputeType<T>;
  constexpr int warps = small_threads / warp_size;
  SharedArena arena;
  const auto averages = arena.take<A>(m.inputs);
  const auto units = arena.take<A>(m.hidden);
  const std::int64_t patch = blockIdx.x;
  const Box box = box_of(m, patch);
  const int pieces = static_cast<int>((box.voxels + std::int64_t(m.tiles) * m.threads - 1) /
                                      (m.tiles * m.threads));
  const A* surveys =
      static_cast<const A*>(m.surveys) + patch * m.pieces * std::int64_t(survey_size(m));
  for (int input = warp_index(); input < m.inputs; input += warps) {
    A sum = 0;
    for (int piece = lane_index(); piece < pieces; piece += warp_size) {
      sum += surveys[std::int64_t(piece) * survey_size(m) + 4 * m.maps + input];
    }
    const A mean = warp_sum(sum) / static_cast<A>(box.voxels);
    if (lane_index() != 0) continue;
    averages.set(input, mean);
    static_cast<A*>(m.means)[patch * m.inputs + input] = mean;
  }
  sync_block();
  for (int map = warp_index(); m.most_nodes > 0 && map < m.maps; map += warps) {
    const auto plan = plan_of<T, A>(extreme<false>(m, surveys, pieces, map),
                                    extreme<true>(m, surveys, pieces, m.maps + map),
                                    extreme<false>(m, surveys, pieces, 2 * m.maps + map),
                                    extreme<true>(m, surveys, pieces, 3 * m.maps + map),
                                    averages.get(m.channels + map), m.most_nodes);
    if (lane_index() == 0) static_cast<RcuPlan<A>*>(m.plans)[patch * m.maps + map] = plan;
  }
  if (!writes_scores) return;
  const A* weight1 = weights_at<A>(m.weight1);
  for (int unit = warp_index(); unit < m.hidden; unit += warps) {
    A sum = 0;
    for (int input = lane_index(); input < m.inputs; input += warp_size) {
      sum += weight1[std::int64_t(unit) * m.inputs + input] * averages.get(input);
    }
    sum = warp_sum(sum) + weights_at<A>(m.bias1)[std::int64_t(box.sample) * m.hidden + unit];
    // Not a maximum, which would drop a NaN.
    const A active = sum <= 0 ? A(0) : sum;
    if (lane_index() == 0) units.set(unit, active * weights_at<A>(m.weight2)[unit]);
  }
  sync_block();
  if (threadIdx.x != 0) return;
  A logit = weights_at<A>(m.bias2)[0];
  for (int unit = 0; unit < m.hidden; ++unit) logit += units.get(unit);
  static_cast<A*>(m.scores)[patch] = A(1) / (A(1) + exp2_fast(-logit * static_cast<A>(rcu_log2e)));
}

// The voxels of one split of a patch.
__device__ __forceinline__ void split_of(const RcuProblem& m, const Box& box, int split, int* begin,
                                         int* end) {
  *begin = static_cast<int>(std::int64_t(box.voxels) * split / m.splits);
  *end = static_cast<int>(std::int64_t(box.voxels) * (split + 1) / m.splits);
}

// A block for a split of a patch and map: a warp takes every eighth group of nodes.
template <typename T>
__global__ void __launch_bounds__(table_threads) rcu_table_kernel(const RcuProblem m) {
  using A = ComputeType<T>;
  const std::int64_t table = blockIdx.x / m.splits, patch = table / m.maps;
  const RcuPlan<A> plan = static_cast<const RcuPlan<A>*>(m.plans)[table];
  const Box box = box_of(m, patch);
  const T* residual = static_cast<const T*>(m.residual) + table % m.maps * m.volume;
  int begin, end;
  split_of(m, box, static_cast<int>(blockIdx.x % m.splits), &begin, &end);
  A* parts = static_cast<A*>(m.parts) + std::int64_t(blockIdx.x) * m.most_nodes * rcu_table_fields;
  constexpr int warps = table_threads / warp_size, lanes = nodes_at_once * rcu_table_fields;
  for (int node = warp_index() * nodes_at_once; node < plan.nodes; node += warps * nodes_at_once) {
    Moments<A> moments(plan, node);
    for (int v = begin + lane_index(); v < end; v += warp_size) {
      moments.add(widened(residual[place_of(m, box, v).map]));
    }
    A own = 0;
#pragma unroll
    for (int i = 0; i < lanes; ++i) {
      const A sum = warp_sum(moments.sums[i / rcu_table_fields][i % rcu_table_fields]);
      if (lane_index() == i) own = sum;
    }
    if (lane_index() < lanes) parts[node * rcu_table_fields + lane_index()] = own;
  }
}

// A block a table, a thread a node.
template <typename A>
__global__ void __launch_bounds__(small_threads) rcu_finish_kernel(const RcuProblem m) {
  const std::int64_t table = blockIdx.x, size = std::int64_t(m.most_nodes) * rcu_table_fields;
  const RcuPlan<A> plan = static_cast<const RcuPlan<A>*>(m.plans)[table];
  const A* parts = static_cast<const A*>(m.parts) + table * m.splits * size;
  A* nodes = static_cast<A*>(m.tables) + table * size;
  for (int node = static_cast<int>(threadIdx.x); node < plan.nodes; node += small_threads) {
    Pack<A, rcu_table_fields> sums = {};
    for (int split = 0; split < m.splits; ++split) {
      const auto own =
          load_pack<A, rcu_table_fields>(parts + split * size + node * rcu_table_fields);
#pragma unroll
      for (int i = 0; i < rcu_table_fields; ++i) sums[i] += own[i];
    }
    store_pack(nodes + node * rcu_table_fields, cumulants(sums, plan.center));
  }
}

template <typename T>
void prepare(const RcuArguments& arguments, const Queue& queue, RcuProblem& m, bool writes_scores) {
  using A = ComputeType<T>;
  const CudaResources& cuda = arguments.cuda;
  rcu_take_columns<A>(arguments, m);
  m.surveys = cuda.take<A>(m.units * (4 * m.maps + m.inputs));
  m.means = cuda.take<A>(m.patches * m.inputs);
  const std::int64_t tables = m.most_nodes > 0 ? m.patches * m.maps : 0;
  if (tables > 0) {
    m.plans = cuda.take<RcuPlan<A>>(tables);
    m.tables = cuda.take<A>(tables * m.most_nodes * rcu_table_fields);
    // Of one split: the table itself, since a thread that finishes a node reads it first.
    m.parts = m.splits == 1 ? m.tables
                            : cuda.take<A>(tables * m.splits * m.most_nodes * rcu_table_fields);
  }
  const std::size_t shared =
      shared_bytes<A>(stage_values) + shared_bytes<A>(m.threads / warp_size * 2 * m.maps);
  queue.launch("rcu_survey", rcu_survey_kernel<T>, m.slots, m.threads, shared, m);
  queue.launch("rcu_merge", rcu_merge_kernel<T>, m.patches, small_threads,
               shared_bytes<A>(m.inputs) + shared_bytes<A>(m.hidden), m, writes_scores);
  if constexpr (!std::is_same_v<T, double>) {
    queue.launch("rcu_table", rcu_table_kernel<T>, tables * m.splits, table_threads, 0, m);
    queue.launch("rcu_finish", rcu_finish_kernel<A>, tables, small_threads, 0, m);
  }
}

}  // namespace

void rcu_prepare(const RcuArguments& arguments, const Queue& queue, RcuProblem& problem,
                 bool writes_scores) {
  for_dtype(arguments.x.dtype, [&](auto type) {
    prepare<typename decltype(type)::type>(arguments, queue, problem, writes_scores);
  });
}

}  // namespace cuda
}  // namespace grcsf
