// SPDX-License-Identifier: Apache-2.0
// Rows of voxels between tensors and packed buffers.
//
// Kernels compute on packed rows: [C][pitch] values of the compute type, zero between the row's
// end and the next whole vector. Packing is what keeps many channels in cache: their distance in
// a tensor is often a multiple of 64 KiB, so that the rows of all channels would share a few sets
// of the first-level cache. Only the functions here know the dtype and the layout of a tensor.
// Channels-last rows are transposed in blocks of lanes x lanes values in registers. Everything has
// internal linkage, as in half.h.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "common/tensor_view.h"
#include "cpu/simd/simd.h"

namespace grcsf {
namespace {

inline std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
inline std::int64_t larger(std::int64_t a, std::int64_t b) { return a > b ? a : b; }

// `count` rounded up to whole vectors of A: where the loops over a packed row end.
template <typename A>
inline std::int64_t whole_vectors(std::int64_t count) {
  return (count + lanes<A> - 1) / lanes<A> * lanes<A>;
}

// ---- Permutations ------------------------------------------------------------------------------

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define GRCSF_SHUFFLEVECTOR
#endif
#if __has_builtin(__builtin_shuffle)
#define GRCSF_SHUFFLE
#endif
#endif

// value[indices[i]] in lane i; indices are in [0, lanes).
template <typename A>
inline Vec<A> permute(Vec<A> value, Integers<A> indices) {
#ifdef GRCSF_SHUFFLE
  return __builtin_shuffle(value, indices);
#else
  Vec<A> result;
  for (int i = 0; i < lanes<A>; ++i) result[i] = value[indices[i]];
  return result;
#endif
}

// Lanes of `a` (from 0) and `b` (from `lanes`) in a fixed order.
template <typename A, int... indices>
inline Vec<A> select_lanes(Vec<A> a, Vec<A> b) {
#ifdef GRCSF_SHUFFLEVECTOR
  return __builtin_shufflevector(a, b, indices...);
#else
  return __builtin_shuffle(a, b, Integers<A>{indices...});
#endif
}

template <typename A, int distance, int... lane>
inline void exchange(Vec<A>& a, Vec<A>& b, std::integer_sequence<int, lane...>) {
  constexpr int count = lanes<A>;
  const Vec<A> upper =
      select_lanes<A, ((lane & distance) ? count + lane - distance : lane)...>(a, b);
  b = select_lanes<A, ((lane & distance) ? count + lane : lane + distance)...>(a, b);
  a = upper;
}

// Transposes a square of values: every step exchanges the off-diagonal quarters of all squares of
// 2 * distance, which is one or two instructions for each vector.
template <typename A, int distance = lanes<A> / 2>
inline void transpose(Vec<A>* rows) {
  if constexpr (distance > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < lanes<A>; ++i) {
      if ((i & distance) == 0) {
        exchange<A, distance>(rows[i], rows[i + distance],
                              std::make_integer_sequence<int, lanes<A>>{});
      }
    }
    transpose<A, distance / 2>(rows);
  }
}

// ---- Tensors -----------------------------------------------------------------------------------

// One tensor [B, C, z, y, x] of T, dense in contiguous or channels-last layout. `swapped` exchanges
// the roles of z and y.
template <typename T>
struct Volume {
  T* data = nullptr;
  std::int64_t channels, batch, channel, z, y, x, bytes;  // strides in elements
  bool channels_last;

  Volume(const TensorView& view, bool swapped)
      : data(static_cast<T*>(view.data)),
        channels(view.shape[1]),
        batch(view.strides[0]),
        channel(view.strides[1]),
        z(view.strides[swapped ? 3 : 2]),
        y(view.strides[swapped ? 2 : 3]),
        bytes(sizeof(T)),
        channels_last(view.strides[1] == 1 && view.shape[1] > 1) {
    x = channels_last ? channels : 1;
    for (int axis = 0; axis < 5; ++axis) bytes *= view.shape[axis];
  }

  T* row(std::int64_t b, std::int64_t z_index, std::int64_t y_index, std::int64_t x_index) const {
    return data + b * batch + z_index * z + y_index * y + x_index * x;
  }

  // Whether its values are better written past the cache: it does not fit there.
  bool streams() const { return bytes > (std::int64_t(8) << 20); }
};

// Where packed values come from: a tensor, or two of its rows, each with a weight.
template <typename T>
struct OneRow {
  using Value = ComputeType<T>;
  const T* row;

  Vec<Value> vector(std::int64_t offset) const { return load(row + offset); }
  Value scalar(std::int64_t offset) const { return widen(row[offset]); }
  void prefetch(std::int64_t offset, std::int64_t count) const {
    prefetch_bytes(row + offset, count * static_cast<std::int64_t>(sizeof(T)));
  }
};

template <typename T>
struct TwoRows {
  using Value = ComputeType<T>;
  const T* low;
  const T* high;
  Value low_weight, high_weight;

