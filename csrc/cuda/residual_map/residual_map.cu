// SPDX-License-Identifier: Apache-2.0
// residual_map on CUDA, forward and backward: one pass over all draws each.
//
// Tiling. A group of threads, a warp or a block, takes one token (one patch of one sample), or
// without a normalized target a piece of one. A thread takes vectors of 16 bytes of the image and
// the same values of `together` draws at a time, all of whose loads are under way before the first
// is used. A token is contiguous in the predictions. In the volume, with one channel or channels
// last, a row of a patch is a run of memory in the order of tokens, so that vectors fit both; with
// several channels that are each a volume of their own, values are taken one by one and L1 joins
// what the voxels of a row have in common.
//
// Bytes: forward image, residual, and the draws that count, once each. Backward: image, its two
// gradients, the draws that count and the gradient of every draw, once each. The statistics of a
// normalized target read the image of the patch twice more, and backward once more, from cache.
//
// No thread writes what another one reads, but for sums in shared memory: the bits do not change
// from run to run.
#include "cuda/residual_map/residual_map.h"

#include "cuda/runtime/launch.cuh"

namespace grcsf {
namespace cuda {
namespace {

constexpr int block_threads = 256;
constexpr int together = 4;  // draws whose loads are under way at the same time

// Tokens of up to so many values: a warp each.
inline std::int64_t warp_values() { return from_size(1024, 64); }
inline std::int64_t piece_values() { return from_size(4096, 256); }
// Gradients that a block keeps in shared memory.
inline std::int64_t kept_bytes() { return from_size(48 << 10, 2 << 10); }

struct Map {
  const void *image, *prediction, *grad_residual;
  const std::uint8_t* hidden;
  void *residual, *grad_image, *grad_prediction;
  std::int64_t stride_b, stride_c, stride_d, stride_h, stride_w;
  std::int64_t all_tokens, tokens, pieces, piece;  // of all samples, of one; of a token, values
  int grid_h, grid_w, patch_d, patch_h, patch_w, channels;
  int values;        // of a token
  int draws, lanes;  // lanes: threads of a group
  bool runs;         // a row of a patch is a run of memory
  bool normalized, reconstructions, kept;
  double eps;
};

// One token, or a piece of it, and what of the group's values this thread takes.
struct Share {
  std::int64_t token, corner;
  int begin, end, group, lane;
};

__device__ __forceinline__ Share share_of(const Map& m) {
  Share share;
  share.group = static_cast<int>(threadIdx.x) / m.lanes;
  share.lane = static_cast<int>(threadIdx.x) % m.lanes;
  const std::int64_t groups = blockDim.x / m.lanes;
  const std::int64_t item = blockIdx.x * groups + share.group;
  share.token = item / m.pieces;
  share.begin = static_cast<int>(item % m.pieces * m.piece);
  share.end = static_cast<int>(least<std::int64_t>(share.begin + m.piece, m.values));
  if (share.token >= m.all_tokens) share.end = share.begin;  // takes part in barriers only
  const std::int64_t sample = share.token / m.tokens;
  const int place = static_cast<int>(share.token % m.tokens);
  const int w = place % m.grid_w, h = place / m.grid_w % m.grid_h, d = place / m.grid_w / m.grid_h;
  share.corner = sample * m.stride_b + std::int64_t(d) * m.patch_d * m.stride_d +
                 std::int64_t(h) * m.patch_h * m.stride_h +
                 std::int64_t(w) * m.patch_w * m.stride_w;
  return share;
}

// Where a value of a token lies in the volume, from the token's corner.
__device__ __forceinline__ std::int64_t place_of(const Map& m, int value) {
  const int row_values = m.patch_w * m.channels;
  const int row = value / row_values, rest = value % row_values;
  const int z = row / m.patch_h, y = row % m.patch_h;
  const std::int64_t start = z * m.stride_d + y * m.stride_h;
  if (m.runs) return start + rest;
  return start + rest / m.channels * m.stride_w + rest % m.channels * m.stride_c;
}

__device__ __forceinline__ bool counts(const Map& m, int draw, std::int64_t token) {
  return m.hidden == nullptr || m.hidden[draw * m.all_tokens + token] != 0;
}

__device__ __forceinline__ int count_of(const Map& m, std::int64_t token) {
  if (m.hidden == nullptr || token >= m.all_tokens) return m.draws;
  int count = 0;
  for (int draw = 0; draw < m.draws; ++draw) count += counts(m, draw, token) ? 1 : 0;
  return count;
}

// Sum over a group, a warp or the block; the block's barrier is reached by all of its threads.
template <typename A>
__device__ __forceinline__ A group_sum(const Map& m, A value, const Shared<A>& space) {
  if (m.lanes == warp_size) return warp_sum(value);
  const A sum = block_sum(value, space);
  sync_block();  // `space` is free again
  return sum;
}

// What turns a prediction into intensities: prediction * scale + offset.
template <typename A>
struct Target {
  A scale = 1, offset = 0;
};

// Of the image of a patch. Values are taken about the patch's first one and squares about the mean,
// so that a patch that is constant, or nearly so, far from 0 does not cancel.
template <typename T, int N, typename A = ComputeType<T>>
__device__ __forceinline__ Target<A> statistics(const Map& m, const Share& share,
                                                const Shared<A>& space) {
  const T* image = static_cast<const T*>(m.image) + share.corner;
  const bool exists = share.end > share.begin;
  const A about = exists ? widened(image[0]) : A(0);
  A sum = 0;
  for (int i = share.begin + share.lane * N; i < share.end; i += m.lanes * N) {
    const auto pack = load_pack<T, N>(image + place_of(m, i));
#pragma unroll
    for (int j = 0; j < N; ++j) sum += widened(pack[j]) - about;
  }
  const A mean = about + group_sum(m, sum, space) / static_cast<A>(m.values);
  A squares = 0;
  for (int i = share.begin + share.lane * N; i < share.end; i += m.lanes * N) {
    const auto pack = load_pack<T, N>(image + place_of(m, i));
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const A difference = widened(pack[j]) - mean;
      squares += difference * difference;
    }
  }
  const A variance = group_sum(m, squares, space) / static_cast<A>(m.values - 1);
  return {static_cast<A>(sqrt(variance + static_cast<A>(m.eps))), mean};
}

// Calls body(draw, counts, pack) for every draw; loads of `together` draws are under way at a time.
template <typename P, int N, typename Body>
__device__ __forceinline__ void each_draw(const Map& m, std::int64_t token, int value, Body body) {
  const P* prediction = static_cast<const P*>(m.prediction) + token * m.values + value;
  const std::int64_t stride = m.all_tokens * m.values;
  for (int first = 0; first < m.draws; first += together) {
    Pack<P, N> packs[together] = {};
    bool counted[together];
#pragma unroll
    for (int j = 0; j < together; ++j) {
      counted[j] = first + j < m.draws && counts(m, first + j, token);
      if (counted[j]) packs[j] = load_once<P, N>(prediction + (first + j) * stride);
    }
#pragma unroll
    for (int j = 0; j < together; ++j) {
      if (first + j < m.draws) body(first + j, counted[j], packs[j]);
    }
  }
}

template <typename T, typename P, int N>
__global__ void __launch_bounds__(block_threads, 2) residual_map_forward_kernel(const Map m) {
  using A = ComputeType<T>;
  SharedArena arena;
  const auto space = arena.take<A>(block_threads / warp_size);
  const Share share = share_of(m);
  Target<A> target;
  if (m.normalized) target = statistics<T, N>(m, share, space);
  const int count = count_of(m, share.token);
  const A weight = count == 0 ? A(0) : A(1) / static_cast<A>(count);
  const T* image = static_cast<const T*>(m.image) + share.corner;
  T* residual = static_cast<T*>(m.residual) + share.corner;
  for (int i = share.begin + share.lane * N; i < share.end; i += m.lanes * N) {
    const std::int64_t place = place_of(m, i);
    const auto x = load_pack<T, N>(image + place);
    A total[N] = {};
    each_draw<P, N>(m, share.token, i, [&](int, bool counted, const Pack<P, N>& shown) {
      if (!counted) return;
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const A value = static_cast<A>(widened(shown[j]));
        total[j] += m.reconstructions
                        ? value
                        : fabs(widened(x[j]) - (value * target.scale + target.offset));
      }
    });
    Pack<T, N> result;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      A value = total[j] * weight;
      if (m.reconstructions) {
        value = count == 0 ? A(0) : fabs(widened(x[j]) - (value * target.scale + target.offset));
      }
      result[j] = narrowed<T>(value);
    }
    store_once(residual + place, result);
  }
}

