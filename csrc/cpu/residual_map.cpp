// SPDX-License-Identifier: Apache-2.0
// residual_map on the CPU, forward and backward.
//
// One patch at a time: its voxels are gathered into token order in a buffer that stays in cache
// (P * C values), every draw's token streams past it once, and the result is scattered back. So
// each prediction is read once, image and residual once, in long runs; the token order only costs
// a shuffle inside the cache. Patches are independent: threads share nothing, and the bits do not
// depend on their number.
//
// Bytes: forward N * V * C predictions + 2 * V * C of image; backward twice the predictions and
// 3 * V * C of image.
//
// This file is compiled once for each instruction set, into the namespace GRCSF_ISA. Everything
// else has internal linkage (see half.h).
#include "cpu/residual_map.h"

#include <cmath>
#include <type_traits>

#include "common/half.h"
#include "common/parallel.h"
#include "common/workspace.h"

namespace grcsf {
namespace GRCSF_ISA {
namespace {

// Sums are taken in float, in double for double data.
template <typename T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

struct Geometry {
  std::int64_t draws, batch, channels, tokens, values;  // values: P * C of one token
  std::int64_t grid[3], patch[3];
};

Geometry geometry_of(const ResidualMapArguments& arguments) {
  Geometry g{};
  const auto& image = arguments.image;
  g.draws = arguments.prediction.shape[0];
  g.batch = image.shape[0];
  g.channels = image.shape[1];
  g.tokens = 1;
  g.values = g.channels;
  for (int axis = 0; axis < 3; ++axis) {
    g.patch[axis] = arguments.patch[axis];
    g.grid[axis] = image.shape[2 + axis] / g.patch[axis];
    g.tokens *= g.grid[axis];
    g.values *= g.patch[axis];
  }
  return g;
}

// Calls visit(row, values) for each row of voxels of patch `token` of sample `b`: `row` is the
// offset in the tensor of the row's first voxel, `values` that of its values in token order.
template <typename Visit>
void for_each_row(const TensorView& view, const Geometry& g, std::int64_t b, std::int64_t token,
                  Visit visit) {
  const std::int64_t w = token % g.grid[2];
  const std::int64_t h = token / g.grid[2] % g.grid[1];
  const std::int64_t d = token / (g.grid[2] * g.grid[1]);
  const std::int64_t origin = b * view.strides[0] + d * g.patch[0] * view.strides[2] +
                              h * g.patch[1] * view.strides[3] + w * g.patch[2] * view.strides[4];
  std::int64_t values = 0;
  for (std::int64_t z = 0; z < g.patch[0]; ++z) {
    for (std::int64_t y = 0; y < g.patch[1]; ++y) {
      visit(origin + z * view.strides[2] + y * view.strides[3], values);
      values += g.patch[2] * g.channels;
    }
  }
}

// Whether a row of voxels is one run of values in memory: one channel, or channels-last.
bool rows_are_runs(const TensorView& view, const Geometry& g) {
  const bool voxels_adjacent = g.patch[2] == 1 || view.strides[4] == g.channels;
  return voxels_adjacent && (g.channels == 1 || view.strides[1] == 1);
}

template <typename T>
void gather(const TensorView& view, const Geometry& g, std::int64_t b, std::int64_t token,
            Compute<T>* __restrict out) {
  const T* data = static_cast<const T*>(view.data);
  const bool runs = rows_are_runs(view, g);
  for_each_row(view, g, b, token, [&](std::int64_t row, std::int64_t values) {
    const T* __restrict from = data + row;
    Compute<T>* __restrict to = out + values;
    if (runs) {
      const std::int64_t length = g.patch[2] * g.channels;
      for (std::int64_t i = 0; i < length; ++i) to[i] = widen(from[i]);
    } else {
      for (std::int64_t c = 0; c < g.channels; ++c) {
        for (std::int64_t x = 0; x < g.patch[2]; ++x) {
          to[x * g.channels + c] = widen(from[c * view.strides[1] + x * view.strides[4]]);
        }
      }
    }
  });
}

template <typename T>
void scatter(const Compute<T>* __restrict in, const Geometry& g, std::int64_t b, std::int64_t token,
             const TensorView& view) {
  T* data = static_cast<T*>(view.data);
  const bool runs = rows_are_runs(view, g);
  for_each_row(view, g, b, token, [&](std::int64_t row, std::int64_t values) {
    T* __restrict to = data + row;
    const Compute<T>* __restrict from = in + values;
    if (runs) {
      const std::int64_t length = g.patch[2] * g.channels;
      for (std::int64_t i = 0; i < length; ++i) narrow(from[i], to[i]);
    } else {
      for (std::int64_t c = 0; c < g.channels; ++c) {
        for (std::int64_t x = 0; x < g.patch[2]; ++x) {
          narrow(from[x * g.channels + c], to[c * view.strides[1] + x * view.strides[4]]);
        }
      }
    }
  });
}

// What turns a prediction into intensities: prediction * scale + offset.
template <typename A>
struct Target {
  A scale = 1;
  A offset = 0;
};

template <typename A>
Target<A> statistics(const A* __restrict image, std::int64_t values, double eps) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t i = 0; i < values; ++i) sum += image[i];
  const double mean = sum / static_cast<double>(values);
  double squares = 0;
#pragma omp simd reduction(+ : squares)
  for (std::int64_t i = 0; i < values; ++i) squares += (image[i] - mean) * (image[i] - mean);
  const double variance = squares / static_cast<double>(values - 1);
  return {static_cast<A>(std::sqrt(variance + eps)), static_cast<A>(mean)};
}

// The sign of a difference; NaN stays NaN, as in torch.sgn.
template <typename A>
A sign(A difference) {
  return difference > 0 ? A(1) : (difference < 0 ? A(-1) : difference);
}

// The tokens of one patch in all draws.
template <typename P>
struct Draws {
  P* prediction;
  const std::uint8_t* hidden;
  std::int64_t stride, hidden_stride, draws;

