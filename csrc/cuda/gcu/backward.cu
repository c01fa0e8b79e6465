// SPDX-License-Identifier: Apache-2.0
// gcu on CUDA, backward: a pass over voxels, then deep voxels gather their gradient.
//
// With f the gated skip, u the gated and upsampled deep tensor, m and n their norms and g the
// gradient that reaches the cosine, the gradient of f is g (u / (m n) - cos f / m^2), and that of u
// is alpha f - beta u with two numbers a voxel, alpha = g / (m n) and beta = g cos / n^2. The first
// kernel writes the gradient of skip, and alpha and beta; gcu/deep_gradient.cuh makes the gradient
// of deep of them. So the gradient of the upsampled tensor never exists in memory.
//
// Slabs. alpha, beta and what gcu/deep_gradient.cuh needs are a few percent of the gradients: the
// kernels take turns on slabs of planes, whose skip also stays in L2 for the second one. Planes of
// alpha and beta lie in a ring, plane z at z % ring.
//
// Bytes: skip and the gradient [B, C, V] read once, grad_skip written once, deep from the caches.
// Channels beyond what a tile holds are read twice, the second time from L2.
//
// Gates. A warp takes a fixed set of tiles and adds up its part of the gate's gradient in its own
// place in memory (registers would spill); a last kernel adds the places in double precision. So
// nothing is atomic and the bits do not change from run to run.
#include <algorithm>
#include <utility>
#include <vector>

#include "cuda/gcu/deep_gradient.cuh"
#include "cuda/gcu/gcu.h"

namespace grcsf {
namespace cuda {
namespace {

constexpr int sum_threads = 128;
constexpr int warps_of_a_multiprocessor = 16;
// Bytes of scratch that need no slabs, and of skip in a slab.
inline std::int64_t small_scratch() { return from_size(4 << 20, 4 << 10); }
inline std::int64_t cached_bytes() { return from_size(16 << 20, 16 << 10); }
constexpr double scratch_share = 0.04;  // of the gradients' bytes

// Packs of a lane, and their sizes: as many as fit 128 registers beside the sums, with the gradient
// and the upsampled tile.
template <typename T, Path path>
constexpr int backward_packs = path == Path::channels_last ? 1 : (sizeof(T) == 8 ? 2 : 4);
template <typename T>
constexpr int doubled_size = sizeof(T) == 2 ? 4 : 2;
template <typename T>
constexpr int taps_size = sizeof(T) == 2 ? 2 : 1;

template <typename A, int voxels>
struct Sums {
  A products[voxels], skip_squares[voxels], up_squares[voxels];
  A strengthened[voxels];  // <gradient, skip>
};

// What the second pass over channels needs of the voxels of a pack.
template <typename A, int voxels>
struct Factors {
  A strength[voxels], cross[voxels], radial[voxels];

  // From the sums over channels; writes alpha and beta where there is a place for them.
  template <typename T, typename Place>
  __device__ __forceinline__ void set(const Volumes& m, const Place& place, int sample,
                                      Sums<A, voxels>& sums) {
    const Scatter<voxels> scatter{1 << m.group_bits};
    scatter.sum(sums.products);
    scatter.sum(sums.skip_squares);
    scatter.sum(sums.up_squares);
    scatter.sum(sums.strengthened);
    const int first = scatter.first();
    const T* grads = static_cast<const T*>(m.grad_dissimilarity) + std::int64_t(sample) * m.voxels +
                     place.voxel + first;
    const std::int64_t plane = std::int64_t(sample) * m.ring + place.z % m.ring - place.z;
    const std::int64_t at = plane * (std::int64_t(m.y.size) * m.x.size) + place.voxel + first;
    const bool stores = m.cross != nullptr && scatter.writes();
    const auto eps = static_cast<A>(m.eps);
#pragma unroll
    for (int i = 0; i < voxels; ++i) {
      strength[i] = cross[i] = radial[i] = 0;  // adds nothing to the gate where no voxel is
      if (i >= scatter.count() || !place.exists) continue;
      const InverseNorm<A> skip_inverse(sums.skip_squares[i], eps);
      const InverseNorm<A> up_inverse(sums.up_squares[i], eps);
      const A cosine = sums.products[i] * skip_inverse.value * up_inverse.value;
      const A strengthened = m.similarity ? sums.strengthened[i] : -sums.strengthened[i];
      const A reaching = strengthened - widened(grads[i]);
      const A along = reaching * cosine;
      strength[i] = m.similarity ? 1 + cosine : 2 - cosine;
      cross[i] = reaching * skip_inverse.value * up_inverse.value;
      // Where a norm is at its floor, nothing goes through it.
      if (skip_inverse.above) radial[i] = along * skip_inverse.value * skip_inverse.value;
      if (!stores) continue;
      static_cast<A*>(m.cross)[at + i] = cross[i];
      static_cast<A*>(m.radial)[at + i] =
          up_inverse.above ? along * up_inverse.value * up_inverse.value : A(0);
    }
    scatter.share(strength);
    scatter.share(cross);
    scatter.share(radial);
  }
};

// What a lane holds of a tile and a chunk of channels.
template <typename T, Path path, int size>
struct Held {
  using A = ComputeType<T>;
  using Tile = Tiling<T, path, size>;
  static constexpr int packs = backward_packs<T, path>;