// The sign of a difference; NaN stays NaN, as in torch.sgn.
template <typename A>
__device__ __forceinline__ A sign_of(A difference) {
  return difference > 0 ? A(1) : (difference < 0 ? A(-1) : difference);
}

// What reaches the image of one vector directly, and what it adds to the sums of the patch.
// Gradients of predictions are written on the way, if `writes`.
template <typename T, typename P, int N, typename A>
__device__ __forceinline__ void direct_gradient(const Map& m, const Share& share, int value,
                                                int count, const Target<A>& target, bool writes,
                                                const Pack<T, N>& x, A* own, A& grad_scale) {
  const A weight = count == 0 ? A(0) : A(1) / static_cast<A>(count);
  const std::int64_t stride = m.all_tokens * m.values;
  P* grad_prediction = static_cast<P*>(m.grad_prediction);
  if (grad_prediction != nullptr) grad_prediction += share.token * m.values + value;
  writes = writes && grad_prediction != nullptr;
  const auto grad =
      load_pack<T, N>(static_cast<const T*>(m.grad_residual) + share.corner + place_of(m, value));
  if (!m.reconstructions) {
#pragma unroll
    for (int j = 0; j < N; ++j) own[j] = 0;
    each_draw<P, N>(m, share.token, value, [&](int draw, bool counted, const Pack<P, N>& shown) {
      Pack<P, N> result = {};
#pragma unroll
      for (int j = 0; j < N; ++j) {
        if (!counted) continue;
        const A predicted = static_cast<A>(widened(shown[j]));
        const A reaching = widened(grad[j]) * weight *
                           sign_of(widened(x[j]) - (predicted * target.scale + target.offset));
        own[j] += reaching;
        grad_scale -= reaching * predicted;
        result[j] = narrowed<P>(static_cast<ComputeType<P>>(-reaching * target.scale));
      }
      if (writes) store_once(grad_prediction + draw * stride, result);
    });
    return;
  }
  A mean[N] = {};
  each_draw<P, N>(m, share.token, value, [&](int, bool counted, const Pack<P, N>& shown) {
    if (!counted) return;
#pragma unroll
    for (int j = 0; j < N; ++j) mean[j] += static_cast<A>(widened(shown[j]));
  });
  Pack<P, N> result = {};
#pragma unroll
  for (int j = 0; j < N; ++j) {
    own[j] = 0;
    if (count == 0) continue;
    const A shown = mean[j] * weight;
    own[j] = widened(grad[j]) * sign_of(widened(x[j]) - (shown * target.scale + target.offset));
    grad_scale -= own[j] * shown;
    result[j] = narrowed<P>(static_cast<ComputeType<P>>(-own[j] * weight * target.scale));
  }
  if (!writes) return;
  for (int draw = 0; draw < m.draws; ++draw) {
    const bool counted = counts(m, draw, share.token);
    store_once(grad_prediction + draw * stride, counted ? result : Pack<P, N>{});
  }
}

