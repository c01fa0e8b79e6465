// SPDX-License-Identifier: Apache-2.0
// rcu on the CPU: what patches and chunks add to the gradients.
#pragma once

#include "cpu/rcu/attention.h"

namespace grcsf {
namespace {

// Sums of the gradients of the weights, in double: one for each segment of the work, added in
// order.
struct WeightSums {
  std::int64_t query, query_bias, value, value_bias, weight1, bias1, weight2, bias2, size;

  explicit WeightSums(const Sizes& s) {
    std::int64_t at = 0;
    const auto take = [&](std::int64_t count) {
      const std::int64_t begin = at;
      at += count;
      return begin;
    };
    query = take(s.lines * s.channels);
    query_bias = take(s.lines);
    value = take(s.channels * s.lines);  // [C][lines]
    value_bias = take(s.channels);       // the same for every map
    weight1 = take(s.hidden * (s.channels + s.map_lines));
    bias1 = take(s.hidden);
    weight2 = take(s.hidden);
    bias2 = take(1);
    size = at;
  }
};

// The segments of a sample, each with sums of its own.
class SegmentSums {
 public:
  SegmentSums(const Sizes& s, std::int64_t segments)
      : layout(s), segments_(segments), sums_(s.batch * segments * layout.size) {}

  double* of(std::int64_t sample, std::int64_t segment) {
    return &sums_[(sample * segments_ + segment) * layout.size];
  }

  const WeightSums layout;

  // Writes the gradients of all weights.
  template <typename A>
  void finish(const Sizes& s, const RcuWeights& out) {
    Vector<double> total(layout.size);
    for (std::int64_t sample = 0; sample < s.batch; ++sample) {
      Vector<double> bias(s.hidden);
      for (std::int64_t segment = 0; segment < segments_; ++segment) {
        const double* own = of(sample, segment);
        for (std::int64_t i = 0; i < layout.size; ++i) total[i] += own[i];
        for (std::int64_t m = 0; m < s.hidden; ++m) bias[m] += own[layout.bias1 + m];
      }
      write<A>(bias.data(), s.hidden, out.score_bias1, sample * s.hidden);
    }
    write<A>(&total[layout.query], s.lines * s.channels, out.query_weight);
    write<A>(&total[layout.query_bias], s.lines, out.query_bias);
    write<A>(&total[layout.weight1], s.hidden * (s.channels + s.map_lines), out.score_weight1);
    write<A>(&total[layout.weight2], s.hidden, out.score_weight2);
    write<A>(&total[layout.bias2], 1, out.score_bias2);
    const std::int64_t each = s.heads * s.map_channels;
    for (std::int64_t k = 0; k < s.maps; ++k) {
      write<A>(&total[layout.value_bias], s.channels, out.value_bias, k * s.channels);
      for (std::int64_t c = 0; c < s.channels; ++c) {
        write<A>(&total[layout.value + c * s.lines + k * each], each, out.value_weight,
                 (k * s.channels + c) * each);
      }
    }
  }

 private:
  template <typename A>
  static void write(const double* from, std::int64_t count, const TensorView& to,
                    std::int64_t at = 0) {
    A* values = static_cast<A*>(to.data) + at;
    for (std::int64_t i = 0; i < count; ++i) values[i] = static_cast<A>(from[i]);
  }

