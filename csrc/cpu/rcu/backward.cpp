// SPDX-License-Identifier: Apache-2.0
// rcu on the CPU, backward.
//
// As forward, patch by patch (rcu/forward.cpp): x, r and the incoming gradient are packed once, the
// attention is made again with the variance beside E, and the gradient of x is written once: 3 * V
// * C + V * K * c values move, V * K * c more where the gradient of the map is asked for. Gradients
// of the weights are summed by segments of patches in double, and the segments in their order.
#include "cpu/rcu/gradient.h"
#include "cpu/rcu/large_patch.h"
#include "cpu/rcu/map_gradient.h"
#include "cpu/rcu/rcu.h"
#include "cpu/runtime/memory.h"
#include "cpu/runtime/parallel.h"

namespace grcsf {
namespace GRCSF_ISA {
namespace {

template <typename T>
struct Backward {
  using A = ComputeType<T>;

  const RcuArguments& arguments;
  const Sizes s;
  const Projections<A> projections;
  const Patches<const T> x, residual, grad_out;
  const Patches<T> grad_x, grad_residual;
  const bool past_cache, wants_x, wants_residual;
  const Wanted wanted;

  explicit Backward(const RcuArguments& given)
      : arguments(given),
        s(given),
        projections(given.weights, s),
        x(given.x),
        residual(given.residual),
        grad_out(given.grad_out),
        grad_x(given.grad_x),
        grad_residual(given.grad_residual),
        past_cache(is_large(given.x)),
        wants_x(given.grad_x.data != nullptr),
        wants_residual(given.grad_residual.data != nullptr),
        wanted(wants_residual && s.map_channels == 1 ? Wanted::map_gradient : Wanted::backward) {}

  // What one thread needs for a group of patches.
  struct Space {
    Packed<A> own, maps, grad, grad_maps;
    Attention<A> attention;
    Vector<double> reaching;  // F and its slope at the nodes of a map

    void carve(Carver<A>& carver, const Sizes& s, std::int64_t group, bool wants_residual,
               Wanted wanted) {
      const std::int64_t voxels = s.patch_voxels(), pitch = channel_pitch<A>(voxels);
      for (Packed<A>* packed : {&own, &grad}) {
        *packed = {carver.take(group * s.channels * pitch), s.channels * pitch, pitch};
      }
      for (Packed<A>* packed : {&maps, &grad_maps}) {
        const bool wanted = packed == &maps || wants_residual;
        *packed = {wanted ? carver.take(group * s.map_lines * pitch) : nullptr, s.map_lines * pitch,
                   pitch};
      }
      attention.carve(carver, s, voxels, most_nodes(voxels, s.heads), wanted);
      if (carver.base != nullptr) reaching.resize(2 * attention.space.most);
    }
  };

  // One patch of a packed group: grad becomes the gradient of x, in place.
  void patch(Space& space, std::int64_t sample, std::int64_t index, std::int64_t voxels,
             double score, double grad_score, const WeightSums& layout, double* sums) const {
    const std::int64_t pitch = space.own.pitch;
    A* own = space.own.data + index * space.own.patch;
    A* grad = space.grad.data + index * space.grad.patch;
    const Rows<A> maps{space.maps.data + index * space.maps.patch, pitch};
    Attention<A>& attention = space.attention;
    const auto all_keys = [&](std::int64_t map, auto body) {
      body(Keys<A>{{maps[map * s.map_channels], pitch}, voxels});
    };
    project_queries(projections, s, own, pitch, voxels, attention.a, [] {});
    means_of(s, own, pitch, maps, voxels, attention.means.data());
    build_tables<T, 4>(s, maps, voxels, attention);
    center_maps(s, maps, voxels, attention);
    attend_backward(projections, s, attention.tables, grad, pitch, voxels, attention, all_keys);
    grad_score += add_weight_gradients(projections, s, score, own, grad, pitch, voxels, attention,
                                       layout, sums);
    score_backward<A>(arguments.weights, s, sample, score, grad_score, voxels,
                      attention.means.data(), attention.hidden.data(), layout, sums);
    if (wants_residual) {
      map_gradient(space, maps, voxels, score,
                   Rows<A>{space.grad_maps.data + index * space.grad_maps.patch, pitch});
    }
    if (wants_x) {
      add_query_path(projections, s, score, attention.means.data(), attention.slope, voxels, grad,
                     pitch);
    }
  }