// The image also acts through mean and variance of its patch, which are known when all of the patch
// was seen. Until then the direct part is kept in shared memory; a patch too large for that is
// computed again. Rounding it into grad_image meanwhile would round half precision twice.
//
// Hazard: a thread reads from shared memory what itself wrote, so no barrier is needed.
template <typename T, typename P, int N>
__global__ void __launch_bounds__(block_threads, 2) residual_map_backward_kernel(const Map m) {
  using A = ComputeType<T>;
  SharedArena arena;
  const auto space = arena.take<A>(block_threads / warp_size);
  const Share share = share_of(m);
  Shared<A> kept;
  if (m.kept) {
    kept = arena.take<A>(block_threads / m.lanes * m.values).from(share.group * m.values);
  }
  Target<A> target;
  if (m.normalized) target = statistics<T, N>(m, share, space);
  const int count = count_of(m, share.token);
  const T* image = static_cast<const T*>(m.image) + share.corner;
  T* grad_image = static_cast<T*>(m.grad_image) + share.corner;
  const bool wants_image = m.grad_image != nullptr;
  const bool through_statistics = wants_image && m.normalized;
  A grad_scale = 0, grad_offset = 0;
  for (int i = share.begin + share.lane * N; i < share.end; i += m.lanes * N) {
    const std::int64_t place = place_of(m, i);
    const auto x = load_pack<T, N>(image + place);
    A own[N];
    direct_gradient<T, P, N>(m, share, i, count, target, true, x, own, grad_scale);
    Pack<T, N> result;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      grad_offset -= own[j];
      if (through_statistics && m.kept) kept.set(i + j, own[j]);
      result[j] = narrowed<T>(own[j]);
    }
    if (wants_image && !m.normalized) store_once(grad_image + place, result);
  }
  if (!through_statistics) return;
  const A through_mean = group_sum(m, grad_offset, space) / static_cast<A>(m.values);
  const A through_variance =
      group_sum(m, grad_scale, space) / (static_cast<A>(m.values - 1) * target.scale);
  for (int i = share.begin + share.lane * N; i < share.end; i += m.lanes * N) {
    const std::int64_t place = place_of(m, i);
    const auto x = load_pack<T, N>(image + place);
    A own[N], ignored = 0;
    if (m.kept) {
#pragma unroll
      for (int j = 0; j < N; ++j) own[j] = kept.get(i + j);
    } else {
      direct_gradient<T, P, N>(m, share, i, count, target, false, x, own, ignored);
    }
    Pack<T, N> result;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const A distance = widened(x[j]) - target.offset;
      result[j] = narrowed<T>(own[j] + through_mean + through_variance * distance);
    }
    store_once(grad_image + place, result);
  }
}