  const Volumes& m;
  const Lane lane;
  const int sample;
  Words<T, size> skip[packs], grad[packs];
  A up[packs][size];              // gated
  A gate[packs][Tile::channels];  // sums of (gradient of f) * skip

  // Calls body(s, c) for the packs that exist, c being the first channel of pack s, and next()
  // after every pack, which steps offsets.
  template <typename Body, typename Next>
  __device__ __forceinline__ void each(int c0, Body body, Next next) const {
#pragma unroll
    for (int s = 0; s < packs; ++s) {
      const int c = channel_of<Tile, packs>(m.group_bits, lane, c0, s);
      if (c < m.channels) body(s, c);
      next();
    }
  }

  // Of the first pack, in skip.
  __device__ __forceinline__ std::int64_t offset(const Place<Tile, A>& place, int c0) const {
    const int first = channel_of<Tile, packs>(m.group_bits, lane, c0, 0);
    return std::int64_t(sample) * m.channels * m.voxels + place.voxel * m.voxel_stride +
           first * m.channel_stride;
  }

  __device__ __forceinline__ void load(const Place<Tile, A>& place, int c0) {
    std::int64_t at = offset(place, c0);
    each(
        c0,
        [&](int s, int) {
          skip[s] = Words<T, size>::load(static_cast<const T*>(m.skip) + at);
          grad[s] = Words<T, size>::load_once(static_cast<const T*>(m.grad) + at);
        },
        [&] { at = opaque(at + m.step); });
  }

  // Makes the gated and upsampled tile.
  __device__ __forceinline__ void interpolate(const Place<Tile, A>& place, int c0) {
    const Columns<T, path, size> columns(m, place.x);
    const int first = channel_of<Tile, packs>(m.group_bits, lane, c0, 0);
    std::int64_t at = std::int64_t(sample) * m.channels * m.deep_voxels + place.deep_row +
                      columns.origin + first * m.deep_channel_stride;
    each(
        c0,
        [&](int s, int c) {
          const Gates<Tile, A> gates(m, sample, c);
          columns.interpolate(deep_rows(m, static_cast<const T*>(m.deep) + at, place), gates.deep,
                              up[s]);
        },
        [&] { at = opaque(at + m.deep_step); });
  }

  __device__ __forceinline__ void add(int c0, Sums<A, Tile::voxels>& sums) const {
    each(
        c0,
        [&](int s, int c) {
          const Gates<Tile, A> gates(m, sample, c);
#pragma unroll
          for (int e = 0; e < size; ++e) {
            const int v = Tile::across ? 0 : e, channel = Tile::across ? e : 0;
            const A value = skip[s].get(e);
            const A f = value * gates.skip[channel], u = up[s][e];
            sums.products[v] += f * u;
            sums.skip_squares[v] += f * f;
            sums.up_squares[v] += u * u;
            sums.strengthened[v] += value * grad[s].get(e);
          }
        },
        [] {});
  }

