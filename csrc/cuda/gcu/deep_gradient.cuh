// SPDX-License-Identifier: Apache-2.0
// gcu on CUDA, backward, second half: deep voxels gather their gradient from alpha and beta.
//
// With w_vj the weight of deep voxel j in voxel v, the gradient of the gated deep tensor is
// sum_v w_vj alpha_v f_v - sum_v w_vj beta_v u_v. As u_v = sum_k w_vk deep_k, the second term is
// sum_k K_jk deep_k over the 27 deep voxels k around j, with K_jk = sum_v w_vj w_vk beta_v: the
// same for all channels. One kernel makes K, a thread for each deep voxel; the next one gathers
// the first term from the rows of skip, and applies K.
//
// Bytes: grad_deep [B, C, V'] written once. Every row of skip is read by the (usually 4) deep rows
// that it takes from; blocks hold neighboring deep rows, which find it in L1, and the slab of skip
// is small enough to still lie in L2 from the kernel before. K is written and read once for every
// `packs` channels, in L2.
//
// Hazard: the sums for the gate go through shared memory, with one barrier.
#pragma once

#include "cuda/gcu/interpolation.cuh"

namespace grcsf {
namespace cuda {
namespace {

constexpr int gather_threads = 256;
constexpr int coefficient_threads = 128;
constexpr int around = 27;        // deep voxels around one, itself included
constexpr int taken_at_once = 4;  // voxels along x whose weights are in registers

// The deep planes of one launch.
struct Gathering {
  int begin, end;
  std::int64_t count;  // their voxels, of a sample
  void* coefficients;  // K, [B, 27, count]
  void* sums;          // for the gate of deep, [B, C, slots]
  std::int64_t slots, done;
  int blocks;             // of a sample and a chunk of channels
  Divider columns, rows;  // of deep
  Divider samples;        // by count
  int group_bits, span;   // as in Volumes, of the gathering
};

// A deep voxel, and the voxels that take from it.
struct DeepVoxel {
  int z, y, x;
  int z_begin, z_end, y_begin, y_end, x_begin, x_end;
};

__device__ __forceinline__ DeepVoxel deep_voxel_of(const Volumes& m, const Gathering& g,
                                                   std::int64_t index) {
  DeepVoxel j;
  const std::int64_t row = g.columns.quotient(index);
  const auto plane = static_cast<int>(g.rows.quotient(row));
  j.x = static_cast<int>(index - row * m.x.deep);
  j.y = static_cast<int>(row - plane * std::int64_t(m.y.deep));
  j.z = g.begin + plane;
  j.z_begin = m.z.first_of(j.z);
  j.z_end = m.z.end_of(j.z);
  j.y_begin = m.y.first_of(j.y);
  j.y_end = m.y.end_of(j.y);
  j.x_begin = m.x.first_of(j.x);
  j.x_end = m.x.end_of(j.x);
  return j;
}

// What a voxel gives to a deep voxel (`own`) times what it takes from that one and its neighbors.
template <typename A>
struct Products {
  A before, here, after;
};

template <typename A>
__device__ __forceinline__ Products<A> products_of(A distance) {
  const A own = greatest(1 - absolute(distance), A(0));
  return {own * greatest(-distance, A(0)), own * own, own * greatest(distance, A(0))};
}

template <typename A>
__global__ void __launch_bounds__(coefficient_threads)
    gcu_coefficients_kernel(const Volumes m, const Gathering g) {
  const std::int64_t thread = std::int64_t(blockIdx.x) * coefficient_threads + threadIdx.x;
  const std::int64_t sample = g.samples.quotient(thread), index = thread - sample * g.count;
  if (sample >= m.batch) return;
  const DeepVoxel j = deep_voxel_of(m, g, index);
  const std::int64_t plane_voxels = std::int64_t(m.y.size) * m.x.size;
  const A* radial = static_cast<const A*>(m.radial) + sample * m.ring * plane_voxels;
  A near[3][3][3] = {};
#pragma unroll 1
  for (int x = j.x_begin; x < j.x_end; x += taken_at_once) {
    Products<A> along_x[taken_at_once];
#pragma unroll
    for (int i = 0; i < taken_at_once; ++i) {
      along_x[i] = products_of(distance_of<A>(m.x, x + i, j.x));
    }
#pragma unroll 1
    for (int z = j.z_begin; z < j.z_end; ++z) {
      A plane[3][3] = {};
      const A* row = radial + z % m.ring * plane_voxels + x;
#pragma unroll 1
      for (int y = j.y_begin; y < j.y_end; ++y) {
        A sums[3] = {};
#pragma unroll
        for (int i = 0; i < taken_at_once; ++i) {
          if (x + i >= j.x_end) continue;
          const A beta = row[std::int64_t(y) * m.x.size + i];
          sums[0] += along_x[i].before * beta;
          sums[1] += along_x[i].here * beta;
          sums[2] += along_x[i].after * beta;
        }
        const auto along_y = products_of(distance_of<A>(m.y, y, j.y));
#pragma unroll
        for (int k = 0; k < 3; ++k) {
          plane[0][k] += along_y.before * sums[k];
          plane[1][k] += along_y.here * sums[k];
          plane[2][k] += along_y.after * sums[k];
        }
      }
      const auto along_z = products_of(distance_of<A>(m.z, z, j.z));
#pragma unroll
      for (int k = 0; k < 9; ++k) {
        near[0][k / 3][k % 3] += along_z.before * plane[k / 3][k % 3];
        near[1][k / 3][k % 3] += along_z.here * plane[k / 3][k % 3];
        near[2][k / 3][k % 3] += along_z.after * plane[k / 3][k % 3];
      }
    }
  }
  A* to = static_cast<A*>(g.coefficients) + sample * around * g.count + index;
#pragma unroll
  for (int k = 0; k < around; ++k) to[k * g.count] = near[k / 9][k / 3 % 3][k % 3];
}

// Values of a pack by path: deep columns around a vector of 16 bytes of skip, channels, or one deep
// voxel.
template <typename T, Path path>
constexpr int gathered_size =
    path == Path::doubled ? full_pack<T> / 2 : (path == Path::channels_last ? full_pack<T> : 1);

// Channels [c0, c0 + span) of deep voxels: a lane has `packs` packs of them.
template <typename T_, Path path, int size>
struct Gathered {
  using T = T_;
  using A = ComputeType<T>;
  using Tile = Tiling<T, path, size>;
  static constexpr int packs = path == Path::channels_last ? 1 : 4;