Map map_of(const ResidualMapArguments& arguments) {
  Map m{};
  const TensorView& image = arguments.image;
  m.image = image.data;
  m.prediction = arguments.prediction.data;
  m.hidden = static_cast<const std::uint8_t*>(arguments.hidden.data);
  m.grad_residual = arguments.grad_residual.data;
  m.residual = arguments.residual.data;
  m.grad_image = arguments.grad_image.data;
  m.grad_prediction = arguments.grad_prediction.data;
  m.stride_b = image.strides[0];
  m.stride_c = image.strides[1];
  m.stride_d = image.strides[2];
  m.stride_h = image.strides[3];
  m.stride_w = image.strides[4];
  m.patch_d = static_cast<int>(arguments.patch[0]);
  m.patch_h = static_cast<int>(arguments.patch[1]);
  m.patch_w = static_cast<int>(arguments.patch[2]);
  m.grid_h = static_cast<int>(image.shape[3] / arguments.patch[1]);
  m.grid_w = static_cast<int>(image.shape[4] / arguments.patch[2]);
  m.channels = static_cast<int>(image.shape[1]);
  m.values = static_cast<int>(arguments.prediction.shape[3]);
  m.draws = static_cast<int>(arguments.prediction.shape[0]);
  m.tokens = arguments.prediction.shape[2];
  m.all_tokens = image.shape[0] * m.tokens;
  const bool neighbors = m.patch_w == 1 || m.stride_w == m.channels;
  m.runs = neighbors && (m.channels == 1 || m.stride_c == 1);
  m.normalized = arguments.normalized_target;
  m.reconstructions = arguments.average_reconstructions;
  m.eps = arguments.eps;
  m.lanes = m.values <= warp_values() ? warp_size : block_threads;
  m.pieces = m.normalized ? 1 : blocks_for(m.values, piece_values());
  m.piece = m.pieces == 1 ? m.values : piece_values();
  return m;
}

