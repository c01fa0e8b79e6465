// SPDX-License-Identifier: Apache-2.0
// rcu on the CPU: the gradient of the residual map, one map channel, from tables.
//
// The gradient that reaches residual voxel j of a map is a smooth function of its value r alone:
//   F(r) = sum over heads and queries i of e_i exp(a_i r - L_i) (1 + a_i (r - E_i)),
// with e_i the gradient of E_i and L_i = log sum_j exp(a_i r_j). So it is tabulated over the range
// of r as a cubic Hermite spline, as E is over the range of a: F and F' at evenly spaced nodes from
// products, 8 operations a query and node, and the cost is linear in the voxels. The exponent is
// never positive for r inside its range.
#pragma once

#include "cpu/rcu/attention.h"

namespace grcsf {
namespace {

// Nodes of r for one map; count is a multiple of 4, 0: too many.
struct MapNodes {
  double first = 0, step = 0, middle = 0;
  std::int64_t count = 0;

  double at(std::int64_t node) const { return first + step * static_cast<double>(node); }
};

// `greatest`: the largest |a| of the heads. F differs from E: its slopes grow with |a|, not with
// the range of a, and gradients are held to a tenth of the precision.
template <typename T>
MapNodes map_nodes(const Range<ComputeType<T>>& of_r, double greatest, std::int64_t most) {
  MapNodes nodes;
  const double range = static_cast<double>(of_r.greatest) - of_r.least;
  const double wanted = range * greatest / (0.75 * widest_step<T>());
  if (!(wanted < static_cast<double>(most - 4))) return nodes;
  nodes.first = of_r.least;
  nodes.middle = (static_cast<double>(of_r.least) + of_r.greatest) / 2;
  nodes.count = (static_cast<std::int64_t>(wanted) + 2 + 3) / 4 * 4;
  nodes.step = range / static_cast<double>(nodes.count - 1);
  return nodes;
}

// The queries of one head in a chunk, all with the gradient of E not yet multiplied by the score; E
// and log sum exp are about the middle of r.
template <typename A>
struct Reaching {
  const A *a, *reach, *mean, *log;
};

// Adds F and F' of a chunk of queries at all nodes; `sums` [count][2].
template <typename A>
void add_reaching(const Reaching<A>& own, std::int64_t voxels, const MapNodes& nodes,
                  const Weights<A>& weights, double* sums) {
  constexpr int together = 4;
  const A step = static_cast<A>(nodes.step);
  const std::int64_t whole = whole_vectors<A>(voxels);
  for (std::int64_t v = 0; v < whole; v += lanes<A>) {
    store(exp_of<A>(load(own.a + v) * step), weights.factor + v);
  }
  clear_padding(weights.factor, voxels);
  for (std::int64_t node = 0; node < nodes.count; node += together) {
    if (node % block_nodes == 0) {
      const A r = static_cast<A>(nodes.at(node) - nodes.middle);
      for (std::int64_t v = 0; v < whole; v += lanes<A>) {
        Vec<A> weight = exp_of<A>(load(own.a + v) * r - load(own.log + v)) * load(own.reach + v);
        if (v + lanes<A> > voxels) {  // padding weighs nothing
          for (std::int64_t i = voxels - v; i < lanes<A>; ++i) weight[i] = 0;
        }
        store(weight, weights.now + v);
      }
    }
    Vec<A> value[together], slope[together];
    for (int n = 0; n < together; ++n) value[n] = slope[n] = Vec<A>{};
    A at[together];
    for (int n = 0; n < together; ++n) at[n] = static_cast<A>(nodes.at(node + n) - nodes.middle);
    for (std::int64_t v = 0; v < whole; v += lanes<A>) {
      const Vec<A> a = load(own.a + v), factor = load(weights.factor + v);
      const Vec<A> mean = load(own.mean + v);
      Vec<A> weight = load(weights.now + v);
      for (int n = 0; n < together; ++n) {
        const Vec<A> lean = a * (at[n] - mean), steep = weight * a;
        value[n] += weight * lean + weight;
        slope[n] += steep * lean + (steep + steep);
        weight *= factor;
      }
      store(weight, weights.now + v);
    }
    for (int n = 0; n < together; ++n) {
      sums[2 * (node + n)] += sum_of<A>(value[n]);
      sums[2 * (node + n) + 1] += sum_of<A>(slope[n]);
    }
  }
}

// The spline of F from its values and slopes at the nodes.
template <typename A>
Table<A> map_table(const MapNodes& nodes, const double* sums, A* coefficients) {
  for (std::int64_t n = 0; n + 1 < nodes.count; ++n) {
    const double* at = sums + 2 * n;
    hermite(at[0], at[2], nodes.step * at[1], nodes.step * at[3], coefficients + 4 * n);
  }
  Table<A> table =
      table_over<A>(nodes.first, nodes.step * static_cast<double>(nodes.count - 1), nodes.count);
  table.splines.mean = coefficients;
  return table;
}

}  // namespace
}  // namespace grcsf
