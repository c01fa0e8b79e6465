// SPDX-License-Identifier: Apache-2.0
// gcu on the CPU, backward.
//
// Every row is computed again as in forward, with one more sum: <gradient, skip>. A second pass
// over the packed channels then gives the gradient of skip, which is written, and that of the
// upsampled row, which is reduced at once: over y into two running rows at full width, over x when
// a deep row is complete, over z into two running deep planes. So skip and the gradient are read
// once, grad_skip written once, and no gradient of the upsampled tensor exists in memory.
//
// Threads share no deep plane: each owns a range of them and walks all output planes that touch
// it. An output plane between two ranges is computed by both owners, but only that of its lower
// deep plane writes grad_skip and counts it for the gate. Sums for the gates are kept for each
// plane and added at the end in a fixed order. So nothing is atomic, and the bits do not depend on
// the number of threads.
//
// Where there are few deep planes (2D images are volumes of depth 1), z and y exchange their roles.
//
// Bytes: 3 * V * C of data and 2 * V' * C of deep; two deep planes for each thread.
//
// This file is compiled once for each instruction set, into the namespace GRCSF_ISA. Everything
// else has internal linkage (see half.h).
#include "cpu/gcu/gradients.h"

namespace grcsf {
namespace GRCSF_ISA {
namespace {

// One thread's way through its deep planes.
template <typename T>
class Worker {
 public:
  using A = ComputeType<T>;

  Worker(const Backward<T>& work, A* scratch)
      : work_(work),
        sizes_(work.sizes),
        columns_(work.columns),
        pitch_(work.pitch),
        deep_rows_(work.deep, work.deep_gate, work.sizes, work.columns, scratch) {
    A* next = scratch + DeepRows<T>::scratch_size(sizes_, columns_);
    auto take = [&next](std::int64_t count) {
      A* taken = next;
      next += count;
      return taken;
    };
    skip_ = take(work.buffer) + row_margin;
    grad_ = take(work.buffer) + row_margin;
    for (A*& row : up_rows_) row = take(work.buffer) + row_margin;
    sums_ = {take(pitch_), take(pitch_), take(pitch_), take(pitch_)};
    factors_ = {take(pitch_), take(pitch_), take(pitch_), take(pitch_)};
    gathered_ = take(together * work.gathered_pitch());
    stage_ = reinterpret_cast<T*>(take(pitch_ + staged_voxels * sizes_.channels));
    if (work.wants_deep) {
      for (A*& plane : planes_) plane = take(pitch_of(sizes_.channels * work.deep_plane));
    }
  }

  // Deep planes [begin, end) of all samples, one after the other.
  void run(std::int64_t begin, std::int64_t end) {
    const std::int64_t depth = sizes_.deep[0];
    while (begin < end) {
      const std::int64_t b = begin / depth, first = begin % depth;
      const std::int64_t last = smaller(depth, first + end - begin);
      walk(b, first, last);
      begin += last - first;
    }
    end_of_stream();
  }

 private:
  // Where a deep row of the current plane goes: up to two deep planes, each with a weight.
  struct Target {
    A* plane = nullptr;
    A weight = 0;
  };

  void walk(std::int64_t b, std::int64_t first, std::int64_t last) {
    b_ = b;
    held_[0] = held_[1] = -1;
    std::int64_t unfinished = first;
    for (std::int64_t z = 0; z < sizes_.size[0]; ++z) {
      const Position position = position_of(z, sizes_.size[0], sizes_.deep[0]);
      if (position.low < first - 1) continue;
      if (position.low >= last) break;
      const bool owned = position.low >= first;
      const bool reaches_high =
          position.high != position.low && position.fraction > 0 && position.high < last;
      if (!owned && !(work_.wants_deep && reaches_high)) continue;
      for (; unfinished < position.low; ++unfinished) finish(unfinished);
      targets_[0] = targets_[1] = Target{};
      if (work_.wants_deep && owned) {
        const double weight = position.high == position.low ? 1 : 1 - position.fraction;
        targets_[0] = {plane(position.low), static_cast<A>(weight)};
      }
      if (work_.wants_deep && reaches_high) {
        targets_[1] = {plane(position.high), static_cast<A>(position.fraction)};
      }
      output_plane(z, position, owned && work_.wants_skip);
    }
    for (; unfinished < last; ++unfinished) finish(unfinished);
  }