// Whether vectors of 16 bytes of the image fit its rows, and where they begin.
template <typename T>
bool fits_packs(const Map& m) {
  constexpr std::int64_t whole = full_pack<T>;
  const std::int64_t row = std::int64_t(m.patch_w) * m.channels;
  return m.runs && row % whole == 0 && m.stride_b % whole == 0 && m.stride_d % whole == 0 &&
         m.stride_h % whole == 0;
}

bool aligned(const Map& m) {
  for (const void* data : {m.image, m.prediction, m.grad_residual, (const void*)m.residual,
                           (const void*)m.grad_image, (const void*)m.grad_prediction}) {
    if (reinterpret_cast<std::uintptr_t>(data) % 16 != 0) return false;
  }
  return true;
}

// Values of a vector. Of what nobody trains with (float64, float16 images with bfloat16
// predictions) there are kernels for single values alone: vectors would take a quarter of this
// file's compilation.
template <typename T, typename P>
constexpr int vector_values =
    sizeof(T) == 8 || (std::is_same_v<T, float16> && std::is_same_v<P, bfloat16>) ? 1
                                                                                  : full_pack<T>;

template <typename T, typename P>
struct Run {
  using A = ComputeType<T>;

  static void forward(const ResidualMapArguments& arguments) {
    const Map m = map_of(arguments);
    const auto kernel = fits_packs<T>(m) && aligned(m)
                            ? residual_map_forward_kernel<T, P, vector_values<T, P>>
                            : residual_map_forward_kernel<T, P, 1>;
    const Queue queue("residual_map", arguments.image, arguments.cuda.stream);
    queue.launch("residual_map_forward", kernel, blocks_of(m), block_threads,
                 shared_bytes<A>(block_threads / warp_size), m);
  }

  static void backward(const ResidualMapArguments& arguments) {
    Map m = map_of(arguments);
    const std::size_t kept = shared_bytes<A>(block_threads / m.lanes * std::int64_t(m.values));
    const std::size_t sums = shared_bytes<A>(block_threads / warp_size);
    m.kept = m.normalized && kept + sums <= kept_bytes();
    const auto kernel = fits_packs<T>(m) && aligned(m)
                            ? residual_map_backward_kernel<T, P, vector_values<T, P>>
                            : residual_map_backward_kernel<T, P, 1>;
    const Queue queue("residual_map", arguments.image, arguments.cuda.stream);
    queue.launch("residual_map_backward", kernel, blocks_of(m), block_threads,
                 sums + (m.kept ? kept : 0), m);
  }

  static std::int64_t blocks_of(const Map& m) {
    return blocks_for(m.all_tokens * m.pieces, block_threads / m.lanes);
  }
};

// Calls run(Run<T, P>()) for the dtypes of image and prediction; the latter is never more precise.
template <typename Body>
void for_dtypes(const ResidualMapArguments& arguments, Body body) {
  const DType prediction = arguments.prediction.dtype;
  switch (arguments.image.dtype) {
    case DType::float64:
      if (prediction == DType::float64) return body(Run<double, double>());
      if (prediction == DType::float32) return body(Run<double, float>());
      if (prediction == DType::float16) return body(Run<double, float16>());
      return body(Run<double, bfloat16>());
    case DType::float32:
      if (prediction == DType::float32) return body(Run<float, float>());
      if (prediction == DType::float16) return body(Run<float, float16>());
      return body(Run<float, bfloat16>());
    case DType::float16:
      if (prediction == DType::float16) return body(Run<float16, float16>());
      return body(Run<float16, bfloat16>());
    default:
      return body(Run<bfloat16, bfloat16>());
  }
}

}  // namespace

void residual_map_forward(const ResidualMapArguments& arguments) {
  for_dtypes(arguments, [&](auto run) { run.forward(arguments); });
}

void residual_map_backward(const ResidualMapArguments& arguments) {
  for_dtypes(arguments, [&](auto run) { run.backward(arguments); });
}

}  // namespace cuda
}  // namespace grcsf
