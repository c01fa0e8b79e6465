// SPDX-License-Identifier: Apache-2.0
// gcu on the CPU, forward.
//
// One row of voxels at a time, all channels: the first pass packs skip and takes <f, u>, |f|^2 and
// |u|^2 over channels, the second scales the packed row, which is still in cache, by
// 1 + dissimilarity (or similarity) and writes it. So skip is read once, compensated written once
// and deep comes from the cache. Every row is computed by itself: the bits do not depend on the
// number of threads.
//
// Bytes: 2 * V * C of data, V' * C of deep and V of dissimilarity. Large results are written past
// the cache: else every line of them would be read first.
//
// This file is compiled once for each instruction set, into the namespace GRCSF_ISA. Everything
// else has internal linkage (see half.h).
#include "cpu/gcu/gcu.h"

#include "cpu/gcu/rows.h"
#include "cpu/runtime/memory.h"
#include "cpu/runtime/parallel.h"

namespace grcsf {
namespace GRCSF_ISA {
namespace {

template <typename T>
struct Forward {
  using A = ComputeType<T>;

  const GcuSizes sizes;
  const Columns<A> columns;
  const Volume<const T> skip, deep;
  const Volume<T> compensated, dissimilarity;
  const A *skip_gate, *deep_gate;
  const A eps;
  const bool similarity;
  const std::int64_t pitch, scratch_size;

  explicit Forward(const GcuArguments& arguments)
      : sizes(arguments, false),
        columns(sizes.channels, sizes.size[2], sizes.deep[2]),
        skip(arguments.skip, false),
        deep(arguments.deep, false),
        compensated(arguments.compensated, false),
        dissimilarity(arguments.dissimilarity, false),
        skip_gate(static_cast<const A*>(arguments.skip_gate.data)),
        deep_gate(static_cast<const A*>(arguments.deep_gate.data)),
        eps(static_cast<A>(arguments.eps)),
        similarity(arguments.similarity),
        pitch(row_pitch(columns)),
        scratch_size(DeepRows<T>::scratch_size(sizes, columns) +
                     buffer_size(columns, sizes.channels) + 6 * pitch +
                     staged_voxels * sizes.channels) {}

  std::int64_t rows() const {
    return sizes.batch * sizes.size[0] * columns.blocks() * sizes.size[1];
  }

  // Rows [begin, end), y fastest, then blocks along x.
  void run(std::int64_t begin, std::int64_t end, A* scratch) const {
    DeepRows<T> deep_rows(deep, deep_gate, sizes, columns, scratch);
    A* packed = scratch + DeepRows<T>::scratch_size(sizes, columns);
    A* voxels = packed + buffer_size(columns, sizes.channels);
    T* stage = reinterpret_cast<T*>(voxels + 5 * pitch);
    const VoxelSums<A> sums{voxels, voxels + pitch, voxels + 2 * pitch, nullptr};
    A* factor = voxels + 3 * pitch;
    A* difference = voxels + 4 * pitch;
    std::int64_t entered = -1;
    for (std::int64_t index = begin; index < end; ++index) {
      const std::int64_t y = index % sizes.size[1], outer = index / sizes.size[1];
      const std::int64_t block = outer % columns.blocks();
      const std::int64_t z = outer / columns.blocks() % sizes.size[0];
      const std::int64_t b = outer / columns.blocks() / sizes.size[0];
      if (outer != entered) {
        deep_rows.enter(b, position_of(z, sizes.size[0], sizes.deep[0]), block);
        entered = outer;
      }
      const std::int64_t x = columns.begin(block), count = columns.count(block);
      const UpRow<A> up = up_row(deep_rows, position_of(y, sizes.size[1], sizes.deep[1]));
      sum_channels<false, T>(skip, skip.row(b, z, y, x), nullptr, count, packed, nullptr, up,
                             sizes.channels, pitch, skip_gate + b * sizes.channels, sums);
      compare(sums, count, factor, difference);
      write_run<T>(difference, count, dissimilarity.row(b, z, y, x), false, stage);
      write(packed, factor, count, compensated.row(b, z, y, x), stage);
    }
    end_of_stream();
  }

  // dissimilarity = 1 - cos, and the factor of skip.
  void compare(const VoxelSums<A>& sums, std::int64_t count, A* __restrict factor,
               A* __restrict difference) const {
    const A* __restrict products = sums.products;
    const A* __restrict skip_squares = sums.skip_squares;
    const A* __restrict up_squares = sums.up_squares;
    for (std::int64_t x = 0; x < whole_vectors<A>(count); ++x) {
      // Divided one after the other: the product of two small eps could be zero.
      const A cosine = products[x] / at_least(std::sqrt(skip_squares[x]), eps) /
                       at_least(std::sqrt(up_squares[x]), eps);
      difference[x] = 1 - cosine;
      factor[x] = 1 + (similarity ? cosine : 1 - cosine);
    }
  }

  void write(A* __restrict packed, const A* __restrict factor, std::int64_t count, T* to,
             T* stage) const {
    const bool stream = compensated.streams();
    for (std::int64_t c = 0; c < sizes.channels; ++c) {
      A* row = packed + c * pitch;
      for (std::int64_t x = 0; x < count; x += lanes<A>) {
        store(load(row + x) * load(factor + x), row + x);
      }
      if (!compensated.channels_last) {
        write_run<T>(row, count, to + c * compensated.channel, stream, stage);
      }
    }
    if (compensated.channels_last) {
      write_channels_last<T>(packed, pitch, sizes.channels, count, to, stream, stage);
    }
  }
};

template <typename T>
void forward(const GcuArguments& arguments) {
  const int threads = arguments.threads < 1 ? 1 : arguments.threads;
  const Forward<T> work(arguments);
  const Workspace<ComputeType<T>> space(threads, work.scratch_size);
  expect_whole_write(arguments.compensated);
  parallel_for(work.rows(), threads, [&](std::int64_t begin, std::int64_t end, int thread) {
    work.run(begin, end, space.piece(thread));
  });
}

}  // namespace

void gcu_forward(const GcuArguments& arguments) {
  for_dtype(arguments.skip.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    forward<T>(arguments);
  });
}

}  // namespace GRCSF_ISA
}  // namespace grcsf
