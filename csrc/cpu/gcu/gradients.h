// SPDX-License-Identifier: Apache-2.0
// gcu on the CPU, backward: what all threads share.
#pragma once

#include "cpu/gcu/gcu.h"
#include "cpu/gcu/rows.h"
#include "cpu/runtime/memory.h"
#include "cpu/runtime/parallel.h"

namespace grcsf {
namespace {

constexpr int together = 2;  // channels of one step of the second pass

// Depends on the sizes only, so that the order of all sums does too.
bool swaps_axes(const TensorView& deep) {
  return deep.shape[2] < 8 && deep.shape[3] > deep.shape[2];
}

// What the second pass needs of every voxel: ∂f = cross u - skip_radial f and
// ∂u = cross f - up_radial u.
template <typename A>
struct VoxelFactors {
  A *cross, *skip_radial, *up_radial, *strength;
};

// The work of all threads: what is read, what is written, and the sums for the gates.
template <typename T>
struct Backward {
  using A = ComputeType<T>;

  const bool swapped;
  const GcuSizes sizes;
  const Columns<A> columns;
  const Volume<const T> skip, deep, grad, grad_dissimilarity;
  const Volume<T> grad_skip, grad_deep;  // data is null where not asked for
  A *const grad_skip_gate, *const grad_deep_gate;
  const A *const skip_gate, *const deep_gate;
  const A eps;
  const bool similarity, wants_skip, wants_deep;
  const std::int64_t pitch, buffer, deep_plane;
  const Workspace<double> skip_sums, deep_sums;  // [C] for each (b, z) and each (b, z')

  explicit Backward(const GcuArguments& arguments)
      : swapped(swaps_axes(arguments.deep)),
        sizes(arguments, swapped),
        columns(sizes.channels, sizes.size[2], sizes.deep[2]),
        skip(arguments.skip, swapped),
        deep(arguments.deep, swapped),
        grad(arguments.grad_compensated, swapped),
        grad_dissimilarity(arguments.grad_dissimilarity, swapped),
        grad_skip(arguments.grad_skip, swapped),
        grad_deep(arguments.grad_deep, swapped),
        grad_skip_gate(static_cast<A*>(arguments.grad_skip_gate.data)),
        grad_deep_gate(static_cast<A*>(arguments.grad_deep_gate.data)),
        skip_gate(static_cast<const A*>(arguments.skip_gate.data)),
        deep_gate(static_cast<const A*>(arguments.deep_gate.data)),
        eps(static_cast<A>(arguments.eps)),
        similarity(arguments.similarity),
        wants_skip(grad_skip.data || grad_skip_gate),
        wants_deep(grad_deep.data || grad_deep_gate),
        pitch(row_pitch(columns)),
        buffer(buffer_size(columns, sizes.channels)),
        deep_plane(sizes.deep[1] * sizes.deep[2]),
        skip_sums(grad_skip_gate ? sizes.batch * sizes.size[0] : 0, sizes.channels),
        deep_sums(grad_deep_gate ? sizes.batch * sizes.deep[0] : 0, sizes.channels) {}

  // Values that a Worker needs.
  std::int64_t scratch_size() const {
    return DeepRows<T>::scratch_size(sizes, columns) + 4 * buffer + 9 * pitch +
           together * gathered_pitch() + staged_voxels * sizes.channels +
           (wants_deep ? 2 * pitch_of(sizes.channels * deep_plane) : 0);
  }

  std::int64_t gathered_pitch() const { return pitch_of(columns.longest()) + 16; }

  // Adds the planes' sums for the gates, in the order of the planes.
  void add_gates() const {
    add_planes(skip_sums, sizes.size[0], grad_skip_gate);
    add_planes(deep_sums, sizes.deep[0], grad_deep_gate);
  }

  void add_planes(const Workspace<double>& sums, std::int64_t planes, A* to) const {
    if (to == nullptr) return;
    for (std::int64_t b = 0; b < sizes.batch; ++b) {
      for (std::int64_t c = 0; c < sizes.channels; ++c) {
        double total = 0;
        for (std::int64_t z = 0; z < planes; ++z) total += sums.piece(b * planes + z)[c];
        to[b * sizes.channels + c] = static_cast<A>(total);
      }
    }
  }
};

}  // namespace
}  // namespace grcsf
