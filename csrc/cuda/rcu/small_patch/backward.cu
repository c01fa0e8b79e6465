// SPDX-License-Identifier: Apache-2.0
// rcu on CUDA, backward, for what networks have: the calls that rcu/small_patch/forward.cu takes
// forward.
//
// Tiling. A block takes one patch after the other, a warp 64 voxels of each: its tiles of x and
// grad_out lie in shared memory, and every product with them is on tensor cores
// (rcu/small_patch/tile.cuh). A lane has one line of 16 voxels: query, expectation, slope. As soon
// as a warp is done with a tile it fetches that of the next patch, which arrives while it works on
// what is left. Gradients of weights stay with the block over all its patches, and go to its slot
// at the end.
//
// Bytes: x, grad_out and the maps once, grad_x once; a slot for each block.
// Work of a warp and tile, half dtypes: 160 products on tensor cores, 16 lookups a lane.
// Hazards: tiles are a warp's own, ordered by barriers of the warp. What warps share of a patch is
// written between two barriers of the block and read after the second; it is written next after two
// more, so that no barrier stands at the end of a patch.
#include "cuda/rcu/small_patch/weight_sums.cuh"

namespace grcsf {
namespace cuda {
namespace {

// The hidden units of the scoring network, each by a warp; and the means, for its gradients.
template <typename T>
__device__ __forceinline__ void find_hidden(const RcuProblem& m, const Room<T>& room,
                                            std::int64_t patch, int turn) {
  const Box box = room.boxes.get(turn);
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const float* weight1 = weights_at<float>(m.weight1);
  float passing = 0;
  for (int unit = warp_index(); unit < m.hidden; unit += threads / warp_size) {
    float sum = 0;
    for (int input = lane_index(); input < m.inputs; input += warp_size) {
      sum += weight1[std::int64_t(unit) * m.inputs + input] * room.averages.get(input);
    }
    sum = warp_sum(sum) + weights_at<float>(m.bias1)[std::int64_t(box.sample) * m.hidden + unit];
    const bool passes = !(sum <= 0);  // NaN passes
    if (passes) passing = 1;
    if (lane_index() != 0) continue;
    room.active.set(unit, passes ? sum : 0.0f);
    room.gate.set(unit, passes ? weights_at<float>(m.weight2)[unit] : 0.0f);
  }
  if (lane_index() == 0) room.passing.set(warp_index(), passing);
  for (int input = thread; input < m.inputs; input += threads) {
    static_cast<float*>(m.means)[patch * m.inputs + input] = room.averages.get(input);
  }
}

// What a unit of grad_logit pulls at every mean, each by eight lanes.
template <typename T>
__device__ __forceinline__ void find_pull(const RcuProblem& m, const Room<T>& room) {
  constexpr int at_once = 4, lanes = warp_size / at_once;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const float* weight1 = weights_at<float>(m.weight1);
  for (int begin = thread / warp_size * at_once; begin < m.inputs;
       begin += threads / warp_size * at_once) {
    const int input = begin + lane_index() % at_once;
    float sum = 0;
    for (int unit = lane_index() / at_once; input < m.inputs && unit < m.hidden; unit += lanes) {
      sum += room.gate.get(unit) * weight1[std::int64_t(unit) * m.inputs + input];
    }
#pragma unroll
    for (int distance = at_once; distance < warp_size; distance *= 2) {
      sum += shuffle_xor(sum, distance);
    }
    if (lane_index() < at_once && input < m.inputs) room.pull.set(input, sum);
  }
}

// E and its slope as sums over the voxels, where there is no table.
template <typename T>
__device__ __forceinline__ float sum_directly(const Room<T>& room, const RcuPlan<float>& plan,
                                              int map, int voxels, float a, float* variance) {
  constexpr int N = full_pack<T>;
  const int vectors = voxels / N, begin = map * vectors;
  const float about = words_at<T>(room.residual, begin).get(0);
  const float rate = a * static_cast<float>(rcu_log2e);
  const float top = greatest(rate * (plan.least - about), rate * (plan.greatest - about));
  float total = 0, mean = 0, square = 0;
  // Sums of sums: many equal weights that are added one by one lose digits.
  const auto each = [&](auto add) {
    for (int vector = 0; vector < vectors; ++vector) {
      const auto words = words_at<T>(room.residual, begin + vector);
      float part[2] = {0, 0};
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const float u = words.get(j) - about;
        add(part, exp2_fast(rate * u - top), u);
      }
      total += part[0];
      square += part[1];
    }
  };
  each([](float* part, float weight, float u) {
    part[0] += weight;
    part[1] += weight * u;
  });
  mean = square / total;
  square = total = 0;
  // Differences for each voxel, so that nothing large cancels.
  each([mean](float* part, float weight, float u) {
    part[0] += weight;
    part[1] += weight * (u - mean) * (u - mean);
  });
  *variance = square / total;
  return about + mean;
}

// Queries become expectations, with the slopes of these.
template <typename T>
__device__ __forceinline__ void look_up(const RcuProblem& m, const Room<T>& room, int voxels,
                                        Line& a, Line& slope) {
  // A lane without a line takes the last one's map: what it finds is not used.
  const int map = least(lane_index() / row_lanes, m.lines - 1) / m.heads;
  const RcuPlan<float> plan = room.plans.get(map);
  const auto table = room.tables.from(map * most_nodes<T> * fields);
#pragma unroll
  for (int i = 0; i < line_values; ++i) {
    if (i % 4 == 0) sync_warp();  // so that few nodes wait in registers
    if (plan.nodes == 0) continue;
    const Interval<float> at(plan, a[i]);
    const auto left = table.template get_pack<fields>(at.node * fields);
    const auto right = table.template get_pack<fields>((at.node + 1) * fields);
    a[i] = mean_between(left, right, plan.step, at.fraction);
    slope[i] = variance_between(left, right, plan.step, at.fraction);
  }
  if (plan.nodes > 0) return;
  // Turned, so that the loop needs no index that the compiler does not know.
#pragma unroll 1
  for (int i = 0; i < line_values; ++i) {
    float variance;
    const float expected = sum_directly(room, plan, map, voxels, a[0], &variance);
#pragma unroll
    for (int j = 0; j + 1 < line_values; ++j) {
      a[j] = a[j + 1];
      slope[j] = slope[j + 1];
    }
    a[line_values - 1] = expected;
    slope[line_values - 1] = variance;
  }
}

// Queries become score * E, with the derivatives of the loss by the queries; and what reaches the
// score through this warp's voxels.
template <typename T>
__device__ __forceinline__ void find_slopes(const RcuProblem& m, const Room<T>& room, int voxels,
                                            int turn, Line& a, Line& slope) {
  float of_channels[2 * steps] = {};
  int channel;
  Line reach;
  // In halves: the sums of all would not fit the registers beside the queries.
  sum_channels<T, 0, octet / 2>(room.own_grad, room.value, m.channels, reach, of_channels);
  sum_channels<T, octet / 2, octet / 2>(room.own_grad, room.value, m.channels, reach, of_channels);
  const float of_grad = sum_octets(of_channels, &channel);
  room.of_grad.set(warp_index() * most_channels + channel, of_grad);
  const Box box = room.boxes.get(turn);
  look_up(m, room, box.voxels, a, slope);
  const Existing<T> existing(room, box, voxels);
  const bool has_line = lane_index() / row_lanes < m.lines;
  const float score = room.scores.get(0);
  float reached = 0, of_bias = 0;
#pragma unroll
  for (int i = 0; i < line_values; ++i) {
    const bool exists = has_line && (existing.whole || existing.has(i / 2, i % 2));
    if (exists) reached += reach[i] * a[i];
    a[i] = exists ? score * a[i] : 0.0f;
    slope[i] = exists ? score * reach[i] * slope[i] : 0.0f;
    of_bias += slope[i];
  }
  reached = warp_sum(reached);
  of_bias = warp_sum(of_bias, row_lanes);
  const Lane lane;
  if (lane.own == 0) room.reached.set(warp_index(), reached);
  if (lane.t == 0) {
    room.bias_sums.add(most_channels + warp_index() * lines + lane.g, of_bias);
  }
}

// The gradient of the patch's logit, the same in every warp. The first one adds what the patch
// gives to the gradient of value_bias.
template <typename T>
__device__ __forceinline__ float find_logit(const Room<T>& room) {
  const float score = room.scores.get(0);
  const int lane = lane_index(), warps = static_cast<int>(blockDim.x) / warp_size;
  float sum = 0;
  for (int warp = 0; warp < warps; ++warp) sum += room.of_grad.get(warp * most_channels + lane);
  if (warp_index() == 0) room.bias_sums.add(lane, score * sum);
  float reached = sum * room.value_bias.get(lane);
  if (lane < warps) reached += room.reached.get(lane);
  return (warp_sum(reached) + room.scores.get(1)) * score * (1 - score);
}

// What a pull becomes: 0 where no unit passes, also if the gradient of the logit is not finite.
template <typename T>
__device__ __forceinline__ float mean_scale(const Room<T>& room, float grad_logit) {
  const int warps = static_cast<int>(blockDim.x) / warp_size;
  float passing = 0;
  for (int warp = 0; warp < warps; ++warp) passing += room.passing.get(warp);
  return passing == 0 ? 0.0f : grad_logit * room.scores.get(2);
}

template <typename T>
__device__ __forceinline__ void write_rows(const RcuProblem& m, const RcuGradients& gradients,
                                           const Room<T>& room, std::int64_t patch,
                                           float grad_logit) {
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  float* row = static_cast<float*>(gradients.rows) + patch * (1 + 2 * m.hidden);
  if (thread == 0) row[0] = grad_logit;
  for (int unit = thread; unit < m.hidden; unit += threads) {
    const float active = room.active.get(unit);  // 0: the unit passes nothing on
    row[1 + unit] = active == 0 ? 0.0f : grad_logit * room.gate.get(unit);
    row[1 + m.hidden + unit] = active == 0 ? 0.0f : grad_logit * active;
  }
  if (gradients.means == nullptr) return;
  const float of_means = mean_scale(room, grad_logit);
  for (int input = thread; input < m.inputs; input += threads) {
    static_cast<float*>(gradients.means)[patch * m.inputs + input] =
        of_means * room.pull.get(input);
  }
}

// grad_x of the octets of channel 8 s + g that the lane has read of grad_out.
template <typename T>
__device__ __forceinline__ void write_grad_x(const Room<T>& room, const Existing<T>& existing,
                                             T* to, const Fragment& weight, const Line& turned,
                                             float of_mean, Octet<T>& left, Octet<T>& right) {
  constexpr int N = full_pack<T>, per_octet = octet / N;
#pragma unroll
  for (int i = 0; i < octet; i += 2) {
    float lefts[2], rights[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      lefts[j] = rights[j] = of_mean;
      sum_lines<T>(weight, turned, i + j, lefts[j], rights[j]);
      lefts[j] += left.get(i + j);
      rights[j] += right.get(i + j);
    }
    left.words[i / N].set_pair(i % N, lefts[0], lefts[1]);
    right.words[i / N].set_pair(i % N, rights[0], rights[1]);
  }
  const int first = warp_index() * tile_vectors<T> + lane_index() % row_lanes * 2 * per_octet;
#pragma unroll
  for (int i = 0; i < 2 * per_octet; ++i) {
    const bool exists = existing.has(i % per_octet * N, i / per_octet);
    const auto& words = i < per_octet ? left.words[i] : right.words[i - per_octet];
    if (exists) words.store_once(to + room.places.get(first + i).offset);
  }
}

// From what reaches the queries to the gradients of data and weights. `expected` and `slope` are
// lines: E, and the derivative of the loss by the query.
template <typename T>
__device__ __forceinline__ void spread_tile(const RcuProblem& m, const Room<T>& room, int voxels,
                                            int turn, bool more, float grad_logit,
                                            const Line& expected, Line& slope, WeightSums& sums) {
  const Lane lane;
  const Box box = room.boxes.get(turn);
  const Existing<T> existing(room, box, voxels);
  const float of_means = mean_scale(room, grad_logit);
#pragma unroll
  for (int s = 0; s < steps; ++s) {
    if (8 * s >= m.channels) continue;
    sync_warp();  // so that no step's data is loaded far ahead
    const Octet<T> left(room.own_x, 8 * s + lane.g, 2 * lane.t),
        right(room.own_x, 8 * s + lane.g, 2 * lane.t + 1);
    sums.add<false>(room, s, slope, left, right);
  }
  sync_warp();  // lanes are done with the tile of x
  fetch_tile(m, room, room.own_x, m.x, more, turn ^ 1);
  transpose(slope);
#pragma unroll
  for (int s = 0; s < steps; ++s) {
    if (8 * s >= m.channels) continue;
    sync_warp();  // so that no step's data is loaded far ahead
    const int c = 8 * s + lane.g;
    Octet<T> left(room.own_grad, c, 2 * lane.t), right(room.own_grad, c, 2 * lane.t + 1);
    sums.add<true>(room, s, expected, left, right);
    if (m.grad_x == nullptr) continue;
    const bool exists = c < m.channels;
    const Fragment weight = room.spread.template get_pack<4>((s * warp_size + lane.own) * 4);
    const float of_mean = exists ? of_means * room.pull.get(c) : 0.0f;
    Existing<T> own = existing;
    if (!exists) own.bits = 0;
    write_grad_x(room, own, static_cast<T*>(m.grad_x) + (box.x + c * m.stride_c), weight, slope,
                 of_mean, left, right);
  }
  sync_warp();
  fetch_tile(m, room, room.own_grad, m.grad_out, more, turn ^ 1);
}

template <typename T>
__global__ void __launch_bounds__(most_threads, most_blocks<T>)
    rcu_patch_backward_kernel(const RcuProblem m, const RcuGradients gradients, const int voxels) {
  const Room<T> room(m, voxels);
  const int warp = warp_index(), warps = static_cast<int>(blockDim.x) / warp_size;
  stage_constants(m, room);
  sync_block();
  fetch_maps(m, room, true, 0);
  fetch_tile(m, room, room.own_x, m.x, true, 0);
  fetch_tile(m, room, room.own_grad, m.grad_out, true, 0);
  WeightSums sums;
  const int patches = static_cast<int>(m.patches), stride = static_cast<int>(gridDim.x);
  int turn = 0;
  for (int patch = static_cast<int>(blockIdx.x); patch < patches; patch += stride, turn ^= 1) {
    wait_copies<1>();  // all but grad_out
    sync_warp();
    survey_maps(m, room, turn);
    Line a = find_queries(m, room, voxels, turn);
    sync_block();
    for (int map = warp; map < m.maps; map += warps) plan_map(m, room, map, turn);
    if (warp == warps - 1) {
      average_channels(m, room.boxes.get(turn).voxels, room.of_x, room.averages);
    }
    if (threadIdx.x == 0) {
      room.scores.set(0, static_cast<const float*>(m.scores)[patch]);
      room.scores.set(1, static_cast<const float*>(m.grad_scores)[patch]);
      room.scores.set(2, 1.0f / static_cast<float>(room.boxes.get(turn).voxels));
      if (patch + stride < patches) room.boxes.set(turn ^ 1, box_of(m, patch + stride));
    }
    sync_block();
    find_hidden(m, room, patch, turn);
    make_tables<T, fields>(m.maps, room.plans, room.tables, [&](int map, auto& moments) {
      const int vectors = room.boxes.get(turn).voxels / full_pack<T>;
#pragma unroll 1
      for (int v = lane_index(); v < vectors; v += warp_size) {
        const auto words = words_at<T>(room.residual, map * vectors + v);
#pragma unroll
        for (int j = 0; j < full_pack<T>; ++j) moments.add(words.get(j));
      }
    });
    sync_block();
    wait_copies<0>();
    sync_warp();
    Line slope = {};
    find_slopes(m, room, voxels, turn, a, slope);
    find_pull(m, room);
    sync_block();
    const bool more = patch + stride < patches;
    fetch_maps(m, room, more, turn ^ 1);
    const float grad_logit = find_logit(room);
    write_rows(m, gradients, room, patch, grad_logit);
    spread_tile(m, room, voxels, turn, more, grad_logit, a, slope, sums);
  }
  write_slot(m, gradients, room, sums);
}

template <typename T>
bool patch_backward(const RcuArguments& arguments, const Queue& queue, RcuProblem& m,
                    RcuGradients& gradients) {
  if (!fits_patch<T>(m) || !begins_vector(m.grad_out) || !begins_vector(m.grad_x)) return false;
  constexpr std::int64_t most_offset = 0x7fffffff;
  if (m.patch_d * m.stride_d + m.patch_h * m.stride_h > most_offset) return false;
  if (m.patches > most_offset / 2) return false;
  const int voxels = m.patch_d * m.patch_h * m.patch_w;
  const int warps = static_cast<int>(blocks_for(voxels, tile_voxels));
  const std::size_t shared = room_bytes<T>(m, voxels, warps);
  if (shared > queue.shared_of_block()) return false;
  constexpr int of_system = 1024;  // bytes of shared memory that every block takes besides
  const std::size_t blocks = least<std::size_t>(
      most_blocks<T> * most_warps / warps, queue.shared_of_multiprocessor() / (shared + of_system));
  gradients.slots = static_cast<int>(
      least(m.patches, queue.multiprocessors() * from_size(greatest<std::int64_t>(1, blocks), 1)));
  const CudaResources& cuda = arguments.cuda;
  const std::int64_t matrix = std::int64_t(m.lines) * m.channels;
  gradients.values = cuda.take<float>(gradients.slots * (matrix + m.channels));
  gradients.queries = cuda.take<float>(gradients.slots * (matrix + m.lines));
  gradients.rows = cuda.take<float>(m.patches * (1 + 2 * m.hidden));
  m.means = cuda.take<float>(m.patches * m.inputs);
  if (m.grad_residual != nullptr) {
    gradients.means = cuda.take<float>(m.patches * m.inputs);
    rcu_take_columns<float>(arguments, m);
  }
  queue.launch("rcu_patch_backward", rcu_patch_backward_kernel<T>, gradients.slots,
               warps * warp_size, shared, m, gradients, voxels);
  return true;
}

}  // namespace

bool rcu_patch_backward(const RcuArguments& arguments, const Queue& queue, RcuProblem& problem,
                        RcuGradients& gradients) {
  bool done = false;
  for_dtype(arguments.x.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (!std::is_same_v<T, double>) {
      done = patch_backward<T>(arguments, queue, problem, gradients);
    }
  });
  return done;
}

}  // namespace cuda
}  // namespace grcsf