  // The gradient of the residual voxels of a patch, from all its queries.
  void map_gradient(Space& space, const Rows<A>& maps, std::int64_t voxels, double score,
                    const Rows<A>& out) const {
    const std::int64_t whole = whole_vectors<A>(voxels);
    for (std::int64_t k = 0; k < s.maps; ++k) {
      if (tabulated(space.attention.tables, k)) {
        if (tabulate_map(space, maps[k], k, voxels, out[k])) continue;
        center_map(s, maps, k, voxels, space.attention);  // the others are already
      }
      const std::int64_t first = k * s.map_channels;
      for (std::int64_t c = 0; c < s.map_channels; ++c) std::fill_n(out[first + c], whole, A(0));
      for (std::int64_t h = 0; h < s.heads; ++h) {
        sum_map(space.attention, {maps[first], maps.pitch}, k * s.heads + h, voxels,
                {out[first], out.pitch});
      }
    }
    finish_map_gradient(space.attention.means.data(), score, whole, out);
  }

  bool tabulated(const Vector<Table<A>>& tables, std::int64_t map) const {
    bool all = s.map_channels == 1;
    for (std::int64_t h = 0; h < s.heads; ++h) all = all && tables[map * s.heads + h].last >= 0;
    return all;
  }

  // log sum exp and E, both about the middle of r, for every query of a head, then what the head
  // adds to F at the nodes.
  void add_head(Attention<A>& own, const Table<A>& table, std::int64_t head, std::int64_t voxels,
                const MapNodes& nodes, double* sums) const {
    look_up<A, 2>(table, own.a[head], voxels, {table.splines.log, table.splines.mean},
                  {own.level[head], own.total[head]});
    add_reaching(Reaching<A>{own.a[head], own.reach[head], own.total[head], own.level[head]},
                 voxels, nodes, own.space.weights, sums);
  }

  // By a table over r; false where that would not pay.
  bool tabulate_map(Space& space, const A* r, std::int64_t map, std::int64_t voxels, A* out) const {
    Attention<A>& own = space.attention;
    double greatest = 0;
    for (std::int64_t h = 0; h < s.heads; ++h) {
      const Range<A> of_a = range_of(own.a[map * s.heads + h], voxels);
      greatest = std::max<double>({greatest, std::fabs(of_a.least), std::fabs(of_a.greatest)});
    }
    const MapNodes nodes = map_nodes<T>(range_of(r, voxels), greatest, own.space.most);
    if (nodes.count == 0) return false;
    std::fill_n(space.reaching.begin(), 2 * nodes.count, 0.0);
    for (std::int64_t h = 0; h < s.heads; ++h) {
      const std::int64_t head = map * s.heads + h;
      add_head(own, own.tables[head], head, voxels, nodes, space.reaching.data());
    }
    // The tables of this map are done with: their room serves the spline of F.
    A* coefficients = own.space.from(map * own.space.most).log;
    const Table<A> table = map_table(nodes, space.reaching.data(), coefficients);
    look_up<A, 1>(table, r, voxels, {table.splines.mean}, {out});
    return true;
  }

  // The finished softmax of a head that attend_backward() is through with.
  template <typename EachKeys>
  Softmax<A> finished(const Attention<A>& own, const Table<A>& table, std::int64_t head,
                      std::int64_t whole, EachKeys each_keys) const {
    if (table.last >= 0) return softmax_backward(own, s, head, whole, Rows<A>{}, each_keys);
    return softmax_of(own, s, head);
  }

  // By the sum over queries.
  void sum_map(const Attention<A>& own, const Rows<A>& keys, std::int64_t head, std::int64_t voxels,
               const Rows<A>& out) const {
    const std::int64_t whole = whole_vectors<A>(voxels), c = s.map_channels;
    const Softmax<A> state =
        finished(own, own.tables[head], head, whole,
                 [&](std::int64_t, auto body) { body(Keys<A>{constant(keys), voxels}); });
    add_key_gradient<A>(constant(head_rows(own.a, s, head)),
                        constant(head_rows(own.reach, s, head)), c, voxels, state, constant(keys),
                        whole, out);
  }

