// SPDX-License-Identifier: Apache-2.0
// residual_map on the CPU, forward and backward.
//
// One patch at a time: its voxels are gathered into token order in a buffer that stays in cache
// (P * C values), the tokens of all draws stream past it together, and the result is scattered
// back. So each prediction is read once, image and residual once, in long runs; the token order
// only costs a shuffle inside the cache. Patches are independent: threads share nothing, and the
// bits do not depend on their number. The gradient of the predictions is as large as they are, and
// is written past the cache: else every line of it would be read first.
//
// Bytes: forward N * V * C predictions + 2 * V * C of image; backward twice the predictions and
// 3 * V * C of image.
//
// This file is compiled once for each instruction set, into the namespace GRCSF_ISA. Everything
// else has internal linkage (see half.h).
#include "cpu/residual_map/residual_map.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "cpu/runtime/memory.h"
#include "cpu/runtime/parallel.h"
#include "cpu/runtime/workspace.h"
#include "cpu/simd/packing.h"
#include "cpu/simd/simd.h"

namespace grcsf {
namespace GRCSF_ISA {
namespace {

// Values that are converted before they are written.
constexpr std::int64_t staged = 512;
// A result of so many values is too large to stay in the cache.
constexpr std::int64_t past_cache_from = 2 << 20;

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
            ComputeType<T>* __restrict out) {
  const T* data = static_cast<const T*>(view.data);
  const bool runs = rows_are_runs(view, g);
  for_each_row(view, g, b, token, [&](std::int64_t row, std::int64_t values) {
    const T* __restrict from = data + row;
    ComputeType<T>* __restrict to = out + values;
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

// Asks for the image of the patch after this one: a row of a patch is a cache line or two, too
// short for the hardware to foresee the next.
template <typename T>
void prefetch_next(const TensorView& view, const Geometry& g, std::int64_t b, std::int64_t token) {
  if (token + 1 == g.tokens || !rows_are_runs(view, g)) return;
  const T* data = static_cast<const T*>(view.data);
  const std::int64_t bytes = g.patch[2] * g.channels * static_cast<std::int64_t>(sizeof(T));
  for_each_row(view, g, b, token + 1,
               [&](std::int64_t row, std::int64_t) { prefetch_bytes(data + row, bytes); });
}

// The inverse of gather(); large results are written past the cache.
template <typename T>
void scatter(const ComputeType<T>* __restrict in, const Geometry& g, std::int64_t b,
             std::int64_t token, const TensorView& view) {
  T* data = static_cast<T*>(view.data);
  const bool runs = rows_are_runs(view, g);
  const bool past_cache = g.batch * g.tokens * g.values >= past_cache_from;
  for_each_row(view, g, b, token, [&](std::int64_t row, std::int64_t values) {
    T* __restrict to = data + row;
    const ComputeType<T>* __restrict from = in + values;
    if (runs) {
      const std::int64_t length = g.patch[2] * g.channels;
      alignas(64) T stage[staged];
      for (std::int64_t i = 0; i < length; i += staged) {
        write_run<T>(from + i, std::min(staged, length - i), to + i, past_cache, stage);
      }
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
  const auto count = static_cast<double>(values);
  // About the first value, which is at most sqrt(values) standard deviations from the mean: what
  // cancels in the variance costs no more than 16 bits of a double, which float data does not miss.
  double about = std::is_same_v<A, double> ? 0.0 : static_cast<double>(image[0]);
  double sum = 0, squares = 0;
  if constexpr (std::is_same_v<A, double>) {
#pragma omp simd reduction(+ : sum)
    for (std::int64_t i = 0; i < values; ++i) sum += image[i];
    about = sum / count;
    sum = 0;
  }
#pragma omp simd reduction(+ : sum, squares)
  for (std::int64_t i = 0; i < values; ++i) {
    const double difference = image[i] - about;
    sum += difference;
    squares += difference * difference;
  }
  const double variance = (squares - sum * sum / count) / static_cast<double>(values - 1);
  const double bounded = variance < 0 ? 0 : variance;
  return {static_cast<A>(std::sqrt(bounded + eps)), static_cast<A>(about + sum / count)};
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

// Draws whose tokens are read at the same time.
constexpr int together = 8;

// Adds |image - reconstruction| of N draws to `total`.
template <int N, typename P, typename A>
void add_residuals_of(const P* const* tokens, std::int64_t values, const A* __restrict image,
                      const Target<A>& target, A* __restrict total) {
  std::int64_t i = 0;
  if constexpr (std::is_same_v<ComputeType<P>, A>) {
    for (; i + lanes<A> <= values; i += lanes<A>) {
      const Vec<A> own = load(image + i) - target.offset;
      Vec<A> sum = load(total + i);
      for (int n = 0; n < N; ++n) {
        const Vec<A> difference = own - load(tokens[n] + i) * target.scale;
        sum += difference < 0 ? -difference : difference;
      }
      store(sum, total + i);
    }
  }
  for (; i < values; ++i) {
    const A own = image[i] - target.offset;
    for (int n = 0; n < N; ++n) {
      total[i] += std::fabs(own - static_cast<A>(widen(tokens[n][i])) * target.scale);
    }
  }
}

template <typename P, typename A>
void add_residuals(const P* const* tokens, int count, std::int64_t values, const A* image,
                   const Target<A>& target, A* total) {
  int first = 0;
  for (; first + 4 <= count; first += 4) {
    add_residuals_of<4>(tokens + first, values, image, target, total);
  }
  if (count - first == 3) add_residuals_of<3>(tokens + first, values, image, target, total);
  if (count - first == 2) add_residuals_of<2>(tokens + first, values, image, target, total);
  if (count - first == 1) add_residuals_of<1>(tokens + first, values, image, target, total);
}

// Runs body(patch, buffers) for every patch, with `buffers` * values values for each thread.
template <typename A, typename Body>
void for_each_patch(const ResidualMapArguments& arguments, const Geometry& g, int buffers,
                    Body body) {
  const int threads = arguments.threads < 1 ? 1 : arguments.threads;
  // A vector is read beyond the end where values are converted.
  const Workspace<A> space(threads, buffers * g.values + 16);
  parallel_for(g.batch * g.tokens, threads, [&](std::int64_t begin, std::int64_t end, int thread) {
    for (std::int64_t patch = begin; patch < end; ++patch) {
      body(patch, space.piece(thread));
    }
    end_of_stream();
  });
}

template <typename T, typename P>
void forward(const ResidualMapArguments& arguments) {
  using A = ComputeType<T>;
  const Geometry g = geometry_of(arguments);
  expect_whole_write(arguments.residual);
  auto body = [&](std::int64_t patch, A* buffers) {
    const std::int64_t b = patch / g.tokens, token_index = patch % g.tokens;
    A* __restrict image = buffers;
    A* __restrict total = buffers + g.values;
    const Draws<P> draws(arguments, arguments.prediction, g, patch);
    const std::int64_t count = draws.count();
    const A share = count == 0 ? A(0) : A(1) / static_cast<A>(count);
    gather<T>(arguments.image, g, b, token_index, image);
    prefetch_next<T>(arguments.image, g, b, token_index);
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
      const P* tokens[together];
      int held = 0;
      for (std::int64_t draw = 0; draw < g.draws; ++draw) {
        if (draws.counts(draw)) tokens[held++] = draws.token(draw);
        if (held < together && draw + 1 < g.draws) continue;
        add_residuals(tokens, held, g.values, image, target, total);
        held = 0;
      }
      for (std::int64_t i = 0; i < g.values; ++i) total[i] *= share;
    }
    scatter<T>(total, g, b, token_index, arguments.residual);
  };
  for_each_patch<A>(arguments, g, 2, body);
}

template <typename T, typename P>
void backward(const ResidualMapArguments& arguments) {
  using A = ComputeType<T>;
  const Geometry g = geometry_of(arguments);
  const bool wants_prediction = arguments.grad_prediction.data != nullptr;
  const bool past_cache = g.draws * g.batch * g.tokens * g.values >= past_cache_from;
  expect_whole_write(arguments.grad_prediction);
  expect_whole_write(arguments.grad_image);
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
    // A few values of all draws at a time: image, grad and total stay in the first-level cache.
    for (std::int64_t begin = 0; begin < g.values; begin += staged) {
      const std::int64_t end = std::min(g.values, begin + staged);
      for (std::int64_t draw = 0; draw < g.draws; ++draw) {
        alignas(64) P stage[staged];
        const P* __restrict token = draws.token(draw);
        if (!draws.counts(draw)) {
          if (!wants_prediction) continue;
          for (std::int64_t i = begin; i < end; ++i) narrow(A(0), stage[i - begin]);
        } else if (arguments.average_reconstructions) {
          const A factor = -share * target.scale;
          for (std::int64_t i = begin; i < end; ++i) narrow(total[i] * factor, stage[i - begin]);
        } else {
#pragma omp simd reduction(+ : grad_scale, grad_offset)
          for (std::int64_t i = begin; i < end; ++i) {
            const A value = static_cast<A>(widen(token[i]));
            const A shown = value * target.scale + target.offset;
            const A reaching = grad[i] * share * sign(image[i] - shown);
            total[i] += reaching;
            grad_scale -= reaching * value;
            grad_offset -= reaching;
            narrow(-reaching * target.scale, stage[i - begin]);
          }
        }
        if (!wants_prediction) continue;
        const std::int64_t bytes = (end - begin) * static_cast<std::int64_t>(sizeof(P));
        if (past_cache) {
          stream_bytes(stage, grads.token(draw) + begin, bytes);
        } else {
          std::memcpy(grads.token(draw) + begin, stage, static_cast<std::size_t>(bytes));
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