  Vec<Value> vector(std::int64_t offset) const {
    return load(low + offset) * low_weight + load(high + offset) * high_weight;
  }
  Value scalar(std::int64_t offset) const {
    return widen(low[offset]) * low_weight + widen(high[offset]) * high_weight;
  }
  void prefetch(std::int64_t offset, std::int64_t count) const {
    OneRow<T>{low}.prefetch(offset, count);
    OneRow<T>{high}.prefetch(offset, count);
  }
};

// ---- Packing -----------------------------------------------------------------------------------

// `count` adjacent values from `offset`, zero up to the next whole vector.
template <typename Source, typename A = typename Source::Value>
inline void pack_run(const Source& source, std::int64_t offset, std::int64_t count,
                     A* __restrict to) {
  std::int64_t x = 0;
  for (; x + lanes<A> <= count; x += lanes<A>) store(source.vector(offset + x), to + x);
  if (x == count) return;
  for (int i = 0; i < lanes<A>; ++i) {
    to[x + i] = x + i < count ? source.scalar(offset + x + i) : A(0);
  }
}

// A row of `count` voxels in channels-last layout.
template <typename Source, typename A = typename Source::Value>
inline void pack_channels_last(const Source& source, std::int64_t channels, std::int64_t count,
                               A* __restrict to, std::int64_t pitch) {
  const std::int64_t whole = channels / lanes<A> * lanes<A>;
  const std::int64_t width = whole_vectors<A>(count);
  for (std::int64_t x = 0; x < width; x += lanes<A>) {
    const int present = static_cast<int>(smaller(lanes<A>, count - x));
    for (std::int64_t c = 0; c < whole; c += lanes<A>) {
      Vec<A> square[lanes<A>];
      if (present == lanes<A>) {
#pragma GCC unroll 16
        for (int i = 0; i < lanes<A>; ++i) square[i] = source.vector((x + i) * channels + c);
      } else {
        for (int i = 0; i < lanes<A>; ++i) {
          square[i] = i < present ? source.vector((x + i) * channels + c) : Vec<A>{};
        }
      }
      transpose<A>(square);
#pragma GCC unroll 16
      for (int i = 0; i < lanes<A>; ++i) store(square[i], to + (c + i) * pitch + x);
    }
    for (std::int64_t c = whole; c < channels; ++c) {
      for (int i = 0; i < lanes<A>; ++i) {
        to[c * pitch + x + i] = i < present ? source.scalar((x + i) * channels + c) : A(0);
      }
    }
  }
}

// ---- Writing back ------------------------------------------------------------------------------

// Values that one step of write_channels_last() stages.
constexpr std::int64_t staged_voxels = 16;

// Copies to a tensor; where `stream` says so, whole cache lines go past the cache. The lines that
// the run shares with its neighbors go through it: half a line written past the cache costs more.
inline void copy_out(const void* from, void* to, std::int64_t bytes, bool stream) {
  constexpr std::int64_t line = 64;
  const auto address = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(to) % line);
  const std::int64_t head = smaller(stream ? (line - address) % line : bytes, bytes);
  const std::int64_t middle = (bytes - head) / line * line, tail = bytes - head - middle;
  const char* source = static_cast<const char*>(from);
  char* target = static_cast<char*>(to);
  if (head > 0) std::memcpy(target, source, static_cast<std::size_t>(head));
  if (middle > 0) stream_bytes(source + head, target + head, middle);
  if (tail > 0) {
    std::memcpy(target + bytes - tail, source + bytes - tail, static_cast<std::size_t>(tail));
  }
}

// `count` adjacent values; `stage` has room for them in whole vectors.
template <typename T, typename A = ComputeType<T>>
inline void write_run(const A* __restrict from, std::int64_t count, T* __restrict to, bool stream,
                      T* __restrict stage) {
  if constexpr (std::is_same_v<T, A>) {
    copy_out(from, to, count * static_cast<std::int64_t>(sizeof(T)), stream);
  } else {
    for (std::int64_t x = 0; x < count; x += lanes<A>) store(load(from + x), stage + x);
    copy_out(stage, to, count * static_cast<std::int64_t>(sizeof(T)), stream);
  }
}

// A row of `count` voxels into channels-last layout; `stage` has room for staged_voxels voxels.
template <typename T, typename A = ComputeType<T>>
inline void write_channels_last(const A* __restrict from, std::int64_t pitch, std::int64_t channels,
                                std::int64_t count, T* to, bool stream, T* __restrict stage) {
  static_assert(staged_voxels % lanes<A> == 0, "vectors fill the stage");
  const std::int64_t whole = channels / lanes<A> * lanes<A>;
  for (std::int64_t begin = 0; begin < count; begin += staged_voxels) {
    const std::int64_t voxels = smaller(staged_voxels, count - begin);
    for (std::int64_t x = 0; x < voxels; x += lanes<A>) {
      for (std::int64_t c = 0; c < whole; c += lanes<A>) {
        Vec<A> square[lanes<A>];
#pragma GCC unroll 16
        for (int i = 0; i < lanes<A>; ++i) square[i] = load(from + (c + i) * pitch + begin + x);
        transpose<A>(square);
#pragma GCC unroll 16
        for (int i = 0; i < lanes<A>; ++i) store(square[i], stage + (x + i) * channels + c);
      }
      for (std::int64_t c = whole; c < channels; ++c) {
        for (int i = 0; i < lanes<A>; ++i) {
          narrow(from[c * pitch + begin + x + i], stage[(x + i) * channels + c]);
        }
      }
    }
    copy_out(stage, to + begin * channels, voxels * channels * static_cast<std::int64_t>(sizeof(T)),
             stream);
  }
}

}  // namespace
}  // namespace grcsf
