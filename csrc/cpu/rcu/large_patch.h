// SPDX-License-Identifier: Apache-2.0
// rcu on the CPU: a patch that all threads work on together, such as the whole volume.
//
// The patch is cut into chunks of rows of about a thousand voxels. Pass one reads x and r for their
// means and ranges; pass two reads r alone, for the tables (in units of a block of nodes and a
// segment of chunks); the passes that follow attend chunk by chunk, with the queries made again
// rather than stored. So the cost is linear in the voxels. Segments, not threads, own partial
// results, and they are added in their order: the bits do not depend on the number of threads.
#pragma once

#include "cpu/rcu/attention.h"
#include "cpu/runtime/parallel.h"

namespace grcsf {
namespace {

constexpr std::int64_t most_segments = 64;
// Nodes of one map, where the alternative costs the square of the voxels.
constexpr std::int64_t most_nodes_of_volume = 1 << 18;

// The chunks of a patch.
struct Chunks {
  Box box;
  std::int64_t rows, count, segments;

  explicit Chunks(const Box& whole) : box(whole) {
    constexpr std::int64_t voxels = 1024;
    rows = std::max<std::int64_t>(1, voxels / box.extent[2]);
    count = (box.rows() + rows - 1) / rows;
    segments = std::min(count, most_segments);
  }

  std::int64_t first(std::int64_t chunk) const { return chunk * rows; }
  std::int64_t last(std::int64_t chunk) const { return std::min(box.rows(), (chunk + 1) * rows); }
  std::int64_t voxels(std::int64_t chunk) const {
    return (last(chunk) - first(chunk)) * box.extent[2];
  }
  std::int64_t most_voxels() const { return rows * box.extent[2]; }
  // The first chunk of one of `parts` segments.
  std::int64_t begin(std::int64_t segment, std::int64_t parts) const {
    return segment * count / parts;
  }
};

template <typename T>
struct LargePatch {
  using A = ComputeType<T>;

  const RcuArguments& arguments;
  const Sizes& s;
  const Projections<A>& projections;
  const Patches<const T> x, residual;
  const Chunks chunks;
  const Wanted wanted;
  Vector<double> means;     // [C + K * c]
  Vector<Table<A>> tables;  // one a head
  Vector<A> centers;        // [K * c]: the first residual voxel
  Vector<Vector<A>> coefficients;
  Vector<Range<A>> of_a, of_r;  // of every head and map; c = 1 only

  // A thread's buffers.
  struct Space {
    Packed<A> own, maps, grad;
    Packed<A> keys, grad_maps;  // where the gradient of the map is wanted
    Attention<A> attention;

    void carve(Carver<A>& carver, const Sizes& s, std::int64_t voxels, Wanted wanted) {
      const std::int64_t pitch = channel_pitch<A>(voxels);
      const bool backward = wanted != Wanted::forward;
      own = {carver.take(s.channels * pitch), 0, pitch};
      maps = {carver.take(s.map_lines * pitch), 0, pitch};
      grad = {backward ? carver.take(s.channels * pitch) : nullptr, 0, pitch};
      for (Packed<A>* packed : {&keys, &grad_maps}) {
        *packed = {backward ? carver.take(s.map_lines * pitch) : nullptr, 0, pitch};
      }
      attention.carve(carver, s, voxels, 0, wanted);
    }
  };
  const Spaces<Space, A> spaces;

  LargePatch(const RcuArguments& given, const Sizes& sizes, const Projections<A>& weights,
             const Box& box, Wanted given_wanted)
      : arguments(given),
        s(sizes),
        projections(weights),
        x(given.x),
        residual(given.residual),
        chunks(box),
        wanted(given_wanted),
        means(s.channels + s.map_lines),
        tables(s.maps * s.heads),
        centers(s.map_lines),
        spaces(given.threads, s, chunks.most_voxels(), wanted) {
    const T* first = residual.at(box);
    for (std::int64_t i = 0; i < s.map_lines; ++i) {
      centers[i] = widen(first[i * residual.channel]);
    }
  }

  void pack_chunk(const Patches<const T>& volume, std::int64_t chunk, std::int64_t channels,
                  const Packed<A>& packed) const {
    pack(volume, chunks.box, chunks.box.extent[2], chunks.first(chunk), chunks.last(chunk),
         channels, packed);
  }

  // x of a chunk, and its queries.
  void load_queries(std::int64_t chunk, Space& space) const {
    pack_chunk(x, chunk, s.channels, space.own);
    project_queries(projections, s, space.own.data, space.own.pitch, chunks.voxels(chunk),
                    space.attention.a, [] {});
    space.attention.centers = centers;
  }