  // The running gradient of deep plane z', zero at first.
  A* plane(std::int64_t z) {
    A* values = planes_[z & 1];
    if (held_[z & 1] != z) {
      std::memset(values, 0, sizes_.channels * work_.deep_plane * sizeof(A));
      held_[z & 1] = z;
    }
    return values;
  }

  void output_plane(std::int64_t z, const Position& position, bool writes_skip) {
    gate_sums_ = nullptr;
    if (writes_skip && work_.grad_skip_gate) {
      gate_sums_ = work_.skip_sums.piece(b_ * sizes_.size[0] + z);
      for (std::int64_t c = 0; c < sizes_.channels; ++c) gate_sums_[c] = 0;
    }
    const bool wants_deep = targets_[0].plane || targets_[1].plane;
    for (std::int64_t block = 0; block < columns_.blocks(); ++block) {
      deep_rows_.enter(b_, position, block);
      running_[0] = running_[1] = -1;
      for (std::int64_t y = 0; y < sizes_.size[1]; ++y) {
        if (wants_deep) {
          writes_skip ? row<true, true>(z, y, block) : row<false, true>(z, y, block);
        } else if (writes_skip) {
          row<true, false>(z, y, block);
        }
      }
      const int older = running_[0] < running_[1] ? 0 : 1;
      flush(older, block);
      flush(1 - older, block);
    }
  }

  template <bool writes_skip, bool wants_deep>
  void row(std::int64_t z, std::int64_t y, std::int64_t block) {
    const Position position = position_of(y, sizes_.size[1], sizes_.deep[1]);
    const std::int64_t x = columns_.begin(block), count = columns_.count(block);
    const UpRow<A> up = up_row(deep_rows_, position);
    sum_channels<true, T>(work_.skip, work_.skip.row(b_, z, y, x), work_.grad.row(b_, z, y, x),
                          count, skip_, grad_, up, sizes_.channels, pitch_,
                          work_.skip_gate + b_ * sizes_.channels, sums_);
    compare(work_.grad_dissimilarity.row(b_, z, y, x), count);
    UpRow<A> up_grad{};  // of the same weights; a row that gets nothing is not touched
    bool two = false;
    if constexpr (wants_deep) {
      two = position.high != position.low && position.fraction > 0;
      up_grad = {running(position.low, block), two ? running(position.high, block) : nullptr,
                 two ? up.low_weight : A(1), up.high_weight};
    }
    T* to = writes_skip && work_.grad_skip.data ? work_.grad_skip.row(b_, z, y, x) : nullptr;
    std::int64_t c = 0;
    for (; c < sizes_.channels; c += together) {
      const bool whole = c + together <= sizes_.channels;
      if (two) {
        whole ? differentiate<together, writes_skip, wants_deep, true>(c, count, up, up_grad)
              : differentiate<1, writes_skip, wants_deep, true>(c, count, up, up_grad);
      } else {
        whole ? differentiate<together, writes_skip, wants_deep, false>(c, count, up, up_grad)
              : differentiate<1, writes_skip, wants_deep, false>(c, count, up, up_grad);
      }
      if (to == nullptr || work_.grad_skip.channels_last) continue;
      for (std::int64_t k = c; k < smaller(c + together, sizes_.channels); ++k) {
        write_run<T>(grad_ + k * pitch_, count, to + k * work_.grad_skip.channel,
                     work_.grad_skip.streams(), stage_);
      }
    }
    if (to != nullptr && work_.grad_skip.channels_last) {
      write_channels_last<T>(grad_, pitch_, sizes_.channels, count, to, work_.grad_skip.streams(),
                             stage_);
    }
  }

  // From the sums over channels to the factors of the second pass.
  void compare(const T* grad_dissimilarity, std::int64_t count) {
    const A* __restrict products = sums_.products;
    const A* __restrict skip_squares = sums_.skip_squares;
    const A* __restrict up_squares = sums_.up_squares;
    A* __restrict grads = sums_.grad_products;
    A* __restrict cross = factors_.cross;
    A* __restrict skip_radial = factors_.skip_radial;
    A* __restrict up_radial = factors_.up_radial;
    A* __restrict strength = factors_.strength;
    const A eps = work_.eps, sign = work_.similarity ? A(1) : A(-1);
    const A offset = work_.similarity ? A(1) : A(2);
    pack_run(OneRow<T>{grad_dissimilarity}, 0, count, cross);
    for (std::int64_t x = 0; x < whole_vectors<A>(count); ++x) {
      const A skip_norm = std::sqrt(skip_squares[x]), up_norm = std::sqrt(up_squares[x]);
      const A skip_floor = at_least(skip_norm, eps), up_floor = at_least(up_norm, eps);
      const A cosine = products[x] / skip_floor / up_floor;
      const A gamma = sign * grads[x] - cross[x];
      const A radial = gamma * cosine;
      cross[x] = gamma / skip_floor / up_floor;
      const A skip_share = radial / skip_squares[x], up_share = radial / up_squares[x];
      skip_radial[x] = skip_norm > eps ? skip_share : A(0);
      up_radial[x] = up_norm > eps ? up_share : A(0);
      strength[x] = offset + sign * cosine;
    }
  }

