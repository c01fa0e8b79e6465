// SPDX-License-Identifier: Apache-2.0
// rcu on CUDA: one call as its kernels see it, and how a volume is cut for them.
//
// A patch is cut into pieces, a piece into tiles of one voxel a thread. Voxels of a patch are
// counted in the order of memory, those alone that exist: edge patches are smaller boxes, and
// nothing is masked inside. A block takes a piece, or one piece after the other; its threads then
// own the same voxels in every step, and what a voxel's lines (queries of all maps, heads and map
// channels) are lies in columns of memory that belong to the thread.
#pragma once

#include <stdexcept>

#include "common/arguments/rcu.h"
#include "cuda/runtime/launch.cuh"

namespace grcsf {
namespace cuda {

constexpr int rcu_most_threads = 256;  // of a block
constexpr int rcu_least_voxels = 16;   // of a patch that has tables: below, a sum is cheaper
constexpr int rcu_most_splits = 64;
constexpr int rcu_table_fields = 4;     // of a node: mean, variance, third cumulant, 0
constexpr int rcu_outputs_at_once = 8;  // sums that a thread keeps in registers
constexpr int rcu_inputs_staged = 64;   // of a product: what of its weights lies in shared memory
constexpr double rcu_log2e = 1.4426950408889634;

// Blocks of a multiprocessor that must have registers enough: more would make them spill.
template <typename T, bool many = false>
constexpr int rcu_blocks = many || sizeof(T) == 8 ? 1 : 2;

struct RcuProblem {
  const void *x, *residual, *grad_out, *grad_scores;
  const void *query_weight, *query_bias, *value_weight, *value_bias;
  const void *weight1, *bias1, *weight2, *bias2;
  void *out, *scores, *grad_x, *grad_residual;
  std::int64_t stride_b, stride_c, stride_d, stride_h, stride_w;  // of x and what has its layout
  std::int64_t volume;                                            // voxels of a sample
  std::int64_t patches, patches_each;                             // of all samples, of one
  int depth, height, width, patch_d, patch_h, patch_w, grid_d, grid_h, grid_w;
  int batch, channels, maps, heads, map_channels, hidden;
  int lines, map_lines, inputs;  // K * h * c, K * c, and C + K * c means of a patch
  int column;                    // lines rounded up to whole groups of outputs
  int threads, tiles, pieces;    // of a block, of a piece, of a patch
  int most_nodes, splits;        // of a table; 0 where there is none
  int tile_keys, key_lines;      // keys in shared memory at a time, their channels rounded up
  std::int64_t units;            // pieces of all patches
  int slots;                     // blocks that take pieces in turn
  // Scratch. Surveys [units][2 * maps + 2 * maps + inputs], plans [patches][maps], tables
  // [patches][maps][most_nodes][fields], parts [patches][maps][splits][most_nodes][fields],
  // columns [slots][arrays][threads][column].
  void *surveys, *means, *plans, *tables, *parts, *columns;
};

// How a map's attention is taken in a patch.
template <typename A>
struct RcuPlan {
  A first, step, per_step;    // nodes over the queries
  A least, greatest, center;  // of the map
  int nodes;                  // 0: direct sums
};

// Means, ranges and tables of all patches, and in forward their scores (rcu/prepare.cu).
void rcu_prepare(const RcuArguments& arguments, const Queue& queue, RcuProblem& problem,
                 bool writes_scores);

// Forward in one kernel, for small patches of one map channel; whether it fits
// (rcu/small_patch/forward.cu).
bool rcu_patch_forward(const RcuArguments& arguments, const Queue& queue,
                       const RcuProblem& problem);

// Scratch of backward.
struct RcuGradients {
  void *values, *queries;  // [slots][lines * C + C], [slots][lines * C + lines]
  void* reached;           // [units]: gradients of scores through the voxels
  void* rows;              // [patches][1 + 2 * hidden]: logit, hidden, active * logit
  void* means;             // [patches][inputs]: for one voxel
  void* network;           // [splits][hidden * inputs + hidden + 1]
  int slots, splits;
};

// Likewise backward, up to the sums over slots and patches, with the scratch that these need
// (rcu/small_patch/backward.cu).
bool rcu_patch_backward(const RcuArguments& arguments, const Queue& queue, RcuProblem& problem,
                        RcuGradients& gradients);

// The gradient of the map: direct sums over the queries of a patch (rcu/map_gradient.cu).
// `grad_means` [patches][inputs] is that of every patch's means, for one voxel.
void rcu_map_gradient(const RcuArguments& arguments, const Queue& queue, const RcuProblem& problem,
                      const void* grad_means);

namespace {

inline std::int64_t rcu_threads() { return from_size(rcu_most_threads, 64); }
inline std::int64_t rcu_pieces() { return from_size(512, 3); }
// Voxels; larger patches have larger tables.
inline std::int64_t rcu_small_patch() { return from_size(4096, 256); }
// Of a patch that one block takes for a group of nodes.
inline std::int64_t rcu_split_voxels() { return from_size(8192, 128); }

// ---- Geometry ----------------------------------------------------------------------------------

// A patch: where it begins in x and in a map, and the voxels that exist.
struct Box {
  std::int64_t x, map;
  int depth, height, width, voxels, sample;
};

struct Place {
  std::int64_t x, map;
};

// Of a patch whose number is an int where it fits: divisions of 64 bits take long.
template <typename Number>
__device__ __forceinline__ Box box_of(const RcuProblem& m, Number patch) {
  Box box;
  const Number each = static_cast<Number>(m.patches_each);
  box.sample = static_cast<int>(patch / each);
  Number rest = patch - box.sample * each;
  const int w = static_cast<int>(rest % m.grid_w) * m.patch_w;
  rest /= m.grid_w;
  const int h = static_cast<int>(rest % m.grid_h) * m.patch_h;
  const int d = static_cast<int>(rest / m.grid_h) * m.patch_d;
  box.depth = least(m.patch_d, m.depth - d);
  box.height = least(m.patch_h, m.height - h);
  box.width = least(m.patch_w, m.width - w);
  box.voxels = box.depth * box.height * box.width;
  box.x = box.sample * m.stride_b + d * m.stride_d + h * m.stride_h + w * m.stride_w;
  box.map = box.sample * m.map_lines * m.volume + (std::int64_t(d) * m.height + h) * m.width + w;
  return box;
}

__device__ __forceinline__ Place place_of(const RcuProblem& m, const Box& box, int voxel) {
  const int row = voxel / box.width, w = voxel - row * box.width;
  const int d = row / box.height, h = row - d * box.height;
  return {box.x + d * m.stride_d + h * m.stride_h + w * m.stride_w,
          box.map + (std::int64_t(d) * m.height + h) * m.width + w};
}

// A piece of a patch.
struct Unit {
  std::int64_t index, patch;
  Box box;
  int begin, end;  // voxels
};

__device__ __forceinline__ Unit unit_of(const RcuProblem& m, std::int64_t index) {
  Unit unit;
  unit.index = index;
  unit.patch = index / m.pieces;
  unit.box = box_of(m, unit.patch);
  const int piece = static_cast<int>(index - unit.patch * m.pieces);
  const std::int64_t voxels = std::int64_t(m.tiles) * m.threads;  // of a whole piece
  unit.begin = static_cast<int>(least<std::int64_t>(unit.box.voxels, piece * voxels));
  unit.end = static_cast<int>(least<std::int64_t>(unit.box.voxels, (piece + 1) * voxels));
  return unit;
}

template <typename A>
__device__ __forceinline__ const A* weights_at(const void* weights) {
  return static_cast<const A*>(weights);
}

// Where the weights of a line and a channel lie: [K, h, c, C] of queries, [K, C, h, c] of values.
template <bool of_values>
__device__ __forceinline__ std::int64_t weight_place(const RcuProblem& m, int line, int channel) {
  if (!of_values) return std::int64_t(line) * m.channels + channel;
  const int each = m.heads * m.map_channels, map = line / each;
  return (std::int64_t(map) * m.channels + channel) * each + line % each;
}

// ---- The host's side ---------------------------------------------------------------------------

// Columns of all blocks that kernels with a thread a voxel run in.
template <typename A>
void rcu_take_columns(const RcuArguments& arguments, RcuProblem& m) {
  constexpr int arrays = 4;
  m.columns = arguments.cuda.take<A>(std::int64_t(m.slots) * arrays * m.threads * m.column);
}

inline RcuProblem rcu_problem(const RcuArguments& arguments, const Queue& queue) {
  RcuProblem m{};
  const TensorView &x = arguments.x, &residual = arguments.residual;
  const RcuWeights& weights = arguments.weights;
  m.x = x.data;
  m.residual = residual.data;
  m.grad_out = arguments.grad_out.data;
  m.grad_scores = arguments.grad_scores.data;
  m.query_weight = weights.query_weight.data;
  m.query_bias = weights.query_bias.data;
  m.value_weight = weights.value_weight.data;
  m.value_bias = weights.value_bias.data;
  m.weight1 = weights.score_weight1.data;
  m.bias1 = weights.score_bias1.data;
  m.weight2 = weights.score_weight2.data;
  m.bias2 = weights.score_bias2.data;
  m.out = arguments.out.data;
  m.scores = arguments.scores.data;
  m.grad_x = arguments.grad_x.data;
  m.grad_residual = arguments.grad_residual.data;
  m.stride_b = x.strides[0];
  m.stride_c = x.strides[1];
  m.stride_d = x.strides[2];
  m.stride_h = x.strides[3];
  m.stride_w = x.strides[4];
  m.batch = static_cast<int>(x.shape[0]);
  m.channels = static_cast<int>(x.shape[1]);
  int* const sizes[] = {&m.depth, &m.height, &m.width};
  int* const patch[] = {&m.patch_d, &m.patch_h, &m.patch_w};
  int* const grid[] = {&m.grid_d, &m.grid_h, &m.grid_w};
  std::int64_t voxels = 1;
  m.volume = m.patches_each = 1;
  for (int axis = 0; axis < 3; ++axis) {
    *sizes[axis] = static_cast<int>(x.shape[2 + axis]);
    *patch[axis] = static_cast<int>(arguments.patch[axis]);
    *grid[axis] = static_cast<int>(blocks_for(x.shape[2 + axis], arguments.patch[axis]));
    m.volume *= *sizes[axis];
    m.patches_each *= *grid[axis];
    voxels *= *patch[axis];
  }
  if (voxels >= std::int64_t(1) << 31) {
    throw std::runtime_error("rcu on CUDA: a patch of 2^31 voxels or more is too large");
  }
  m.patches = m.batch * m.patches_each;
  m.maps = static_cast<int>(residual.shape[1]);
  m.map_channels = static_cast<int>(residual.shape[2]);
  m.heads = static_cast<int>(weights.query_weight.shape[1]);
  m.hidden = static_cast<int>(weights.score_weight1.shape[0]);
  m.lines = m.maps * m.heads * m.map_channels;
  m.map_lines = m.maps * m.map_channels;
  m.inputs = m.channels + m.map_lines;
  m.column = static_cast<int>(blocks_for(m.lines, rcu_outputs_at_once)) * rcu_outputs_at_once;

  const std::int64_t warps = blocks_for(voxels, warp_size);
  m.threads =
      static_cast<int>(least<std::int64_t>(rcu_threads(), (warps == 3 ? 4 : warps) * warp_size));
  const std::int64_t tiles = blocks_for(voxels, m.threads);
  m.tiles = static_cast<int>(blocks_for(tiles, rcu_pieces()));
  m.pieces = static_cast<int>(blocks_for(tiles, m.tiles));
  m.units = m.patches * m.pieces;
  constexpr int threads_at_once = 1024;  // of a multiprocessor
  m.slots = static_cast<int>(
      least<std::int64_t>(m.units, queue.multiprocessors() * (threads_at_once / m.threads)));

  const bool half = x.dtype == DType::bfloat16 || x.dtype == DType::float16;
  if (m.map_channels == 1 && x.dtype != DType::float64 && voxels >= rcu_least_voxels) {
    constexpr int of_large = 1024, of_half = 64, of_float = 128;
    const int limit = voxels > rcu_small_patch() ? of_large : (half ? of_half : of_float);
    m.most_nodes = static_cast<int>(least<std::int64_t>(limit, voxels / 8 * 4));
  }
  m.splits = static_cast<int>(
      least<std::int64_t>(rcu_most_splits, blocks_for(voxels, rcu_split_voxels())));
  const int pack = m.map_channels == 1 ? 1 : (x.dtype == DType::float64 ? 2 : 4);
  m.key_lines = static_cast<int>(blocks_for(m.map_channels, pack)) * pack;
  constexpr int keys_at_most = 128, values_of_tile = 2048, keys_at_least = 8;
  m.tile_keys = greatest(keys_at_least, least(keys_at_most, values_of_tile / m.key_lines / 8 * 8));
  return m;
}

}  // namespace
}  // namespace cuda
}  // namespace grcsf