  void finish_map_gradient(const double* grad_means, double score, std::int64_t whole,
                           const Rows<A>& out) const {
    for (std::int64_t k = 0; k < s.map_lines; ++k) {
      const A from_mean = static_cast<A>(grad_means[s.channels + k]);
      for (std::int64_t v = 0; v < whole; v += lanes<A>) {
        store(load(out[k] + v) * static_cast<A>(score) + from_mean, out[k] + v);
      }
    }
  }

  void group(Space& space, const Box& box, std::int64_t first_patch, const WeightSums& layout,
             double* sums) const {
    const A* scores = values_of<A>(arguments.scores);
    const A* grad_scores = values_of<A>(arguments.grad_scores);
    const std::int64_t width = s.patch[2], rows = box.rows();
    pack(x, box, width, 0, rows, s.channels, space.own);
    pack(grad_out, box, width, 0, rows, s.channels, space.grad);
    pack(residual, box, width, 0, rows, s.map_lines, space.maps);
    for (std::int64_t i = 0; i * width < box.extent[2]; ++i) {
      const std::int64_t voxels = rows * std::min(width, box.extent[2] - i * width);
      patch(space, box.sample, i, voxels, scores[first_patch + i], grad_scores[first_patch + i],
            layout, sums);
    }
    if (wants_x) unpack(space.grad, box, width, 0, rows, s.channels, past_cache, grad_x);
    if (wants_residual) {
      unpack(space.grad_maps, box, width, 0, rows, s.map_lines, false, grad_residual);
    }
  }

  void by_patches() const {
    const std::int64_t together = patches_at_once<T>(s);
    const std::int64_t across = (s.grid[2] + together - 1) / together;
    const std::int64_t groups = s.grid[0] * s.grid[1] * across;  // of one sample
    const std::int64_t segments = std::min(groups, most_segments);
    SegmentSums sums(s, segments);
    const Spaces<Space, A> spaces(arguments.threads, s, together, wants_residual, wanted);
    parallel_for(s.batch * segments, arguments.threads,
                 [&](std::int64_t begin, std::int64_t end, int thread) {
                   for (std::int64_t unit = begin; unit < end; ++unit) {
                     const std::int64_t sample = unit / segments, segment = unit % segments;
                     const std::int64_t last = (segment + 1) * groups / segments;
                     for (std::int64_t g = segment * groups / segments; g < last; ++g) {
                       const std::int64_t row = g / across;
                       const std::int64_t cell[3] = {row / s.grid[1], row % s.grid[1],
                                                     g % across * together};
                       group(spaces[thread], box_of(s, sample, cell, together),
                             sample * s.patches + row * s.grid[2] + cell[2], sums.layout,
                             sums.of(sample, segment));
                     }
                   }
                   end_of_stream();
                 });
    sums.template finish<A>(s, arguments.grad_weights);
  }