  // Calls body(Keys) for all residual voxels of a map, relative to the first one.
  template <typename Body>
  void each_keys(std::int64_t map, Space& space, Body body) const {
    for (std::int64_t chunk = 0; chunk < chunks.count; ++chunk) {
      pack_chunk(residual, chunk, s.map_lines, space.maps);
      const std::int64_t line = map * s.map_channels, voxels = chunks.voxels(chunk);
      const Rows<A> keys{space.maps.data + line * space.maps.pitch, space.maps.pitch};
      center_keys(keys, s.map_channels, voxels, &centers[line]);
      body(Keys<A>{constant(keys), voxels});
    }
  }

  // The means of the patch and, for c = 1, a table for every head where it pays.
  template <int Kept>
  void prepare() {
    const std::int64_t inputs = s.channels + s.map_lines, heads = s.maps * s.heads;
    Vector<double> sums(chunks.segments * inputs);
    const A infinity = static_cast<A>(__builtin_inf());
    of_a.assign(chunks.segments * heads, {infinity, -infinity});
    of_r.assign(chunks.segments * s.maps, {infinity, -infinity});
    const bool wants_ranges = s.map_channels == 1;
    parallel_for(chunks.segments, arguments.threads,
                 [&](std::int64_t begin, std::int64_t end, int thread) {
                   Space& space = spaces[thread];
                   for (std::int64_t segment = begin; segment < end; ++segment) {
                     survey(segment, space, wants_ranges, &sums[segment * inputs],
                            &of_a[segment * heads], &of_r[segment * s.maps]);
                   }
                 });
    for (std::int64_t segment = 1; segment < chunks.segments; ++segment) {
      for (std::int64_t i = 0; i < inputs; ++i) sums[i] += sums[segment * inputs + i];
      for (std::int64_t i = 0; i < heads; ++i) widen_range(of_a[segment * heads + i], of_a[i]);
      for (std::int64_t i = 0; i < s.maps; ++i) widen_range(of_r[segment * s.maps + i], of_r[i]);
    }
    for (std::int64_t i = 0; i < inputs; ++i) {
      means[i] = sums[i] / static_cast<double>(chunks.box.voxels());
    }
    if (!wants_ranges) return;
    for (std::int64_t k = 0; k < s.maps; ++k) make_tables<Kept>(k, &of_a[k * s.heads], of_r[k]);
  }

  // The largest |a| of the heads of a map.
  double greatest_query(std::int64_t map) const {
    double greatest = 0;
    for (std::int64_t h = map * s.heads; h < (map + 1) * s.heads; ++h) {
      greatest =
          std::max<double>({greatest, std::fabs(of_a[h].least), std::fabs(of_a[h].greatest)});
    }
    return greatest;
  }

 private:
  static void widen_range(const Range<A>& by, Range<A>& range) {
    range.least = std::min(range.least, by.least);
    range.greatest = std::max(range.greatest, by.greatest);
  }

  void survey(std::int64_t segment, Space& space, bool wants_ranges, double* sums,
              Range<A>* range_of_a, Range<A>* range_of_r) const {
    const std::int64_t last = chunks.begin(segment + 1, chunks.segments);
    for (std::int64_t chunk = chunks.begin(segment, chunks.segments); chunk < last; ++chunk) {
      const std::int64_t voxels = chunks.voxels(chunk);
      load_queries(chunk, space);
      pack_chunk(residual, chunk, s.map_lines, space.maps);
      const Rows<A> maps{space.maps.data, space.maps.pitch};
      Vector<double>& own = space.attention.means;
      means_of(s, space.own.data, space.own.pitch, maps, voxels, own.data());
      for (std::size_t i = 0; i < own.size(); ++i) sums[i] += own[i] * static_cast<double>(voxels);
      if (!wants_ranges) continue;
      for (std::int64_t i = 0; i < s.lines; ++i) {
        widen_range(range_of(space.attention.a[i], voxels), range_of_a[i]);
      }
      for (std::int64_t k = 0; k < s.maps; ++k)
        widen_range(range_of(maps[k], voxels), range_of_r[k]);
    }
  }