  // Where channels are neighbors so are the lanes that have them; else deep voxels are.
  static void set_groups(const Volumes& m, Gathering& g) {
    while (Tile::across && (size << g.group_bits) < m.channels && (1 << g.group_bits) < warp_size) {
      ++g.group_bits;
    }
    g.span = (packs * Tile::channels) << g.group_bits;
  }
  static std::int64_t voxels_of_block(int group_bits) {
    return (gather_threads >> group_bits) * Tile::voxels;
  }

  const Volumes& m;
  const Gathering& g;
  const Lane lane;
  const int c0;
  const std::int64_t sample;
};

// How those are gathered, in any layout.
template <typename T_, Path path, int size>
struct Gather : Gathered<T_, path, size> {
  using Base = Gathered<T_, path, size>;
  using Base::c0, Base::g, Base::lane, Base::m, Base::packs, Base::sample;
  using typename Base::A;
  using typename Base::T;
  using typename Base::Tile;
  static constexpr int values = size;

  // Adds sum_v w_vj alpha_v skip_v.
  __device__ __forceinline__ void gather(const DeepVoxel& j, A (&total)[packs][values]) const {
    const std::int64_t plane_voxels = std::int64_t(m.y.size) * m.x.size;
    const A* cross = static_cast<const A*>(m.cross) + sample * m.ring * plane_voxels;
    const T* skip = static_cast<const T*>(m.skip) + sample * m.channels * m.voxels;
#pragma unroll 1
    for (int x = j.x_begin; x < j.x_end; x += taken_at_once) {
      A along_x[taken_at_once];
#pragma unroll
      for (int i = 0; i < taken_at_once; ++i) {
        along_x[i] = greatest(1 - absolute(distance_of<A>(m.x, x + i, j.x)), A(0));
      }
#pragma unroll 1
      for (int z = j.z_begin; z < j.z_end; ++z) {
        const A weight_z = 1 - absolute(distance_of<A>(m.z, z, j.z));
#pragma unroll 1
        for (int y = j.y_begin; y < j.y_end; ++y) {
          const A weight = weight_z * (1 - absolute(distance_of<A>(m.y, y, j.y)));
          const A* alpha = cross + (std::int64_t(z % m.ring) * m.y.size + y) * m.x.size + x;
          const T* row = skip + ((std::int64_t(z) * m.y.size + y) * m.x.size + x) * m.voxel_stride;
          add_row(alpha, row, weight, along_x, j.x_end - x, total);
        }
      }
    }
  }