  // Writes the gradient of skip, and adds up the gate's.
  __device__ __forceinline__ void differentiate(const Factors<A, Tile::voxels>& factors,
                                                const Place<Tile, A>& place, int c0) {
#pragma unroll
    for (int s = 0; s < packs; ++s) {
#pragma unroll
      for (int e = 0; e < Tile::channels; ++e) gate[s][e] = 0;
    }
    std::int64_t at = offset(place, c0);
    each(
        c0,
        [&](int s, int c) {
          const Gates<Tile, A> gates(m, sample, c);
          Pack<T, size> result;
#pragma unroll
          for (int e = 0; e < size; ++e) {
            const int v = Tile::across ? 0 : e, channel = Tile::across ? e : 0;
            const A value = skip[s].get(e);
            const A f = value * gates.skip[channel];
            const A grad_f = factors.cross[v] * up[s][e] - factors.radial[v] * f;
            result[e] =
                narrowed<T>(grad[s].get(e) * factors.strength[v] + grad_f * gates.skip[channel]);
            gate[s][channel] += grad_f * value;
          }
          if (!place.exists || m.grad_skip == nullptr) return;
          store_once(static_cast<T*>(m.grad_skip) + at, result);
        },
        [&] { at = opaque(at + m.step); });
  }

  // Puts the gate's sums, or adds them, to this warp's place.
  __device__ __forceinline__ void put(int c0, int slot, bool adds) {
#pragma unroll
    for (int s = 0; s < packs; ++s) {
#pragma unroll
      for (int e = 0; e < Tile::channels; ++e) {
        const A sum = column_sum(m.group_bits, gate[s][e]);
        const int c = channel_of<Tile, packs>(m.group_bits, lane, c0, s) + e;
        if (lane.column != 0 || c >= m.channels) continue;
        A* to = static_cast<A*>(m.sums) + (sample * m.channels + c) * m.warps + slot;
        *to = adds ? *to + sum : sum;
      }
    }
  }
};

template <typename T, Path path, int size>
__global__ void __launch_bounds__(tile_threads, 4) gcu_backward_voxels_kernel(const Volumes m) {
  using A = ComputeType<T>;
  using Tile = Tiling<T, path, size>;
  const int warp = static_cast<int>(blockIdx.x) * (tile_threads / warp_size) + warp_index();
  const auto sample = static_cast<int>(m.samples.quotient(warp));
  if (sample >= m.batch) return;
  Held<T, path, size> held{m, lane_of(m.group_bits), sample, {}, {}, {}, {}};
  const bool once = m.channels <= m.span;
  const bool writes = m.grad_skip != nullptr || m.sums != nullptr;
#pragma unroll 1
  for (int tile = warp - sample * static_cast<int>(m.warps); tile < m.tiles;
       tile += static_cast<int>(m.warps)) {
    const auto place = place_of<Tile, A>(m, held.lane, tile);
    Sums<A, Tile::voxels> sums{};
    Factors<A, Tile::voxels> factors;
#pragma unroll 1
    for (int pass = 0; pass < (writes ? 2 : 1); ++pass) {
#pragma unroll 1
      for (int c0 = 0; c0 < m.channels; c0 += m.span) {
        if (pass == 0 || !once) {
          held.load(place, c0);
          held.interpolate(place, c0);
        }
        if (pass == 0) {
          held.add(c0, sums);
          continue;
        }
        held.differentiate(factors, place, c0);
        if (m.sums == nullptr) continue;
        held.put(c0, tile % static_cast<int>(m.warps), m.adds || tile >= m.warps);
      }
      if (pass == 0) factors.template set<T>(m, place, sample, sums);
    }
  }
}

// result[i] = sum of parts[i, :].
template <typename A>
__global__ void __launch_bounds__(sum_threads)
    gcu_sums_kernel(const A* parts, std::int64_t count, A* result) {
  SharedArena arena;
  const auto space = arena.take<double>(sum_threads / warp_size);
  double sum = 0;
  for (std::int64_t i = threadIdx.x; i < count; i += sum_threads) {
    sum += parts[blockIdx.x * count + i];
  }
  sum = block_sum(sum, space);
  if (threadIdx.x == 0) result[blockIdx.x] = static_cast<A>(sum);
}

// Planes [begin, end), and the deep planes that are complete with them.
struct Slab {
  int begin, end, deep_begin, deep_end;
};

// Planes that a deep plane still waits for stay in the ring, which holds all planes that any one
// deep plane takes from.
std::vector<Slab> slabs_of(const Axis& axis, int ring, int most_deep) {
  std::vector<Slab> slabs;
  int begin = 0, deep_begin = 0;
  while (begin < axis.size || deep_begin < axis.deep) {
    const int waiting = deep_begin < axis.deep ? std::min(begin, axis.first_of(deep_begin)) : begin;
    const int end = std::max(begin, std::min(axis.size, waiting + ring));
    int deep_end = deep_begin;
    while (deep_end < axis.deep && deep_end < deep_begin + most_deep &&
           axis.end_of(deep_end) <= end) {
      ++deep_end;
    }
    slabs.push_back({begin, end, deep_begin, deep_end});
    begin = end;
    deep_begin = deep_end;
  }
  return slabs;
}

template <typename T>
class Backward {
 public:
  using A = ComputeType<T>;

