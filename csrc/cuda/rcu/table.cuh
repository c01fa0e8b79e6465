// SPDX-License-Identifier: Apache-2.0
// rcu on CUDA, one map channel: the attention of a patch as a table (docs/operators.md).
//
// A warp makes four nodes at a time, its lanes go over the voxels: two exponentials a voxel, for
// the weight at the first node and for the factor from node to node, and products from there.
// Hazards, and what is done about them: exponents are a (r - end) with the end of the range of r
// where they are largest, so none overflows; moments are taken about the mean of r, so that the
// variance does not cancel; NaN in a map makes all of its table NaN, and NaN in a query finds the
// first interval.
#pragma once

#include "cuda/rcu/problem.cuh"

namespace grcsf {
namespace cuda {
namespace {

constexpr int nodes_at_once = 4;

// (step of a) * (range of r): the spline's error is below the data's rounding.
template <typename T>
constexpr float table_step = sizeof(T) == 2 ? 0.5f : 0.25f;

// Nodes over the queries least_a..greatest_a; none where there would be more than `most`.
template <typename T, typename A>
__device__ __forceinline__ RcuPlan<A> plan_of(A least_a, A greatest_a, A least_r, A greatest_r,
                                              A mean, int most) {
  RcuPlan<A> plan;
  plan.least = least_r;
  plan.greatest = greatest_r;
  // Clamped, so that a constant map is its own center exactly.
  plan.center = least(greatest(mean, least_r), greatest_r);
  plan.first = least_a;
  const A range = greatest_a - least_a;
  const A needed = range * (greatest_r - least_r) / static_cast<A>(table_step<T>);
  constexpr int more = 2 + nodes_at_once;  // both ends, rounded up
  plan.nodes = 0;
  // Not so for NaN and infinity.
  if (needed <= static_cast<A>(most - more)) {
    plan.nodes = (static_cast<int>(needed) + 2 + nodes_at_once - 1) / nodes_at_once * nodes_at_once;
  }
  plan.step = plan.nodes > 0 ? range / static_cast<A>(plan.nodes - 1) : A(0);
  plan.per_step = plan.step > 0 ? A(1) / plan.step : A(0);
  return plan;
}

// Sums of w, w u, w u^2, w u^3 at nodes_at_once nodes, u = r - center: added up over voxels.
template <typename A>
struct Moments {
  A sums[nodes_at_once][rcu_table_fields] = {};
  A first, step, end, center;

  __device__ __forceinline__ Moments(const RcuPlan<A>& plan, int node) {
    const A a = plan.first + static_cast<A>(node) * plan.step;
    constexpr A log2e = static_cast<A>(rcu_log2e);
    first = a * log2e;
    step = plan.step * log2e;
    end = a >= 0 ? plan.greatest : plan.least;
    center = plan.center;
  }

  __device__ __forceinline__ void add(A r) {
    const A distance = r - end, u = r - center, square = u * u, cube = square * u;
    A weight = exp2_fast(first * distance);
    const A factor = exp2_fast(step * distance);
#pragma unroll
    for (int n = 0; n < nodes_at_once; ++n) {
      sums[n][0] += weight;
      sums[n][1] += weight * u;
      sums[n][2] += weight * square;
      sums[n][3] += weight * cube;
      weight *= factor;
    }
  }
};

// Mean, variance and third cumulant from sums of powers about `center`.
template <typename A>
__device__ __forceinline__ Pack<A, rcu_table_fields> cumulants(const Pack<A, rcu_table_fields>& s,
                                                               A center) {
  const A mean = s[1] / s[0], square = s[2] / s[0], cube = s[3] / s[0];
  Pack<A, rcu_table_fields> found;
  found[0] = center + mean;
  found[1] = greatest(square - mean * mean, A(0));
  found[2] = cube - 3 * mean * square + 2 * mean * mean * mean;
  found[3] = 0;
  return found;
}

// The cubic through two nodes with their slopes (times the step), at fraction f.
template <typename A>
__device__ __forceinline__ A hermite(A left, A right, A left_slope, A right_slope, A f) {
  const A rise = right - left, inner = 3 * rise - 2 * left_slope - right_slope;
  return left + f * (left_slope + f * (inner + f * (left_slope + right_slope - 2 * rise)));
}

// The interval of a query: the node on its left, and the fraction of the step beyond it.
template <typename A>
struct Interval {
  int node;
  A fraction;

  __device__ __forceinline__ Interval(const RcuPlan<A>& plan, A a) {
    const A position = (a - plan.first) * plan.per_step;
    const A inside = least(greatest(A(0), position), static_cast<A>(plan.nodes - 2));
    node = static_cast<int>(inside);
    fraction = position - static_cast<A>(node);
  }
};

template <typename A>
__device__ __forceinline__ A mean_between(const Pack<A, rcu_table_fields>& left,
                                          const Pack<A, rcu_table_fields>& right, A step, A f) {
  return hermite(left[0], right[0], left[1] * step, right[1] * step, f);
}

template <typename A>
__device__ __forceinline__ A variance_between(const Pack<A, rcu_table_fields>& left,
                                              const Pack<A, rcu_table_fields>& right, A step, A f) {
  return hermite(left[1], right[1], left[2] * step, right[2] * step, f);
}

}  // namespace
}  // namespace cuda
}  // namespace grcsf