  __device__ __forceinline__ void add_row(const A* alpha, const T* row, A weight,
                                          const A (&along_x)[taken_at_once], int left,
                                          A (&total)[packs][values]) const {
    A factors[taken_at_once];
#pragma unroll
    for (int i = 0; i < taken_at_once; ++i) {
      factors[i] = i < left ? weight * along_x[i] * alpha[i] : A(0);
    }
#pragma unroll
    for (int s = 0; s < packs; ++s) {
      const int c = channel_of<Tile, packs>(g.group_bits, lane, c0, s);
      if (c >= m.channels) continue;
#pragma unroll
      for (int i = 0; i < taken_at_once; ++i) {
        if (i >= left) continue;
        const auto pack = load_pack<T, values>(row + c * m.channel_stride + i * m.voxel_stride);
#pragma unroll
        for (int e = 0; e < values; ++e) total[s][e] += factors[i] * widened(pack[e]);
      }
    }
  }

  // Adds sum_k K_jk deep_k; `deep` is at voxel j.
  __device__ __forceinline__ void apply(const DeepVoxel& j, const A* coefficients, const T* deep,
                                        A (&total)[packs][values]) const {
    const int planes = m.z.deep > 1 ? 1 : 0;  // before and after
#pragma unroll 1
    for (int z = -planes; z <= planes; ++z) {
#pragma unroll 1
      for (int y = -1; y <= 1; ++y) {
        if (j.z + z < 0 || j.z + z >= m.z.deep || j.y + y < 0 || j.y + y >= m.y.deep) continue;
        const T* row = deep + (std::int64_t(z) * m.y.deep + y) * m.x.deep * m.voxel_stride;
        const A* factors = coefficients + (z * 9 + y * 3 + 12) * g.count;
#pragma unroll
        for (int x = -1; x <= 1; ++x) {
          if (j.x + x < 0 || j.x + x >= m.x.deep) continue;
          const A factor = factors[(x + 1) * g.count];
#pragma unroll
          for (int s = 0; s < packs; ++s) {
            const int c = channel_of<Tile, packs>(g.group_bits, lane, c0, s);
            if (c >= m.channels) continue;
            const auto pack =
                load_pack<T, values>(row + c * m.deep_channel_stride + x * m.voxel_stride);
#pragma unroll
            for (int e = 0; e < values; ++e) total[s][e] += factor * widened(pack[e]);
          }
        }
      }
    }
  }
};

// `count` values at a multiple of their bytes, or of 16 bytes.
template <typename A, int count>
__device__ __forceinline__ void load_run(const A* from, A* values) {
  constexpr int part = count < full_pack<A> ? count : full_pack<A>;
#pragma unroll
  for (int i = 0; i < count; i += part) {
    const auto pack = load_pack<A, part>(from + i);
#pragma unroll
    for (int k = 0; k < part; ++k) values[i + k] = pack[k];
  }
}

// Rows of twice the size of the deep row. What the rows of skip give to a deep row is added, voxel
// by voxel, before it is gathered along x: deep column j takes 3/4 of voxels 2j and 2j + 1, and 1/4
// of the ones beside them. The voxel beside an edge is the edge's own.
template <typename T_, int size>
struct Gather<T_, Path::doubled, size> : Gathered<T_, Path::doubled, size> {
  using Base = Gathered<T_, Path::doubled, size>;
  using Base::c0, Base::g, Base::lane, Base::m, Base::packs, Base::sample;
  using typename Base::A;
  using typename Base::T;
  using typename Base::Tile;
  static constexpr int voxels = 2 * size;