  // N channels from `c`: the gradient of skip in place of the incoming one, that of the upsampled
  // row added to one or two running rows.
  template <int N, bool writes_skip, bool wants_deep, bool two>
  void differentiate(std::int64_t c, std::int64_t count, const UpRow<A>& up,
                     const UpRow<A>& up_grad) {
    const A* __restrict skip = skip_;
    A* __restrict grad = grad_;
    A* __restrict low = const_cast<A*>(up_grad.low);
    A* __restrict high = const_cast<A*>(up_grad.high);
    const A* gates = work_.skip_gate + b_ * sizes_.channels + c;
    Vec<A> gate_sums[N] = {};
    for (std::int64_t x = 0; x < count; x += lanes<A>) {
      const Vec<A> cross = load(factors_.cross + x);
      const Vec<A> skip_radial = load(factors_.skip_radial + x);
      const Vec<A> up_radial = load(factors_.up_radial + x);
      const Vec<A> strength = load(factors_.strength + x);
#pragma GCC unroll 2
      for (int k = 0; k < N; ++k) {
        const std::int64_t offset = (c + k) * pitch_ + x;
        const Vec<A> s = load(skip + offset), u = up.at(offset);
        const Vec<A> f = s * gates[k];
        if constexpr (writes_skip) {
          const Vec<A> toward_f = cross * u - skip_radial * f;
          gate_sums[k] += toward_f * s;
          store(load(grad + offset) * strength + toward_f * gates[k], grad + offset);
        }
        if constexpr (wants_deep) {
          const Vec<A> toward_u = cross * f - up_radial * u;
          store(load(low + offset) + toward_u * up_grad.low_weight, low + offset);
          if constexpr (two) {
            store(load(high + offset) + toward_u * up_grad.high_weight, high + offset);
          }
        }
      }
    }
    if (writes_skip && gate_sums_) {
      for (int k = 0; k < N; ++k) gate_sums_[c + k] += sum_of<A>(gate_sums[k]);
    }
  }

  // The running gradient of the upsampled rows that belong to deep row y', zero at first; what was
  // in its place is complete.
  A* running(std::int64_t y, std::int64_t block) {
    const int place = static_cast<int>(y & 1);
    A* row = up_rows_[place];
    if (running_[place] != y) {
      flush(place, block);
      std::memset(row - row_margin, 0, work_.buffer * sizeof(A));
      running_[place] = y;
    }
    return row;
  }

  // Reduces a complete row over x and adds it to the deep planes.
  void flush(int place, std::int64_t block) {
    const std::int64_t y = running_[place];
    if (y < 0) return;
    const std::int64_t first = columns_.deep_begin(block);
    const std::int64_t length = columns_.deep_end(block) - first;
    const std::int64_t gathered_pitch = work_.gathered_pitch();
    const std::int64_t count = columns_.count(block);
    for (std::int64_t c = 0; c < sizes_.channels; ++c) {
      // Behind the last voxel a gate that is not finite has made NaN of 0.
      A* row = up_rows_[place] + c * pitch_;
      for (std::int64_t x = count; x < whole_vectors<A>(count); ++x) row[x] = 0;
    }
    for (std::int64_t c = 0; c < sizes_.channels; c += together) {
      const A* row = up_rows_[place] + c * pitch_;
      const std::int64_t own = smaller(together, sizes_.channels - c);
      if (own == together) {
        columns_.template gather<together>(block, row, pitch_, gathered_, gathered_pitch);
      } else {
        columns_.template gather<1>(block, row, pitch_, gathered_, gathered_pitch);
      }
      for (std::int64_t k = 0; k < own; ++k) {
        const A* __restrict from = gathered_ + k * gathered_pitch;
        const std::int64_t offset = (c + k) * work_.deep_plane + y * sizes_.deep[2] + first;
        for (const Target& target : targets_) {
          if (target.plane == nullptr) continue;
          A* __restrict to = target.plane + offset;
          for (std::int64_t j = 0; j < length; ++j) to[j] += from[j] * target.weight;
        }
      }
    }
    running_[place] = -1;
  }