  // One patch by all threads.
  void large_patch(const Box& box, double score, double grad_score, SegmentSums& sums) const {
    LargePatch<T> large(arguments, s, projections, box, wanted);
    large.template prepare<4>();
    const Chunks& chunks = large.chunks;
    const auto attend = [&](std::int64_t chunk, auto& space) {
      large.load_queries(chunk, space);
      large.pack_chunk(grad_out, chunk, s.channels, space.grad);
      attend_backward(projections, s, large.tables, space.grad.data, space.grad.pitch,
                      chunks.voxels(chunk), space.attention,
                      [&](std::int64_t map, auto body) { large.each_keys(map, space, body); });
    };
    Vector<double> reached(chunks.segments);
    parallel_for(
        chunks.segments, arguments.threads, [&](std::int64_t begin, std::int64_t end, int thread) {
          auto& space = large.spaces[thread];
          for (std::int64_t segment = begin; segment < end; ++segment) {
            const std::int64_t last = chunks.begin(segment + 1, chunks.segments);
            for (std::int64_t i = chunks.begin(segment, chunks.segments); i < last; ++i) {
              attend(i, space);
              reached[segment] += add_weight_gradients(
                  projections, s, score, space.own.data, space.grad.data, space.own.pitch,
                  chunks.voxels(i), space.attention, sums.layout, sums.of(box.sample, segment));
            }
          }
        });
    for (const double part : reached) grad_score += part;
    Vector<double> means = large.means, hidden(s.hidden);
    score_backward<A>(arguments.weights, s, box.sample, score, grad_score, box.voxels(),
                      means.data(), hidden.data(), sums.layout, sums.of(box.sample, 0));
    if (wants_x) {
      parallel_for(chunks.count, arguments.threads,
                   [&](std::int64_t begin, std::int64_t end, int thread) {
                     auto& space = large.spaces[thread];
                     for (std::int64_t chunk = begin; chunk < end; ++chunk) {
                       attend(chunk, space);
                       add_query_path(projections, s, score, means.data(), space.attention.slope,
                                      chunks.voxels(chunk), space.grad.data, space.grad.pitch);
                       unpack(space.grad, box, box.extent[2], chunks.first(chunk),
                              chunks.last(chunk), s.channels, past_cache, grad_x);
                     }
                     end_of_stream();
                   });
    }
    if (wants_residual) large_map_gradient(large, attend, means.data(), score);
  }

  void run() const {
    expect_whole_write(arguments.grad_x);
    if (patch_by_patch(s)) return by_patches();
    const A* scores = values_of<A>(arguments.scores);
    const A* grad_scores = values_of<A>(arguments.grad_scores);
    SegmentSums sums(s, most_segments);
    for (std::int64_t unit = 0; unit < s.batch * s.patches; ++unit) {
      large_patch(nth_patch(s, unit), scores[unit], grad_scores[unit], sums);
    }
    sums.template finish<A>(s, arguments.grad_weights);
  }

  // The same for a large patch: tables over r where they pay, else the sum over all queries.
  template <typename Attend>
  void large_map_gradient(const LargePatch<T>& large, const Attend& attend,
                          const double* grad_means, double score) const {
    const Chunks& chunks = large.chunks;
    Vector<Table<A>> tables(s.maps);
    Vector<Vector<A>> coefficients(s.maps);
    for (std::int64_t k = 0; k < s.maps; ++k) {
      if (!tabulated(large.tables, k)) continue;
      const MapNodes nodes =
          map_nodes<T>(large.of_r[k], large.greatest_query(k), most_nodes_of_volume);
      if (nodes.count == 0) continue;
      const std::int64_t size = 2 * nodes.count;
      const std::int64_t parts =
          std::max<std::int64_t>(1, std::min(chunks.segments, (1 << 18) / size));
      Vector<double> sums(parts * size);
      parallel_for(parts, arguments.threads, [&](std::int64_t begin, std::int64_t end, int thread) {
        auto& space = large.spaces[thread];
        for (std::int64_t part = begin; part < end; ++part) {
          const std::int64_t last = chunks.begin(part + 1, parts);
          for (std::int64_t i = chunks.begin(part, parts); i < last; ++i) {
            attend(i, space);
            for (std::int64_t h = k * s.heads; h < (k + 1) * s.heads; ++h) {
              add_head(space.attention, large.tables[h], h, chunks.voxels(i), nodes,
                       &sums[part * size]);
            }
          }
        }
      });
      for (std::int64_t part = 1; part < parts; ++part) {
        for (std::int64_t i = 0; i < size; ++i) sums[i] += sums[part * size + i];
      }
      coefficients[k].resize(4 * nodes.count);
      tables[k] = map_table(nodes, sums.data(), coefficients[k].data());
    }
    const Vector<A> state = large_softmax(large, tables, attend);
    parallel_for(chunks.count, arguments.threads,
                 [&](std::int64_t begin, std::int64_t end, int thread) {
                   auto& space = large.spaces[thread];
                   for (std::int64_t chunk = begin; chunk < end; ++chunk) {
                     map_chunk(large, chunk, tables, state, grad_means, score, attend, space);
                   }
                 });
  }

