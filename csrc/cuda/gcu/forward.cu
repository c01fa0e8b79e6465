// SPDX-License-Identifier: Apache-2.0
// gcu on CUDA, forward: a warp compensates a tile of voxels, all channels; see gcu/tiles.cuh for
// tiles and paths.
//
// Bytes: skip [B, C, V] read once, compensated [B, C, V] and dissimilarity [B, V] written once;
// deep [B, C, V'] comes from the caches. Lanes keep skip in registers between the similarity and
// the output. Where channels are more than a tile holds, skip is read again for the output; the
// tile was read microseconds before, so it comes from L2.
//
// No thread writes what another one reads.
#include "cuda/gcu/gcu.h"

#include "cuda/gcu/interpolation.cuh"

namespace grcsf {
namespace cuda {
namespace {

// Packs of a lane. As many as keep enough bytes under way in 128 registers.
// The taps of a pack take registers too: these packs are of 8 bytes.
template <Path path>
constexpr int forward_packs = path == Path::channels_last ? 2 : 8;

template <typename T, Path path, int size>
__global__ void __launch_bounds__(tile_threads, 4) gcu_forward_kernel(const Volumes m) {
  using A = ComputeType<T>;
  using Tile = Tiling<T, path, size>;
  constexpr int packs = forward_packs<path>;
  const std::int64_t warp = std::int64_t(blockIdx.x) * (tile_threads / warp_size) + warp_index();
  const std::int64_t sample = m.samples.quotient(warp);
  if (sample >= m.batch) return;
  const Lane lane = lane_of(m.group_bits);
  const auto place = place_of<Tile, A>(m, lane, warp - sample * m.tiles);
  const Columns<T, path, size> columns(m, place.x);
  const std::int64_t own = sample * m.channels * m.voxels + place.voxel * m.voxel_stride;
  const T* skip = static_cast<const T*>(m.skip) + own;
  const T* deep = static_cast<const T*>(m.deep) + sample * m.channels * m.deep_voxels +
                  place.deep_row + columns.origin;
  T* compensated = static_cast<T*>(m.compensated) + own;

  A products[Tile::voxels] = {}, skip_squares[Tile::voxels] = {}, up_squares[Tile::voxels] = {};
  A factor[Tile::voxels] = {};
  Words<T, size> held[packs];
  const bool once = m.channels <= m.span;
#pragma unroll 1
  for (int pass = 0; pass < 2; ++pass) {
#pragma unroll 1
    for (int c0 = 0; c0 < m.channels; c0 += m.span) {
      const int first = channel_of<Tile, packs>(m.group_bits, lane, c0, 0);
      const std::int64_t at = first * m.channel_stride;
      const T* rows = deep + first * m.deep_channel_stride;
      if (pass == 0 || !once) {
#pragma unroll
        for (int s = 0; s < packs; ++s) {
          const int c = channel_of<Tile, packs>(m.group_bits, lane, c0, s);
          if (c < m.channels) held[s] = Words<T, size>::load_once(skip + (at + s * m.step));
        }
      }
#pragma unroll
      for (int s = 0; s < packs; ++s) {
        const int c = channel_of<Tile, packs>(m.group_bits, lane, c0, s);
        if (c >= m.channels) continue;
        if (pass == 0) {
          const Gates<Tile, A> gates(m, sample, c);
          A up[size];
          columns.interpolate(deep_rows(m, rows + s * m.deep_step, place), gates.deep, up);
#pragma unroll
          for (int e = 0; e < size; ++e) {
            const int voxel = Tile::across ? 0 : e, channel = Tile::across ? e : 0;
            const A f = held[s].get(e) * gates.skip[channel];
            const A u = up[e];
            products[voxel] += f * u;
            skip_squares[voxel] += f * f;
            up_squares[voxel] += u * u;
          }
        } else if (place.exists) {
          Pack<T, size> result;
#pragma unroll
          for (int e = 0; e < size; ++e) {
            result[e] = narrowed<T>(held[s].get(e) * factor[Tile::across ? 0 : e]);
          }
          store_once(compensated + (at + s * m.step), result);
        }
      }
    }
    if (pass == 1) break;
    const Scatter<Tile::voxels> scatter{1 << m.group_bits};
    scatter.sum(products);
    scatter.sum(skip_squares);
    scatter.sum(up_squares);
    T* dissimilarity = static_cast<T*>(m.dissimilarity) + sample * m.voxels + place.voxel;
#pragma unroll
    for (int i = 0; i < Tile::voxels; ++i) {
      if (i >= scatter.count()) continue;
      // Multiplied one after the other: the product of two inverse eps could overflow.
      const A cosine = products[i] * InverseNorm<A>(skip_squares[i], A(m.eps)).value *
                       InverseNorm<A>(up_squares[i], A(m.eps)).value;
      factor[i] = m.similarity ? 1 + cosine : 2 - cosine;
      if (place.exists && scatter.writes()) {
        dissimilarity[scatter.first() + i] = narrowed<T>(1 - cosine);
      }
    }
    scatter.share(factor);
  }
}

template <typename T>
void forward(const GcuArguments& arguments) {
  Volumes m = volumes_of(arguments);
  m.compensated = arguments.compensated.data;
  m.dissimilarity = arguments.dissimilarity.data;
  for_tiling<T, full_pack<T>, full_pack<T> / 2>(m, [&](auto choice) {
    constexpr Path path = decltype(choice)::path;
    constexpr int size = decltype(choice)::size;
    using Tile = Tiling<T, path, size>;
    set_groups<T, Tile>(m, forward_packs<path>);
    set_planes<Tile>(m, 0, m.z.size);
    m.samples = divider_of(m.tiles, m.tiles * (m.batch + tile_threads));
    const Queue queue("gcu", arguments.skip, arguments.cuda.stream);
    queue.launch("gcu_forward", gcu_forward_kernel<T, path, size>,
                 blocks_for(m.batch * m.tiles, tile_threads / warp_size), tile_threads, 0, m);
  });
}

}  // namespace

void gcu_forward(const GcuArguments& arguments) {
  for_dtype(arguments.skip.dtype,
            [&](auto type) { forward<typename decltype(type)::type>(arguments); });
}

}  // namespace cuda
}  // namespace grcsf