  // Deep plane z' is complete: times its gate it is the gradient of deep, times deep its sum is
  // that of the gate.
  void finish(std::int64_t z) {
    if (!work_.wants_deep) return;
    const A* values = plane(z);  // zeros where no voxel touches it
    const A* gates = work_.deep_gate + b_ * sizes_.channels;
    double* sums = nullptr;
    if (work_.grad_deep_gate) {
      sums = work_.deep_sums.piece(b_ * sizes_.deep[0] + z);
      for (std::int64_t c = 0; c < sizes_.channels; ++c) sums[c] = 0;
    }
    const bool stream = work_.grad_deep.streams();
    for (std::int64_t y = 0; y < sizes_.deep[1]; ++y) {
      for (std::int64_t x = 0; x < sizes_.deep[2]; x += columns_.block()) {
        const std::int64_t count = smaller(columns_.block(), sizes_.deep[2] - x);
        const std::int64_t offset = y * sizes_.deep[2] + x;
        const T* deep = work_.deep.row(b_, z, y, x);
        T* to = work_.grad_deep.data ? work_.grad_deep.row(b_, z, y, x) : nullptr;
        const bool channels_last = work_.deep.channels_last;
        if (sums && channels_last) {
          pack_channels_last(OneRow<T>{deep}, sizes_.channels, count, skip_, pitch_);
        }
        for (std::int64_t c = 0; c < sizes_.channels; ++c) {
          A *own = skip_ + c * pitch_, *scaled = grad_ + c * pitch_;
          const OneRow<A> row{values + c * work_.deep_plane + offset};
          pack_run(row, 0, count, scaled);
          if (sums) {
            if (!channels_last) pack_run(OneRow<T>{deep}, c * work_.deep.channel, count, own);
            Vec<A> sum{};
            for (std::int64_t i = 0; i < count; i += lanes<A>) {
              sum += load(own + i) * load(scaled + i);
            }
            sums[c] += sum_of<A>(sum);
          }
          if (to == nullptr) continue;
          for (std::int64_t i = 0; i < count; i += lanes<A>) {
            store(load(scaled + i) * gates[c], scaled + i);
          }
          if (!channels_last) {
            write_run<T>(scaled, count, to + c * work_.grad_deep.channel, stream, stage_);
          }
        }
        if (to != nullptr && channels_last) {
          write_channels_last<T>(grad_, pitch_, sizes_.channels, count, to, stream, stage_);
        }
      }
    }
  }

  const Backward<T>& work_;
  const GcuSizes& sizes_;
  const Columns<A>& columns_;
  const std::int64_t pitch_;
  DeepRows<T> deep_rows_;
  A *skip_, *grad_;    // packed rows; the second becomes the gradient of skip
  A* up_rows_[2];      // gradient of the upsampled rows around deep rows y', by parity of y'
  A* planes_[2] = {};  // gradient of deep / gate [C][H' * W'], by parity of z'
  VoxelSums<A> sums_;
  VoxelFactors<A> factors_;
  A* gathered_;
  T* stage_;
  std::int64_t b_ = 0;
  std::int64_t running_[2] = {-1, -1}, held_[2] = {-1, -1};  // y' and z' there; -1: none
  Target targets_[2];
  double* gate_sums_ = nullptr;
};

template <typename T>
void backward(const GcuArguments& arguments) {
  using A = ComputeType<T>;
  const Backward<T> work(arguments);
  if (!work.wants_skip && !work.wants_deep) return;
  const std::int64_t units = work.sizes.batch * work.sizes.deep[0];
  const int threads = static_cast<int>(smaller(larger(arguments.threads, 1), larger(units, 1)));
  const Workspace<A> space(threads, work.scratch_size());
  expect_whole_write(arguments.grad_skip);
  expect_whole_write(arguments.grad_deep);
  parallel_for(units, threads, [&](std::int64_t begin, std::int64_t end, int thread) {
    Worker<T>(work, space.piece(thread)).run(begin, end);
  });
  work.add_gates();
}

}  // namespace

void gcu_backward(const GcuArguments& arguments) {
  for_dtype(arguments.skip.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    backward<T>(arguments);
  });
}

}  // namespace GRCSF_ISA
}  // namespace grcsf