  __device__ __forceinline__ void gather(const DeepVoxel& j, A (&total)[packs][size]) const {
    const std::int64_t plane_voxels = std::int64_t(m.y.size) * m.x.size;
    const A* cross = static_cast<const A*>(m.cross) + sample * m.ring * plane_voxels;
    const T* skip = static_cast<const T*>(m.skip) + sample * m.channels * m.voxels;
    const int x = 2 * j.x;
    const int before = x > 0 ? -1 : 0;
    const int after = x + voxels < m.x.size ? voxels : voxels - 1;
    A sums[packs][voxels + 2] = {};  // from voxel x - 1 on
#pragma unroll 1
    for (int z = j.z_begin; z < j.z_end; ++z) {
      const A weight_z = 1 - absolute(distance_of<A>(m.z, z, j.z));
#pragma unroll 1
      for (int y = j.y_begin; y < j.y_end; ++y) {
        const A weight = weight_z * (1 - absolute(distance_of<A>(m.y, y, j.y)));
        const A* alpha = cross + (std::int64_t(z % m.ring) * m.y.size + y) * m.x.size + x;
        const T* row = skip + (std::int64_t(z) * m.y.size + y) * m.x.size + x;
        A factors[voxels + 2];
        factors[0] = alpha[before];
        load_run<A, voxels>(alpha, factors + 1);
        factors[voxels + 1] = alpha[after];
#pragma unroll
        for (int i = 0; i < voxels + 2; ++i) factors[i] *= weight;
#pragma unroll
        for (int s = 0; s < packs; ++s) {
          if (c0 + s >= m.channels) continue;
          const T* own = row + (c0 + s) * m.voxels;
          const auto pack = load_pack<T, voxels>(own);
          sums[s][0] += factors[0] * widened(own[before]);
#pragma unroll
          for (int i = 0; i < voxels; ++i) sums[s][i + 1] += factors[i + 1] * widened(pack[i]);
          sums[s][voxels + 1] += factors[voxels + 1] * widened(own[after]);
        }
      }
    }
#pragma unroll
    for (int s = 0; s < packs; ++s) {
#pragma unroll
      for (int i = 0; i < size; ++i) {
        total[s][i] = A(0.25) * (sums[s][2 * i] + sums[s][2 * i + 3]) +
                      A(0.75) * (sums[s][2 * i + 1] + sums[s][2 * i + 2]);
      }
    }
  }