  Draws(const ResidualMapArguments& arguments, const TensorView& tokens, const Geometry& g,
        std::int64_t patch)
      : prediction(static_cast<P*>(tokens.data) + patch * g.values),
        hidden(arguments.hidden.data == nullptr
                   ? nullptr
                   : static_cast<const std::uint8_t*>(arguments.hidden.data) + patch),
        stride(g.batch * g.tokens * g.values),
        hidden_stride(g.batch * g.tokens),
        draws(g.draws) {}

  bool counts(std::int64_t draw) const {
    return hidden == nullptr || hidden[draw * hidden_stride] != 0;
  }

  std::int64_t count() const {
    std::int64_t total = 0;
    for (std::int64_t draw = 0; draw < draws; ++draw) total += counts(draw) ? 1 : 0;
    return total;
  }

  P* token(std::int64_t draw) const { return prediction + draw * stride; }
};

template <typename P, typename A>
void add_predictions(const Draws<P>& draws, std::int64_t values, A* __restrict total) {
  for (std::int64_t i = 0; i < values; ++i) total[i] = 0;
  for (std::int64_t draw = 0; draw < draws.draws; ++draw) {
    if (!draws.counts(draw)) continue;
    const P* __restrict token = draws.token(draw);
    for (std::int64_t i = 0; i < values; ++i) total[i] += static_cast<A>(widen(token[i]));
  }
}

// Runs body(patch, buffers) for every patch, with `buffers` * values values for each thread.
template <typename A, typename Body>
void for_each_patch(const ResidualMapArguments& arguments, const Geometry& g, int buffers,
                    Body body) {
  const int threads = arguments.threads < 1 ? 1 : arguments.threads;
  const Workspace<A> space(threads, buffers * g.values);
  struct Context {
    Body& body;
    const Workspace<A>& space;
  } context{body, space};
  parallel_ranges(
      g.batch * g.tokens, threads,
      [](void* data, std::int64_t begin, std::int64_t end, int thread) {
        auto& own = *static_cast<Context*>(data);
        for (std::int64_t patch = begin; patch < end; ++patch) {
          own.body(patch, own.space.piece(thread));
        }
      },
      &context);
}

template <typename T, typename P>
void forward(const ResidualMapArguments& arguments) {
  using A = Compute<T>;
  const Geometry g = geometry_of(arguments);
  auto body = [&](std::int64_t patch, A* buffers) {
    const std::int64_t b = patch / g.tokens, token_index = patch % g.tokens;
    A* __restrict image = buffers;
    A* __restrict total = buffers + g.values;
    const Draws<P> draws(arguments, arguments.prediction, g, patch);
    const std::int64_t count = draws.count();
    const A share = count == 0 ? A(0) : A(1) / static_cast<A>(count);
    gather<T>(arguments.image, g, b, token_index, image);
    Target<A> target;
    if (arguments.normalized_target) target = statistics(image, g.values, arguments.eps);

    if (arguments.average_reconstructions) {
      add_predictions(draws, g.values, total);
      for (std::int64_t i = 0; i < g.values; ++i) {
        const A shown = total[i] * share * target.scale + target.offset;
        total[i] = count == 0 ? A(0) : std::fabs(image[i] - shown);
      }
    } else {
      for (std::int64_t i = 0; i < g.values; ++i) total[i] = 0;
      for (std::int64_t draw = 0; draw < g.draws; ++draw) {
        if (!draws.counts(draw)) continue;
        const P* __restrict token = draws.token(draw);
        for (std::int64_t i = 0; i < g.values; ++i) {
          const A shown = static_cast<A>(widen(token[i])) * target.scale + target.offset;
          total[i] += std::fabs(image[i] - shown);
        }
      }
      for (std::int64_t i = 0; i < g.values; ++i) total[i] *= share;
    }
    scatter<T>(total, g, b, token_index, arguments.residual);
  };
  for_each_patch<A>(arguments, g, 2, body);
}

template <typename T, typename P>
void backward(const ResidualMapArguments& arguments) {
  using A = Compute<T>;
  const Geometry g = geometry_of(arguments);
  const bool wants_prediction = arguments.grad_prediction.data != nullptr;
  auto body = [&](std::int64_t patch, A* buffers) {
    const std::int64_t b = patch / g.tokens, token_index = patch % g.tokens;
    A* __restrict image = buffers;
    A* __restrict grad = buffers + g.values;
    A* __restrict total = buffers + 2 * g.values;  // gradient that reaches the image directly
    A* __restrict mean = buffers + 3 * g.values;   // mean prediction over draws
    const Draws<P> draws(arguments, arguments.prediction, g, patch);
    const Draws<P> grads(arguments, arguments.grad_prediction, g, patch);
    const std::int64_t count = draws.count();
    const A share = count == 0 ? A(0) : A(1) / static_cast<A>(count);
    gather<T>(arguments.image, g, b, token_index, image);
    gather<T>(arguments.grad_residual, g, b, token_index, grad);
    Target<A> target;
    if (arguments.normalized_target) target = statistics(image, g.values, arguments.eps);

    double grad_scale = 0, grad_offset = 0;
    for (std::int64_t i = 0; i < g.values; ++i) total[i] = 0;
    if (arguments.average_reconstructions && count > 0) {
      add_predictions(draws, g.values, mean);
#pragma omp simd reduction(+ : grad_scale, grad_offset)
      for (std::int64_t i = 0; i < g.values; ++i) {
        const A shown = mean[i] * share;
        const A reaching = grad[i] * sign(image[i] - (shown * target.scale + target.offset));
        total[i] = reaching;
        grad_scale -= reaching * shown;
        grad_offset -= reaching;
      }
    }
    for (std::int64_t draw = 0; draw < g.draws; ++draw) {
      P* __restrict grad_token = wants_prediction ? grads.token(draw) : nullptr;
      if (!draws.counts(draw)) {
        if (wants_prediction) {
          for (std::int64_t i = 0; i < g.values; ++i) narrow(A(0), grad_token[i]);
        }
        continue;
      }
      if (arguments.average_reconstructions) {
        if (wants_prediction) {
          const A factor = -share * target.scale;
          for (std::int64_t i = 0; i < g.values; ++i) narrow(total[i] * factor, grad_token[i]);
        }
        continue;
      }
      const P* __restrict token = draws.token(draw);
      if (wants_prediction) {
#pragma omp simd reduction(+ : grad_scale, grad_offset)
        for (std::int64_t i = 0; i < g.values; ++i) {
          const A value = static_cast<A>(widen(token[i]));
          const A shown = value * target.scale + target.offset;
          const A reaching = grad[i] * share * sign(image[i] - shown);
          total[i] += reaching;
          grad_scale -= reaching * value;
          grad_offset -= reaching;
          narrow(-reaching * target.scale, grad_token[i]);
        }
      } else {
#pragma omp simd reduction(+ : grad_scale, grad_offset)
        for (std::int64_t i = 0; i < g.values; ++i) {
          const A value = static_cast<A>(widen(token[i]));
          const A shown = value * target.scale + target.offset;
          const A reaching = grad[i] * share * sign(image[i] - shown);
          total[i] += reaching;
          grad_scale -= reaching * value;
          grad_offset -= reaching;
        }
      }
    }
    if (arguments.grad_image.data == nullptr) return;
    if (arguments.normalized_target) {
      // The image also acts through the mean and the variance of its patch.
      const A through_mean = static_cast<A>(grad_offset / static_cast<double>(g.values));
      const A through_variance =
          static_cast<A>(grad_scale / (static_cast<double>(g.values - 1) * target.scale));
      for (std::int64_t i = 0; i < g.values; ++i) {
        total[i] += through_mean + through_variance * (image[i] - target.offset);
      }
    }
    scatter<T>(total, g, b, token_index, arguments.grad_image);
  };
  for_each_patch<A>(arguments, g, 4, body);
}

// Calls run<T, P>() for the dtypes of image and prediction; the latter is never more precise.
template <template <typename, typename> class Run>
void for_dtypes(const ResidualMapArguments& arguments) {
  const DType prediction = arguments.prediction.dtype;
  switch (arguments.image.dtype) {
    case DType::float64:
      if (prediction == DType::float64) return Run<double, double>::run(arguments);
      if (prediction == DType::float32) return Run<double, float>::run(arguments);
      if (prediction == DType::float16) return Run<double, float16>::run(arguments);
      return Run<double, bfloat16>::run(arguments);
    case DType::float32:
      if (prediction == DType::float32) return Run<float, float>::run(arguments);
      if (prediction == DType::float16) return Run<float, float16>::run(arguments);
      return Run<float, bfloat16>::run(arguments);
    case DType::float16:
      if (prediction == DType::float16) return Run<float16, float16>::run(arguments);
      return Run<float16, bfloat16>::run(arguments);
    default:
      return Run<bfloat16, bfloat16>::run(arguments);
  }
}

template <typename T, typename P>
struct Forward {
  static void run(const ResidualMapArguments& arguments) { forward<T, P>(arguments); }
};

template <typename T, typename P>
struct Backward {
  static void run(const ResidualMapArguments& arguments) { backward<T, P>(arguments); }
};

}  // namespace

void residual_map_forward(const ResidualMapArguments& arguments) { for_dtypes<Forward>(arguments); }

void residual_map_backward(const ResidualMapArguments& arguments) {
  for_dtypes<Backward>(arguments);
}

}  // namespace GRCSF_ISA
}  // namespace grcsf