  template <int Kept>
  void make_tables(std::int64_t map, const Range<A>* range_of_a, const Range<A>& range_of_r) {
    Vector<Nodes> nodes;
    bool shared = false;
    const std::int64_t most = std::min(most_nodes_of_volume, 4 * s.heads * chunks.box.voxels());
    plan_nodes<T>(range_of_a, s.heads, range_of_r.least, range_of_r.greatest, most, nodes, shared);
    for (std::int64_t h = 0; h < s.heads; ++h) {
      Table<A>& table = tables[map * s.heads + h];
      if (shared && h > 0) {
        table = tables[map * s.heads];
      } else if (nodes[h].count > 0) {
        const Vector<Moments> moments = volume_moments<Kept>(map, nodes[h]);
        Splines<A> splines;
        splines.mean = room_for(nodes[h]);
        if (wanted != Wanted::forward) splines.variance = room_for(nodes[h]);
        if (wanted == Wanted::map_gradient) splines.log = room_for(nodes[h]);
        table = table_of(nodes[h], moments.data(), splines);
      }
    }
  }

  A* room_for(const Nodes& nodes) {
    coefficients.emplace_back(4 * nodes.count);
    return coefficients.back().data();
  }

  // The moments of a whole map at all nodes.
  template <int Kept>
  Vector<Moments> volume_moments(std::int64_t map, const Nodes& nodes) const {
    const std::int64_t blocks = nodes.blocks(), size = block_nodes * moments_kept;
    const std::int64_t parts =
        std::min(chunks.count, std::max<std::int64_t>(1, most_segments / blocks));
    Vector<double> sums(blocks * parts * size), centers(blocks * parts);
    parallel_for(blocks * parts, arguments.threads,
                 [&](std::int64_t begin, std::int64_t end, int thread) {
                   for (std::int64_t unit = begin; unit < end; ++unit) {
                     centers[unit] = block_moments<Kept>(map, nodes, unit / parts, unit % parts,
                                                         parts, spaces[thread], &sums[unit * size]);
                   }
                 });
    Vector<Moments> moments(nodes.count);
    for (std::int64_t node = 0; node < nodes.count; ++node) {
      const std::int64_t block = node / block_nodes, first = block * parts;
      const std::int64_t at = node % block_nodes * moments_kept;
      std::int64_t heaviest = 0;
      for (std::int64_t part = 1; part < parts; ++part) {
        if (sums[(first + part) * size + at] > sums[(first + heaviest) * size + at])
          heaviest = part;
      }
      const double center = centers[first + heaviest];
      double total[moments_kept] = {};
      for (std::int64_t part = 0; part < parts; ++part) {
        // Moments about one center from those about another, d away.
        const double* own = &sums[(first + part) * size + at];
        const double d = centers[first + part] - center;
        total[0] += own[0];
        total[1] += own[1] + d * own[0];
        total[2] += own[2] + d * (2 * own[1] + d * own[0]);
        total[3] += own[3] + d * (3 * own[2] + d * (3 * own[1] + d * own[0]));
      }
      moments[node] = moments_of(total, center);
    }
    return moments;
  }

  // Adds the moments of a segment at the nodes of a block; returns the center they are taken about.
  template <int Kept>
  double block_moments(std::int64_t map, const Nodes& nodes, std::int64_t block, std::int64_t part,
                       std::int64_t parts, Space& space, double* sums) const {
    Patches<const T> own = residual;
    own.data += map * residual.channel;
    const std::int64_t begin = chunks.begin(part, parts), end = chunks.begin(part + 1, parts);
    const A about = static_cast<A>((nodes.least + nodes.greatest) / 2);
    const Weights<A>& weights = space.attention.space.weights;
    A* r = space.maps.data;
    double start[2] = {};
    for (std::int64_t chunk = begin; chunk < end; ++chunk) {
      pack_chunk(own, chunk, 1, space.maps);
      start_block(r, chunks.voxels(chunk), nodes, block, about, weights.now, start);
    }
    const A center = start[0] > 0 ? static_cast<A>(about + start[1] / start[0]) : about;
    for (std::int64_t chunk = begin; chunk < end; ++chunk) {
      const std::int64_t voxels = chunks.voxels(chunk);
      double ignored[2] = {}, own_sums[block_nodes * moments_kept] = {};
      pack_chunk(own, chunk, 1, space.maps);
      node_factors(r, voxels, nodes, weights.factor);
      start_block(r, voxels, nodes, block, about, weights.now, ignored);
      sum_block<A, Kept>(r, voxels, nodes, block, center, weights, own_sums);
      for (std::int64_t i = 0; i < nodes.in_block(block) * moments_kept; ++i)
        sums[i] += own_sums[i];
    }
    return center;
  }
};

}  // namespace
}  // namespace grcsf