  // K is 0 beyond the edges.
  __device__ __forceinline__ void apply(const DeepVoxel& j, const A* coefficients, const T* deep,
                                        A (&total)[packs][size]) const {
    const int planes = m.z.deep > 1 ? 1 : 0;
    const int before = j.x > 0 ? -1 : 0;
    const int after = j.x + size < m.x.deep ? size : size - 1;
#pragma unroll 1
    for (int z = -planes; z <= planes; ++z) {
#pragma unroll 1
      for (int y = -1; y <= 1; ++y) {
        if (j.z + z < 0 || j.z + z >= m.z.deep || j.y + y < 0 || j.y + y >= m.y.deep) continue;
        const T* row = deep + (std::int64_t(z) * m.y.deep + y) * m.x.deep;
        A factors[3][size];
#pragma unroll
        for (int k = 0; k < 3; ++k) {
          load_run<A, size>(coefficients + (z * 9 + y * 3 + 12 + k) * g.count, factors[k]);
        }
#pragma unroll
        for (int s = 0; s < packs; ++s) {
          if (c0 + s >= m.channels) continue;
          const T* own = row + (c0 + s) * m.deep_voxels;
          const auto pack = load_pack<T, size>(own);
          A columns[size + 2];
          columns[0] = widened(own[before]);
#pragma unroll
          for (int i = 0; i < size; ++i) columns[i + 1] = widened(pack[i]);
          columns[size + 1] = widened(own[after]);
#pragma unroll
          for (int i = 0; i < size; ++i) {
            total[s][i] += factors[0][i] * columns[i] + factors[1][i] * columns[i + 1] +
                           factors[2][i] * columns[i + 2];
          }
        }
      }
    }
  }
};

template <typename Deep>
__global__ void __launch_bounds__(gather_threads, 2)
    gcu_gather_kernel(const Volumes m, const Gathering g) {
  using T = typename Deep::T;
  using A = typename Deep::A;
  using Tile = typename Deep::Tile;
  constexpr int packs = Deep::packs, size = Tile::pack, warps = gather_threads / warp_size;
  SharedArena arena;
  const auto space = arena.take<A>(warps * g.span);
  const int chunks = (m.channels + g.span - 1) / g.span;
  const int c0 = static_cast<int>(blockIdx.x % chunks) * g.span;
  const int item = static_cast<int>(blockIdx.x / chunks);
  const int sample = item / g.blocks, block = item % g.blocks;
  const Lane lane = lane_of(g.group_bits);
  const std::int64_t columns = warp_size >> g.group_bits;
  const std::int64_t index =
      ((block * warps + warp_index()) * columns + lane.column) * Tile::voxels;
  const bool exists = index < g.count;
  A gate[packs][Tile::channels] = {};
  if (exists) {
    const Deep gatherer{{m, g, lane, c0, sample}};
    const DeepVoxel j = deep_voxel_of(m, g, index);
    A cross[packs][size] = {}, radial[packs][size] = {};
    gatherer.gather(j, cross);
    const std::int64_t own = sample * m.channels * m.deep_voxels +
                             (std::int64_t(g.begin) * m.y.deep * m.x.deep + index) * m.voxel_stride;
    const T* deep = static_cast<const T*>(m.deep) + own;
    const A* coefficients = static_cast<const A*>(g.coefficients) + sample * around * g.count;
    gatherer.apply(j, coefficients + index, deep, radial);
#pragma unroll
    for (int s = 0; s < packs; ++s) {
      const int c = channel_of<Tile, packs>(g.group_bits, lane, c0, s);
      if (c >= m.channels) continue;
      const Gates<Tile, A> gates(m, sample, c);
      const auto value = load_pack<T, size>(deep + c * m.deep_channel_stride);
      Pack<T, size> result;
#pragma unroll
      for (int e = 0; e < size; ++e) {
        const int channel = Tile::across ? e : 0;
        const A total = cross[s][e] * gates.skip[channel] - radial[s][e] * gates.deep[channel];
        result[e] = narrowed<T>(total * gates.deep[channel]);
        gate[s][channel] += total * widened(value[e]);
      }
      if (m.grad_deep != nullptr) {
        store_once(static_cast<T*>(m.grad_deep) + own + c * m.deep_channel_stride, result);
      }
    }
  }
  if (g.sums == nullptr) return;
#pragma unroll
  for (int s = 0; s < packs; ++s) {
#pragma unroll
    for (int e = 0; e < Tile::channels; ++e) {
      const A sum = column_sum(g.group_bits, gate[s][e]);
      const int c = channel_of<Tile, packs>(g.group_bits, lane, 0, s) + e;
      if (lane.column == 0) space.set(warp_index() * g.span + c, sum);
    }
  }
  sync_block();
  for (int c = static_cast<int>(threadIdx.x); c < g.span; c += gather_threads) {
    if (c0 + c >= m.channels) continue;
    A sum = 0;
    for (int warp = 0; warp < warps; ++warp) sum += space.get(warp * g.span + c);
    static_cast<A*>(g.sums)[(sample * m.channels + c0 + c) * g.slots + g.done + block] = sum;
  }
}

}  // namespace
}  // namespace cuda
}  // namespace grcsf