  explicit Backward(const GcuArguments& arguments)
      : arguments_(arguments),
        m_(volumes_of(arguments)),
        queue_("gcu", arguments.skip, arguments.cuda.stream) {
    m_.grad = arguments.grad_compensated.data;
    m_.grad_dissimilarity = arguments.grad_dissimilarity.data;
    m_.grad_skip = arguments.grad_skip.data;
    m_.grad_deep = arguments.grad_deep.data;
    // Images are cut into slabs along rows.
    if (m_.z.size == 1 && m_.z.deep == 1) std::swap(m_.z, m_.y);
    wants_deep_ = arguments.grad_deep.data != nullptr || arguments.grad_deep_gate.data != nullptr;
  }

  void run() {
    if (m_.batch == 0) return;
    for_tiling<T, doubled_size<T>, taps_size<T>>(m_, [&](auto choice) { run_tiling(choice); });
  }

 private:
  template <typename Choice>
  void run_tiling(Choice) {
    constexpr Path path = Choice::path;
    using Tile = Tiling<T, path, Choice::size>;
    set_groups<T, Tile>(m_, backward_packs<T, path>);
    using Deep = Gather<T, path, gathered_size<T, path>>;
    Deep::set_groups(m_, g_);
    const std::vector<Slab> slabs = cut();
    take_scratch<Tile, Deep>(slabs);
    for (const Slab& slab : slabs) {
      if (slab.end > slab.begin) {
        set_planes<Tile>(m_, slab.begin, slab.end);
        queue_.launch("gcu_backward_voxels", gcu_backward_voxels_kernel<T, path, Choice::size>,
                      blocks_for(m_.batch * m_.warps, tile_threads / warp_size), tile_threads, 0,
                      m_);
        m_.adds = true;
      }
      if (wants_deep_ && slab.deep_end > slab.deep_begin) gather<Deep>(slab);
    }
    const std::int64_t rows = m_.batch * m_.channels;
    sum(arguments_.grad_skip_gate.data, rows, m_.sums, m_.warps);
    sum(arguments_.grad_deep_gate.data, rows, g_.sums, g_.slots);
  }

  std::vector<Slab> cut() {
    m_.ring = m_.z.size;
    if (!wants_deep_) return {{0, m_.z.size, 0, 0}};
    const std::int64_t plane = m_.voxels / m_.z.size, deep_plane = m_.deep_voxels / m_.z.deep;
    const std::int64_t bytes = sizeof(A) * m_.batch * 2 * plane;
    const std::int64_t deep_bytes = sizeof(A) * m_.batch * around * deep_plane;
    const double gradients = static_cast<double>(sizeof(T)) * m_.batch * m_.channels *
                             static_cast<double>(m_.voxels + m_.deep_voxels);
    const auto share = static_cast<std::int64_t>(scratch_share * gradients);
    const std::int64_t budget = std::max(small_scratch(), share);
    // As many deep planes as planes are complete with.
    const double ratio = static_cast<double>(m_.z.deep) / m_.z.size;
    const double each = static_cast<double>(bytes) + ratio * static_cast<double>(deep_bytes);
    std::int64_t ring = static_cast<std::int64_t>(static_cast<double>(budget) / each);
    const std::int64_t skip_bytes = sizeof(T) * m_.batch * m_.channels * plane;
    ring = std::min(ring, cached_bytes() / skip_bytes);
    int longest = 1;
    for (int j = 0; j < m_.z.deep; ++j) {
      longest = std::max(longest, m_.z.end_of(j) - m_.z.first_of(j));
    }
    ring = std::min<std::int64_t>(std::max<std::int64_t>(ring, 2 * longest), m_.z.size);
    m_.ring = static_cast<int>(ring);
    const auto most_deep = static_cast<std::int64_t>(ratio * static_cast<double>(ring)) + 1;
    return slabs_of(m_.z, m_.ring, static_cast<int>(std::min<std::int64_t>(most_deep, m_.z.deep)));
  }