  // For heads whose maps have no table: greatest logit, inverse total, level and rest of every
  // query, [head][4][V]. Empty where all have one.
  template <typename Attend>
  Vector<A> large_softmax(const LargePatch<T>& large, const Vector<Table<A>>& tables,
                          const Attend& attend) const {
    const Chunks& chunks = large.chunks;
    const std::int64_t all = chunks.box.voxels();
    bool direct = false;
    for (const Table<A>& table : tables) direct = direct || table.last < 0;
    Vector<A> state(direct ? s.maps * s.heads * 4 * all : 0);
    if (!direct) return state;
    parallel_for(
        chunks.count, arguments.threads, [&](std::int64_t begin, std::int64_t end, int thread) {
          auto& space = large.spaces[thread];
          Attention<A>& own = space.attention;
          for (std::int64_t chunk = begin; chunk < end; ++chunk) {
            const std::int64_t voxels = chunks.voxels(chunk);
            attend(chunk, space);
            for (std::int64_t head = 0; head < s.maps * s.heads; ++head) {
              if (tables[head / s.heads].last >= 0) continue;
              const Softmax<A> softmax =
                  finished(own, large.tables[head], head, whole_vectors<A>(voxels),
                           [&](std::int64_t map, auto body) { large.each_keys(map, space, body); });
              A* to = &state[head * 4 * all + chunk * chunks.most_voxels()];
              for (const A* row : {softmax.greatest, softmax.total, softmax.level, softmax.rest}) {
                std::copy_n(row, voxels, to);
                to += all;
              }
            }
          }
        });
    return state;
  }

  // The gradient of the residual voxels of one chunk.
  template <typename Attend>
  void map_chunk(const LargePatch<T>& large, std::int64_t chunk, const Vector<Table<A>>& tables,
                 const Vector<A>& state, const double* grad_means, double score,
                 const Attend& attend, typename LargePatch<T>::Space& space) const {
    const Chunks& chunks = large.chunks;
    const std::int64_t voxels = chunks.voxels(chunk), c = s.map_channels;
    const std::int64_t whole = whole_vectors<A>(voxels), all = chunks.box.voxels();
    const Packed<A>& keys = space.keys;
    const Rows<A> out{space.grad_maps.data, space.grad_maps.pitch};
    large.pack_chunk(residual, chunk, s.map_lines, keys);
    for (std::int64_t k = 0; k < s.maps; ++k) {
      const Rows<A> own_keys{keys.data + k * c * keys.pitch, keys.pitch};
      if (tables[k].last >= 0) {
        look_up<A, 1>(tables[k], own_keys[0], voxels, {tables[k].splines.mean}, {out[k]});
        continue;
      }
      center_keys(own_keys, c, voxels, &large.centers[k * c]);
      for (std::int64_t i = 0; i < c; ++i) std::fill_n(out[k * c + i], whole, A(0));
    }
    for (std::int64_t other = 0; other < chunks.count && !state.empty(); ++other) {
      attend(other, space);
      for (std::int64_t head = 0; head < s.maps * s.heads; ++head) {
        const std::int64_t k = head / s.heads;
        if (tables[k].last >= 0) continue;
        A* from = const_cast<A*>(&state[head * 4 * all + other * chunks.most_voxels()]);
        const Softmax<A> softmax{from, from + all, {}, from + 2 * all, from + 3 * all};
        const Rows<const A> own_keys{keys.data + k * c * keys.pitch, keys.pitch};
        add_key_gradient<A>(constant(head_rows(space.attention.a, s, head)),
                            constant(head_rows(space.attention.reach, s, head)), c,
                            chunks.voxels(other), softmax, own_keys, whole,
                            {out[k * c], out.pitch});
      }
    }
    finish_map_gradient(grad_means, score, whole, out);
    unpack(space.grad_maps, chunks.box, chunks.box.extent[2], chunks.first(chunk),
           chunks.last(chunk), s.map_lines, false, grad_residual);
  }
};

}  // namespace

void rcu_backward(const RcuArguments& arguments) {
  for_dtype(arguments.x.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    Backward<T>(arguments).run();
  });
}

}  // namespace GRCSF_ISA
}  // namespace grcsf
