// SPDX-License-Identifier: Apache-2.0
// rcu on CUDA, forward, for what networks have: one map channel, up to 32 channels and eight
// queries a voxel, patches of up to 512 voxels whose rows are vectors of 16 bytes.
//
// Tiling. A block takes one patch after the other, with as many threads as a patch has voxels. As
// many lanes as a vector has voxels (eight in half precision, four in float32) share a vector: each
// keeps some of its channels in registers from the first step to the last. Queries are sums over
// these lanes, exchanged so that each owns one voxel, looks its expectations up and gives them to
// the others. Ranges, score and tables are made in between, in shared memory. Meanwhile what the
// block needs of its next patch is on its way to shared memory, each thread's own part.
//
// Bytes: x, the maps and out once each.
// Hazards: every array in shared memory is written between two barriers and read after the second.
#include "cuda/rcu/small_patch/forward_memory.cuh"

namespace grcsf {
namespace cuda {
namespace {

// What the block knows after the first barrier: this warp's sums and ranges.
template <typename T>
__device__ __forceinline__ void survey(const Space& space, const Share<T>& share, bool exists) {
  const int lane = lane_index(), warp = warp_index();
  const int channel = lane / share.groups * share.groups + share.group();
  space.sums.set(warp * most_channels + channel, channel_sum(share));
  float values[ranges];
#pragma unroll
  for (int n = 0; n < lines; ++n) {
    constexpr float none = __builtin_huge_valf();
    values[n] = exists ? share.a[n] : none;
    values[lines + n] = exists ? -share.a[n] : none;
  }
  const float found = warp_scatter(values, Least());
  if (lane % 2 == 0) space.extremes.set(warp * ranges + lane / 2, found);
}

// The plan of a map by one warp, and its mean.
template <typename T>
__device__ __forceinline__ void plan_map(const RcuProblem& m, const Space& space, const Box& box,
                                         int map) {
  Seen seen;
  for (int v = lane_index(); v < box.voxels; v += warp_size) {
    const float r = space.residual.get(map * box.voxels + v);
    seen.low = least(seen.low, r);
    seen.high = least(seen.high, -r);
    seen.sum += r;
  }
  set_plan<T>(m, map, box.voxels, seen, space.extremes, space.averages, space.plans);
}

// The score of a patch, by one warp.
__device__ __forceinline__ void find_score(const RcuProblem& m, const Space& space, const Box& box,
                                           std::int64_t patch) {
  const float* weight1 = weights_at<float>(m.weight1);
  float logit = 0;
  for (int unit = lane_index(); unit < m.hidden; unit += warp_size) {
    float sum = weights_at<float>(m.bias1)[std::int64_t(box.sample) * m.hidden + unit];
#pragma unroll 4
    for (int input = 0; input < m.inputs; ++input) {
      sum += weight1[unit * m.inputs + input] * space.averages.get(input);
    }
    // Not a maximum, which would drop a NaN.
    logit += (sum <= 0 ? 0.0f : sum) * weights_at<float>(m.weight2)[unit];
  }
  logit = warp_sum(logit) + weights_at<float>(m.bias2)[0];
  const float score = 1.0f / (1.0f + exp2_fast(-logit * static_cast<float>(rcu_log2e)));
  if (lane_index() != 0) return;
  space.score.set(0, score);
  static_cast<float*>(m.scores)[patch] = score;
}

// E as a sum over the voxels, where there is no table.
__device__ __forceinline__ float sum_directly(const Space& space, const RcuPlan<float>& plan,
                                              int map, int voxels, float a) {
  const int begin = map * voxels;
  const float about = space.residual.get(begin), rate = a * static_cast<float>(rcu_log2e);
  const float top = greatest(rate * (plan.least - about), rate * (plan.greatest - about));
  float total = 0, mean = 0;
  // Sums of sums: many equal weights that are added one by one lose digits.
  for (int first = 0; first < voxels; first += warp_size) {
    float part = 0, part_mean = 0;
    for (int v = first; v < least(first + warp_size, voxels); ++v) {
      const float u = space.residual.get(begin + v) - about;
      const float weight = exp2_fast(rate * u - top);
      part += weight;
      part_mean += weight * u;
    }
    total += part;
    mean += part_mean;
  }
  return about + mean / total;
}

// Queries become expectations.
template <typename T>
__device__ __forceinline__ void look_up(const RcuProblem& m, const Space& space, int voxels,
                                        Share<T>& share) {
#pragma unroll
  for (int n = 0; n < lines; ++n) {
    if (n >= m.lines) {
      share.a[n] = 0;
      continue;
    }
    sync_warp();  // so that no plan is loaded far ahead
    const int map = n / m.heads;
    const RcuPlan<float> plan = space.plans.get(map);
    if (plan.nodes == 0) {
      share.a[n] = sum_directly(space, plan, map, voxels, share.a[n]);
      continue;
    }
    const auto table = space.tables.from(map * most_nodes<T> * fields);
    const Interval<float> at(plan, share.a[n]);
    const auto left = table.template get_pack<fields>(at.node * fields);
    const auto right = table.template get_pack<fields>((at.node + 1) * fields);
    share.a[n] = hermite(left[0], right[0], left[1] * plan.step, right[1] * plan.step, at.fraction);
  }
}

// x becomes x + score * y, two voxels at a time: more of them would not fit the registers.
template <typename T>
__device__ __forceinline__ void add_values(const Space& space, Share<T>& share) {
  const int first = lane_index() - share.group();
  const float score = space.score.get(0);
#pragma unroll
  for (int voxel = 0; voxel < share.groups; voxel += 2) {
    float expected[2][lines];
#pragma unroll
    for (int n = 0; n < lines; ++n) {
      expected[0][n] = shuffle_from(share.a[n], first + voxel);
      expected[1][n] = shuffle_from(share.a[n], first + voxel + 1);
    }
    sync_warp();  // so that no weights are kept from one pair of voxels for the next
#pragma unroll
    for (int i = 0; i < share.channels; ++i) {
      const int c = i * share.groups + share.group();
      const float bias = space.value_bias.get(c);
      float sums[2] = {bias, bias};
#pragma unroll
      for (int n = 0; n < lines; n += 4) {
        const auto weight = space.value_weight.template get_pack<4>(weight_at(c, n));
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          sums[0] += expected[0][n + k] * weight[k];
          sums[1] += expected[1][n + k] * weight[k];
        }
      }
      Words<T>& own = share.x[i];
      own.set_pair(voxel, own.get(voxel) + score * sums[0], own.get(voxel + 1) + score * sums[1]);
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(most_threads, 1)
    rcu_patch_kernel(const RcuProblem m, const int voxels) {
  constexpr int N = full_pack<T>;
  const Space space(m, voxels, most_nodes<T>, sizeof(T));
  const int warp = warp_index(), warps = static_cast<int>(blockDim.x) / warp_size;
  const int voxel = static_cast<int>(threadIdx.x) / N * N;
  fetch<T>(m, space, blockIdx.x);
  stage_weights(m, space);
  for (std::int64_t patch = blockIdx.x; patch < m.patches; patch += gridDim.x) {
    const Box box = box_of(m, patch);
    const bool exists = voxel < box.voxels;
    Share<T> share;
    take_fetched(m, box, space, share);
    sync_block();  // weights and maps
    fetch<T>(m, space, patch + gridDim.x);
    find_queries(space, share);
    survey(space, share, exists);
    sync_block();
    for (int map = warp; map < m.maps; map += warps) plan_map<T>(m, space, box, map);
    if (warp == warps - 1) average_channels(m, box.voxels, space.sums, space.averages);
    sync_block();
    if (warp == 0) find_score(m, space, box, patch);
    make_tables<T, fields>(m.maps, space.plans, space.tables, [&](int map, auto& moments) {
      for (int v = lane_index(); v < box.voxels; v += warp_size) {
        moments.add(space.residual.get(map * box.voxels + v));
      }
    });
    sync_block();
    share.renew();
    look_up(m, space, box.voxels, share);
    add_values(space, share);
    // Found again: kept since the beginning it would take registers that spill in float32.
    const Box own = box_of(m, opaque(patch));
    T* out = static_cast<T*>(m.out) + place_of(m, own, exists ? voxel : 0).x;
#pragma unroll
    for (int i = 0; i < share.channels; ++i) {
      const int c = i * N + share.group();
      if (exists && c < m.channels) share.x[i].store_once(out + c * m.stride_c);
    }
    sync_block();  // maps, plans and tables are free again
  }
}

template <typename T>
bool patch_forward(const Queue& queue, const RcuProblem& m) {
  const int voxels = m.patch_d * m.patch_h * m.patch_w;
  if (!fits_patch<T>(m) || !begins_vector(m.out)) return false;
  const int threads = static_cast<int>(blocks_for(voxels, warp_size)) * warp_size;
  // As many blocks as fit their registers: each fetches a patch while it works on the one before.
  const std::int64_t blocks = std::int64_t(queue.multiprocessors()) * (most_threads / threads);
  queue.launch("rcu_patch", rcu_patch_kernel<T>, least(m.patches, blocks), threads,
               space_bytes(m, voxels, most_nodes<T>, sizeof(T), threads), m, voxels);
  return true;
}

}  // namespace

bool rcu_patch_forward(const RcuArguments& arguments, const Queue& queue,
                       const RcuProblem& problem) {
  bool done = false;
  for_dtype(arguments.x.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (!std::is_same_v<T, double>) done = patch_forward<T>(queue, problem);
  });
  return done;
}

}  // namespace cuda
}  // namespace grcsf