  const std::int64_t segments_;
  Vector<double> sums_;
};

template <typename A>
Softmax<A> softmax_of(const Attention<A>& own, const Sizes& s, std::int64_t head) {
  return {own.greatest[head], own.total[head], head_rows(own.mean, s, head), own.level[head],
          own.rest[head]};
}

// The softmax of a head with all that its gradients need, and the gradient of the queries added to
// `slope` where that has rows.
template <typename A, typename EachKeys>
Softmax<A> softmax_backward(const Attention<A>& own, const Sizes& s, std::int64_t head,
                            std::int64_t whole, const Rows<A>& slope, EachKeys each_keys) {
  const Softmax<A> state = softmax_of(own, s, head);
  const Rows<const A> queries = constant(head_rows(own.a, s, head));
  const Rows<const A> reach = constant(head_rows(own.reach, s, head));
  const std::int64_t c = s.map_channels;
  start_softmax<A>(c, whole, state);
  each_keys(head / s.heads,
            [&](const Keys<A>& keys) { add_keys<A>(queries, c, whole, keys, state); });
  end_softmax<A>(c, whole, state);
  level_of<A>(reach, constant(state.mean), c, whole, state.level);
  std::fill_n(state.rest, whole, A(0));
  each_keys(head / s.heads, [&](const Keys<A>& keys) {
    add_query_gradient<A>(queries, reach, c, whole, keys, state, slope);
  });
  return state;
}

// E, its gradient `reach` = value_weight^T grad and the gradient `slope` of the queries for a chunk
// of queries; both gradients before they are multiplied by the score.
template <typename A, typename EachKeys>
void attend_backward(const Projections<A>& projections, const Sizes& s,
                     const Vector<Table<A>>& tables, const A* grad, std::int64_t pitch,
                     std::int64_t voxels, const Attention<A>& own, EachKeys each_keys) {
  const std::int64_t whole = whole_vectors<A>(voxels);
  product<A>(
      projections.value_t.data(), s.lines, s.channels, grad, pitch, whole,
      [](std::int64_t) { return A(0); },
      [&](std::int64_t line, std::int64_t v, Vec<A> sum) { store(sum, own.reach[line] + v); },
      [] {});
  for (std::int64_t head = 0; head < s.maps * s.heads; ++head) {
    if (tables[head].last >= 0) {
      A* slope = own.slope[head];
      const Splines<A>& splines = tables[head].splines;
      look_up<A, 2>(tables[head], own.a[head], whole, {splines.mean, splines.variance},
                    {own.mean[head], slope}, tables[head].middle);
      for (std::int64_t v = 0; v < whole; v += lanes<A>) {
        store(load(slope + v) * load(own.reach[head] + v), slope + v);
      }
      continue;
    }
    const Rows<A> slope = head_rows(own.slope, s, head);
    for (std::int64_t c = 0; c < s.map_channels; ++c) std::fill_n(slope[c], whole, A(0));
    const Softmax<A> state = softmax_backward(own, s, head, whole, slope, each_keys);
    add_center(state.mean, s.map_channels, whole, center_of(own, s, head));
  }
}

// What a chunk adds to the gradients of the projections; returns what it adds to that of the score.
template <typename A>
double add_weight_gradients(const Projections<A>& projections, const Sizes& s, double score,
                            const A* x, const A* grad, std::int64_t pitch, std::int64_t voxels,
                            const Attention<A>& own, const WeightSums& layout, double* sums) {
  const std::int64_t whole = whole_vectors<A>(voxels);
  const std::int64_t line_pitch = own.slope.pitch;
  // Rows of x and of the lines are equally long: one pitch serves both sides of a product.
  inner_products<A>(own.slope.data, s.lines, x, s.channels, line_pitch, whole,
                    [&](std::int64_t line, std::int64_t c, A sum) {
                      sums[layout.query + line * s.channels + c] += score * sum;
                    });
  inner_products<A>(grad, s.channels, own.mean.data, s.lines, pitch, whole,
                    [&](std::int64_t c, std::int64_t line, A sum) {
                      sums[layout.value + c * s.lines + line] += score * sum;
                    });
  double reached = 0;
  for (std::int64_t line = 0; line < s.lines; ++line) {
    sums[layout.query_bias + line] += score * row_sum(own.slope[line], whole);
    Vec<A> sum{};
    for (std::int64_t v = 0; v < whole; v += lanes<A>) {
      sum += load(own.reach[line] + v) * load(own.mean[line] + v);
    }
    reached += sum_of<A>(sum);
  }
  for (std::int64_t c = 0; c < s.channels; ++c) {
    const double sum = row_sum(grad + c * pitch, whole);
    sums[layout.value_bias + c] += score * sum;
    reached += projections.value_bias[c] * sum;
  }
  return reached;
}

// The scoring network backward: adds to its weights' gradients, and turns `means` [C + K * c] into
// their gradient, for one voxel.
template <typename A>
void score_backward(const RcuWeights& weights, const Sizes& s, std::int64_t sample, double score,
                    double grad_score, std::int64_t voxels, double* means, double* hidden,
                    const WeightSums& layout, double* sums) {
  score_of<A>(weights, s, sample, means, hidden);
  const A* weight1 = values_of<A>(weights.score_weight1);
  const A* weight2 = values_of<A>(weights.score_weight2);
  const std::int64_t inputs = s.channels + s.map_lines;
  const double grad_logit = grad_score * score * (1 - score);
  sums[layout.bias2] += grad_logit;
  for (std::int64_t m = 0; m < s.hidden; ++m) {
    const bool passes = !(hidden[m] <= 0);  // NaN passes
    sums[layout.weight2 + m] += grad_logit * (passes ? hidden[m] : 0.0);
    hidden[m] = passes ? grad_logit * weight2[m] : 0.0;
    sums[layout.bias1 + m] += hidden[m];
    double* own = sums + layout.weight1 + m * inputs;
    for (std::int64_t i = 0; i < inputs; ++i) own[i] += hidden[m] * means[i];
  }
  for (std::int64_t i = 0; i < inputs; ++i) {
    double sum = 0;
    for (std::int64_t m = 0; m < s.hidden; ++m) sum += hidden[m] * weight1[m * inputs + i];
    means[i] = sum / static_cast<double>(voxels);
  }
}

// grad becomes the gradient of x, in place: grad + score query_weight^T slope + that of the means.
template <typename A>
void add_query_path(const Projections<A>& projections, const Sizes& s, double score,
                    const double* grad_means, const Rows<A>& slope, std::int64_t voxels, A* grad,
                    std::int64_t pitch) {
  const A factor = static_cast<A>(score);
  product<A>(
      projections.query_t.data(), s.channels, s.lines, slope.data, slope.pitch,
      whole_vectors<A>(voxels), [](std::int64_t) { return A(0); },
      [&](std::int64_t c, std::int64_t v, Vec<A> sum) {
        A* at = grad + c * pitch + v;
        store(load(at) + (factor * sum + static_cast<A>(grad_means[c])), at);
      },
      [] {});
}

}  // namespace
}  // namespace grcsf
