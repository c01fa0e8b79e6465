// SPDX-License-Identifier: Apache-2.0
// Runs every kernel, forward and backward, on threads that ThreadSanitizer sees into. OpenMP's
// runtime is not compiled for it, so that barriers go unseen and every region would be reported;
// here parallel_ranges() starts threads of its own and joins them. Built and run by sanitize.py;
// with an argument it commits a race on purpose, which has to be reported.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <thread>
#include <vector>

#include "cpu/runtime/parallel.h"
#include "cpu/gcu/gcu.h"
#include "cpu/rcu/rcu.h"
#include "cpu/residual_map/residual_map.h"

namespace grcsf {

void parallel_ranges(std::int64_t count, int threads, RangeFunction function, void* context) {
  const std::int64_t parts = std::min<std::int64_t>(threads, count);
  std::vector<std::thread> pool;
  for (std::int64_t part = 0; part < parts; ++part) {
    pool.emplace_back(function, context, part * count / parts, (part + 1) * count / parts,
                      static_cast<int>(part));
  }
  for (std::thread& thread : pool) thread.join();
}

namespace {

constexpr int threads = 4;

// A tensor of float32 with values in [-1, 1]; its memory begins new at every call.
struct Tensor {
  std::vector<float> values;
  TensorView view;

  explicit Tensor(const std::vector<std::int64_t>& shape, bool channels_last = false) {
    std::int64_t count = 1;
    view.axes = static_cast<int>(shape.size());
    for (int axis = view.axes - 1; axis >= 0; --axis) {
      view.shape[axis] = shape[axis];
      view.strides[axis] = count;
      count *= shape[axis];
    }
    if (channels_last) {
      count = 1;
      for (const int axis : {1, 4, 3, 2, 0}) {
        view.strides[axis] = count;
        count *= shape[axis];
      }
    }
    values.resize(count);
    static std::uint32_t state = 1;
    for (float& value : values) {
      state = state * 1664525u + 1013904223u;
      value = static_cast<float>(state >> 8) / 8388608.0f - 1;
    }
    view.data = values.data();
  }
};

void run_gcu(std::int64_t channels, std::int64_t depth, std::int64_t width, bool last) {
  const std::vector<std::int64_t> space = {2, channels, depth, 9, width};
  const std::vector<std::int64_t> deep_space = {2, channels, (depth + 1) / 2, 5, (width + 1) / 2};
  Tensor skip(space, last), deep(deep_space, last), skip_gate({2, channels});
  Tensor deep_gate({2, channels}), compensated(space, last), grad_skip(space, last);
  Tensor map({2, 1, depth, 9, width}), grad_map(map), grad(space, last);
  Tensor grad_deep(deep_space, last), grad_skip_gate({2, channels}), grad_deep_gate({2, channels});
  grad_map.view.data = grad_map.values.data();
  GcuArguments arguments;
  arguments.skip = skip.view;
  arguments.deep = deep.view;
  arguments.skip_gate = skip_gate.view;
  arguments.deep_gate = deep_gate.view;
  arguments.eps = 1e-6;
  arguments.threads = threads;
  arguments.compensated = compensated.view;
  arguments.dissimilarity = map.view;
  portable::gcu_forward(arguments);
  arguments.grad_compensated = grad.view;
  arguments.grad_dissimilarity = grad_map.view;
  arguments.grad_skip = grad_skip.view;
  arguments.grad_deep = grad_deep.view;
  arguments.grad_skip_gate = grad_skip_gate.view;
  arguments.grad_deep_gate = grad_deep_gate.view;
  portable::gcu_backward(arguments);
}

// `patch` of all axes; 0: the whole volume.
void run_rcu(std::int64_t channels, std::int64_t map_channels, std::int64_t patch, bool last) {
  constexpr std::int64_t maps = 2, heads = 3, hidden = 4, size[3] = {11, 13, 17};
  const std::vector<std::int64_t> space = {2, channels, size[0], size[1], size[2]};
  const std::vector<std::int64_t> map_space = {2, maps, map_channels, size[0], size[1], size[2]};
  const std::vector<std::int64_t> shapes[] = {{maps, heads, map_channels, channels},
                                              {maps, heads, map_channels},
                                              {maps, channels, heads, map_channels},
                                              {maps, channels},
                                              {hidden, channels + maps * map_channels},
                                              {2, hidden},
                                              {hidden},
                                              {}};
  std::vector<std::int64_t> grid = {2};
  RcuArguments arguments;
  for (int axis = 0; axis < 3; ++axis) {
    arguments.patch[axis] = patch == 0 ? size[axis] : patch;
    grid.push_back((size[axis] + arguments.patch[axis] - 1) / arguments.patch[axis]);
  }
  Tensor x(space, last), residual(map_space), out(space, last), scores(grid), grad_scores(grid);
  Tensor grad(space, last), grad_x(space, last), grad_residual(map_space);
  std::vector<Tensor> weights, grads;
  for (const auto& shape : shapes) {
    weights.emplace_back(shape);
    grads.emplace_back(shape);
  }
  const auto name = [](std::vector<Tensor>& of) {
    return RcuWeights{of[0].view, of[1].view, of[2].view, of[3].view,
                      of[4].view, of[5].view, of[6].view, of[7].view};
  };
  arguments.x = x.view;
  arguments.residual = residual.view;
  arguments.weights = name(weights);
  arguments.threads = threads;
  arguments.out = out.view;
  arguments.scores = scores.view;
  portable::rcu_forward(arguments);
  arguments.grad_out = grad.view;
  arguments.grad_scores = grad_scores.view;
  arguments.grad_x = grad_x.view;
  arguments.grad_residual = grad_residual.view;
  arguments.grad_weights = name(grads);
  portable::rcu_backward(arguments);
}

void run_residual_map() {
  Tensor image({2, 3, 8, 12, 16}), residual({2, 3, 8, 12, 16}), grad({2, 3, 8, 12, 16});
  Tensor grad_image({2, 3, 8, 12, 16}), prediction({3, 2, 24, 192});
  Tensor grad_prediction({3, 2, 24, 192});
  ResidualMapArguments arguments;
  arguments.image = image.view;
  arguments.prediction = prediction.view;
  for (std::int64_t& size : arguments.patch) size = 4;
  arguments.normalized_target = true;
  arguments.eps = 1e-6;
  arguments.threads = threads;
  arguments.residual = residual.view;
  portable::residual_map_forward(arguments);
  arguments.grad_residual = grad.view;
  arguments.grad_image = grad_image.view;
  arguments.grad_prediction = grad_prediction.view;
  portable::residual_map_backward(arguments);
}

void race() {
  std::int64_t sum = 0;
  parallel_for(threads, threads, [&](std::int64_t begin, std::int64_t, int) { sum += begin; });
  std::printf("raced to %lld\n", static_cast<long long>(sum));
}

}  // namespace
}  // namespace grcsf

int main(int count, char**) {
  using namespace grcsf;
  if (count > 1) {
    race();
    return 0;
  }
  for (const bool last : {false, true}) {
    run_gcu(5, 7, 33, last);
    run_gcu(48, 2, 600, last);  // rows in several blocks
    run_gcu(6, 1, 18, last);
    for (const std::int64_t map_channels : {1, 2}) {
      run_rcu(4, map_channels, 5, last);  // patch by patch
      run_rcu(4, map_channels, 1, last);
      run_rcu(16, map_channels, 0, last);  // all threads on one patch
    }
  }
  run_residual_map();
  std::printf("every kernel ran on %d threads\n", threads);
  return 0;
}