  template <typename Tile, typename Deep>
  void take_scratch(const std::vector<Slab>& slabs) {
    int most_planes = 0, most_deep = 0;
    for (const Slab& slab : slabs) {
      most_planes = std::max(most_planes, slab.end - slab.begin);
      most_deep = std::max(most_deep, slab.deep_end - slab.deep_begin);
    }
    // Every warp takes the same number of tiles of the largest slab, or one less.
    set_planes<Tile>(m_, 0, most_planes);
    const std::int64_t enough = std::max<std::int64_t>(
        1, std::int64_t(queue_.multiprocessors()) * warps_of_a_multiprocessor / m_.batch);
    m_.warps = blocks_for(m_.tiles, blocks_for(m_.tiles, enough));
    m_.samples = divider_of(m_.warps, m_.warps * (m_.batch + tile_threads));
    const std::int64_t rows = m_.batch * m_.channels;
    if (arguments_.grad_skip_gate.data != nullptr) {
      m_.sums = arguments_.cuda.take<A>(rows * m_.warps);
    }
    if (!wants_deep_) return;
    const std::int64_t ring = m_.batch * m_.ring * (m_.voxels / m_.z.size);
    m_.cross = arguments_.cuda.take<A>(ring);
    m_.radial = arguments_.cuda.take<A>(ring);
    const std::int64_t deep_plane = m_.deep_voxels / m_.z.deep;
    for (const Slab& slab : slabs) {
      g_.slots += blocks_for(deep_plane * (slab.deep_end - slab.deep_begin),
                             Deep::voxels_of_block(g_.group_bits));
    }
    if (arguments_.grad_deep_gate.data != nullptr) {
      g_.sums = arguments_.cuda.take<A>(rows * g_.slots);
    }
    g_.coefficients = arguments_.cuda.take<A>(m_.batch * around * most_deep * deep_plane);
  }

  template <typename Deep>
  void gather(const Slab& slab) {
    g_.begin = slab.deep_begin;
    g_.end = slab.deep_end;
    g_.count = (m_.deep_voxels / m_.z.deep) * (slab.deep_end - slab.deep_begin);
    g_.columns = divider_of(m_.x.deep, g_.count);
    g_.rows = divider_of(m_.y.deep, g_.count);
    g_.samples = divider_of(g_.count, g_.count * (m_.batch + coefficient_threads));
    g_.blocks = static_cast<int>(blocks_for(g_.count, Deep::voxels_of_block(g_.group_bits)));
    queue_.launch("gcu_coefficients", gcu_coefficients_kernel<A>,
                  blocks_for(m_.batch * g_.count, coefficient_threads), coefficient_threads, 0, m_,
                  g_);
    queue_.launch("gcu_gather", gcu_gather_kernel<Deep>,
                  m_.batch * g_.blocks * blocks_for(m_.channels, g_.span), gather_threads,
                  shared_bytes<A>(gather_threads / warp_size * g_.span), m_, g_);
    g_.done += g_.blocks;
  }

  void sum(void* result, std::int64_t rows, const void* parts, std::int64_t count) const {
    if (result == nullptr) return;
    queue_.launch("gcu_sums", gcu_sums_kernel<A>, rows, sum_threads,
                  shared_bytes<double>(sum_threads / warp_size), static_cast<const A*>(parts),
                  count, static_cast<A*>(result));
  }

  const GcuArguments& arguments_;
  Volumes m_;
  Gathering g_{};
  const Queue queue_;
  bool wants_deep_;
};

}  // namespace

void gcu_backward(const GcuArguments& arguments) {
  for_dtype(arguments.skip.dtype,
            [&](auto type) { Backward<typename decltype(type)::type>(arguments).run(); });
}

}  // namespace cuda
}  // namespace grcsf
