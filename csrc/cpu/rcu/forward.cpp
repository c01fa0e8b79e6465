// SPDX-License-Identifier: Apache-2.0
// rcu on the CPU, forward.
//
// Patch by patch, on one thread each: its voxels are packed once (C * P values, in the second-level
// cache), and projection, score, attention (rcu/table.h, rcu/direct.h), sum over maps and residual
// connection happen there. x is read once and out written once: 2 * V * C + V * K * c values move.
// Patches that share a cache line along the last axis are packed together.
//
// A patch that does not fit (global attention) is done by all threads together, in three passes
// over chunks of rows, of which two read x: rcu/large_patch.h.
//
// Threads share nothing but inputs, and the bits do not depend on their number.
#include "cpu/rcu/rcu.h"

#include "cpu/rcu/attention.h"
#include "cpu/rcu/large_patch.h"
#include "cpu/runtime/memory.h"
#include "cpu/runtime/parallel.h"

namespace grcsf {
namespace GRCSF_ISA {
namespace {

template <typename T>
struct Forward {
  using A = ComputeType<T>;

  const RcuArguments& arguments;
  const Sizes s;
  const Projections<A> projections;
  const Patches<const T> x, residual;
  const Patches<T> out;
  const bool past_cache;

  explicit Forward(const RcuArguments& given)
      : arguments(given),
        s(given),
        projections(given.weights, s),
        x(given.x),
        residual(given.residual),
        out(given.out),
        past_cache(is_large(given.out)) {}

  // What one thread needs for a group of patches.
  struct Space {
    Packed<A> own, maps;
    Attention<A> attention;

    void carve(Carver<A>& carver, const Sizes& s, std::int64_t group) {
      const std::int64_t voxels = s.patch_voxels(), pitch = channel_pitch<A>(voxels);
      own = {carver.take(group * s.channels * pitch), s.channels * pitch, pitch};
      maps = {carver.take(group * s.map_lines * pitch), s.map_lines * pitch, pitch};
      attention.carve(carver, s, voxels, most_nodes(voxels, s.heads), Wanted::forward);
    }
  };

  // One patch of a packed group: x becomes out, in place. Returns the score.
  double patch(Space& space, std::int64_t sample, std::int64_t index, std::int64_t voxels,
               Prefetcher<T>& next) const {
    A* own = space.own.data + index * space.own.patch;
    const Rows<A> maps{space.maps.data + index * space.maps.patch, space.maps.pitch};
    Attention<A>& attention = space.attention;
    const auto between = [&] { next.step(); };
    project_queries(projections, s, own, space.own.pitch, voxels, attention.a, between);
    means_of(s, own, space.own.pitch, maps, voxels, attention.means.data());
    const double score =
        score_of<A>(arguments.weights, s, sample, attention.means.data(), attention.hidden.data());
    build_tables<T, 3>(s, maps, voxels, attention);
    center_maps(s, maps, voxels, attention);
    expect<A>(s, attention.tables, voxels, attention, [&](std::int64_t map, auto body) {
      body(Keys<A>{{maps[map * s.map_channels], maps.pitch}, voxels});
    });
    add_attended(projections, s, attention.mean, score, voxels, own, space.own.pitch, between);
    return score;
  }

  void by_patches() const {
    const std::int64_t group = patches_at_once<T>(s);
    const std::int64_t groups = (s.grid[2] + group - 1) / group;
    const Spaces<Space, A> spaces(arguments.threads, s, group);
    A* scores = static_cast<A*>(arguments.scores.data);
    parallel_for(
        s.batch * s.grid[0] * s.grid[1] * groups, arguments.threads,
        [&](std::int64_t begin, std::int64_t end, int thread) {
          Space& space = spaces[thread];
          const auto group_at = [&](std::int64_t unit) {
            const std::int64_t row = unit / groups;
            const std::int64_t cell[3] = {row / s.grid[1] % s.grid[0], row % s.grid[1],
                                          unit % groups * group};
            return box_of(s, row / (s.grid[0] * s.grid[1]), cell, group);
          };
          const std::int64_t steps = 2 * group * s.patch_voxels() / (3 * lanes<A>);
          for (std::int64_t unit = begin; unit < end; ++unit) {
            const Box box = group_at(unit);
            pack(x, box, s.patch[2], 0, box.rows(), s.channels, space.own);
            pack(residual, box, s.patch[2], 0, box.rows(), s.map_lines, space.maps);
            Prefetcher<T> next;
            if (unit + 1 < end) next = Prefetcher<T>(x, group_at(unit + 1), s.channels, steps);
            std::int64_t patch_at = 0;
            for (std::int64_t i = 0; i < box.extent[2]; i += s.patch[2], ++patch_at) {
              const std::int64_t width = std::min(s.patch[2], box.extent[2] - i);
              scores[unit / groups * s.grid[2] + unit % groups * group + patch_at] =
                  static_cast<A>(patch(space, box.sample, patch_at, box.rows() * width, next));
            }
            unpack(space.own, box, s.patch[2], 0, box.rows(), s.channels, past_cache, out);
          }
          end_of_stream();
        });
  }

  // One patch by all threads.
  double large_patch(const Box& box) const {
    LargePatch<T> large(arguments, s, projections, box, Wanted::forward);
    large.template prepare<3>();
    Vector<double> hidden(s.hidden);
    const double score =
        score_of<A>(arguments.weights, s, box.sample, large.means.data(), hidden.data());
    parallel_for(large.chunks.count, arguments.threads,
                 [&](std::int64_t begin, std::int64_t end, int thread) {
                   auto& space = large.spaces[thread];
                   for (std::int64_t chunk = begin; chunk < end; ++chunk) {
                     const std::int64_t voxels = large.chunks.voxels(chunk);
                     large.load_queries(chunk, space);
                     expect<A>(
                         s, large.tables, voxels, space.attention,
                         [&](std::int64_t map, auto body) { large.each_keys(map, space, body); });
                     add_attended(projections, s, space.attention.mean, score, voxels,
                                  space.own.data, space.own.pitch, [] {});
                     unpack(space.own, box, box.extent[2], large.chunks.first(chunk),
                            large.chunks.last(chunk), s.channels, past_cache, out);
                   }
                   end_of_stream();
                 });
    return score;
  }

  void run() const {
    expect_whole_write(arguments.out);
    if (patch_by_patch(s)) return by_patches();
    A* scores = static_cast<A*>(arguments.scores.data);
    for (std::int64_t unit = 0; unit < s.batch * s.patches; ++unit) {
      scores[unit] = static_cast<A>(large_patch(nth_patch(s, unit)));
    }
  }
};

}  // namespace

void rcu_forward(const RcuArguments& arguments) {
  for_dtype(arguments.x.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    Forward<T>(arguments).run();
  });
}

}  // namespace GRCSF_ISA
}  // namespace grcsf
