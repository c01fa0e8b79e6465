// SPDX-License-Identifier: Apache-2.0
// Values of every dtype as kernels hold them: widened and narrowed, in packs that one instruction
// moves, and in words of registers. See device.cuh for GRCSF_EMULATED and GRCSF_WHERE.
#pragma once

#include <cstdint>

#include "common/dtypes.h"

#ifdef GRCSF_EMULATED
#include "emulation.h"
#define GRCSF_WHERE0 ::grcsf::emulation::Where where = ::grcsf::emulation::Where()
#define GRCSF_WHERE , GRCSF_WHERE0
#define GRCSF_HERE0 where
#define GRCSF_HERE , where
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define GRCSF_WHERE0
#define GRCSF_WHERE
#define GRCSF_HERE0
#define GRCSF_HERE
#endif

namespace grcsf {
namespace cuda {
namespace {

__device__ __forceinline__ float widened(float value) { return value; }
__device__ __forceinline__ double widened(double value) { return value; }
__device__ __forceinline__ float widened(bfloat16 value) {
#ifdef GRCSF_EMULATED
  return widen(value);
#else
  return __uint_as_float(static_cast<unsigned>(value.bits) << 16);
#endif
}
__device__ __forceinline__ float widened(float16 value) {
#ifdef GRCSF_EMULATED
  return widen(value);
#else
  return __half2float(__ushort_as_half(value.bits));
#endif
}

// Rounded to nearest even.
template <typename T>
__device__ __forceinline__ T narrowed(ComputeType<T> value) {
#ifdef GRCSF_EMULATED
  T result;
  narrow(value, result);
  return result;
#else
  if constexpr (std::is_same_v<T, bfloat16>) {
    return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
  } else if constexpr (std::is_same_v<T, float16>) {
    return {__half_as_ushort(__float2half_rn(value))};
  } else {
    return value;
  }
#endif
}

// Adjacent values that one instruction loads or stores: at most 16 bytes, at a multiple of them.
template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
  static_assert(sizeof(T) * N <= 16, "one instruction moves at most 16 bytes");
  T values[N];
  __device__ __forceinline__ T& operator[](int i) { return values[i]; }
  __device__ __forceinline__ const T& operator[](int i) const { return values[i]; }
};

// Values of T in 16 bytes.
template <typename T>
constexpr int full_pack = 16 / sizeof(T);

template <typename T, int N>
__device__ __forceinline__ Pack<T, N> load_pack(const T* from) {
  return *reinterpret_cast<const Pack<T, N>*>(from);
}

template <typename T, int N>
__device__ __forceinline__ void store_pack(T* to, const Pack<T, N>& pack) {
  *reinterpret_cast<Pack<T, N>*>(to) = pack;
}

#ifndef GRCSF_EMULATED
// The integer that moves so many bytes.
template <int bytes>
struct Mover;
template <>
struct Mover<2> {
  using type = unsigned short;
};
template <>
struct Mover<4> {
  using type = unsigned;
};
template <>
struct Mover<8> {
  using type = uint2;
};
template <>
struct Mover<16> {
  using type = uint4;
};
#endif

// The same for data that is read, or written, once: first to leave the caches.
template <typename T, int N>
__device__ __forceinline__ Pack<T, N> load_once(const T* from) {
#ifdef GRCSF_EMULATED
  return load_pack<T, N>(from);
#else
  using Word = typename Mover<sizeof(T) * N>::type;
  const Word word = __ldcs(reinterpret_cast<const Word*>(from));
  return *reinterpret_cast<const Pack<T, N>*>(&word);
#endif
}

template <typename T, int N>
__device__ __forceinline__ void store_once(T* to, const Pack<T, N>& pack) {
#ifdef GRCSF_EMULATED
  store_pack<T, N>(to, pack);
#else
  using Word = typename Mover<sizeof(T) * N>::type;
  __stcs(reinterpret_cast<Word*>(to), *reinterpret_cast<const Word*>(&pack));
#endif
}

// The same bits as another type of four bytes.
__device__ __forceinline__ float as_float(unsigned word) {
#ifdef GRCSF_EMULATED
  float value;
  std::memcpy(&value, &word, sizeof value);
  return value;
#else
  return __uint_as_float(word);
#endif
}
__device__ __forceinline__ unsigned as_word(float value) {
#ifdef GRCSF_EMULATED
  unsigned word;
  std::memcpy(&word, &value, sizeof word);
  return word;
#else
  return __float_as_uint(value);
#endif
}

// N values of T that wait in registers as they lie in memory: half dtypes take two to a register,
// where those of a Pack may be spread over one each. They are widened where they are used, and
// written two at a time.
template <typename T, int N = full_pack<T>>
struct Words {
  using Word = std::conditional_t<sizeof(T) * N % 4 == 0, unsigned, unsigned short>;
  static constexpr int size = sizeof(T) * N / sizeof(Word);
  static_assert(N == 1 || sizeof(Word) == 4, "whole registers");
  alignas(sizeof(T) * N) Word words[size];

  __device__ __forceinline__ static Words load(const T* from) {
    return of(load_pack<Word, size>(reinterpret_cast<const Word*>(from)));
  }
  __device__ __forceinline__ static Words load_once(const T* from) {
    return of(cuda::load_once<Word, size>(reinterpret_cast<const Word*>(from)));
  }
  __device__ __forceinline__ static Words of(const Pack<Word, size>& pack) {
    Words result;
    memcpy(result.words, &pack, sizeof pack);
    return result;
  }
  __device__ __forceinline__ void store_once(T* to) const {
    Pack<Word, size> pack;
    memcpy(&pack, words, sizeof pack);
    cuda::store_once(reinterpret_cast<Word*>(to), pack);
  }

  // Value i, widened.
  __device__ __forceinline__ ComputeType<T> get(int i) const {
    if constexpr (std::is_same_v<T, float>) {
      return as_float(words[i]);
    } else if constexpr (sizeof(T) == 2) {
      const unsigned word = words[N % 2 == 0 ? i / 2 : i];
      if constexpr (std::is_same_v<T, bfloat16>) {
        return as_float(i % 2 == 0 ? word << 16 : word & 0xffff0000u);
      } else {
        return widened(float16{static_cast<std::uint16_t>(i % 2 == 0 ? word : word >> 16)});
      }
    } else {
      return widened(reinterpret_cast<const T*>(words)[i]);
    }
  }

  // Values i and i + 1, i even; not of double.
  __device__ __forceinline__ void set_pair(int i, float first, float second) {
    if constexpr (std::is_same_v<T, float>) {
      words[i] = as_word(first);
      words[i + 1] = as_word(second);
    } else {
      words[i / 2] = narrowed<T>(first).bits | unsigned(narrowed<T>(second).bits) << 16;
    }
  }

  // The compiler takes these, and shared memory, for new values: it widens and loads again at the
  // next use, instead of keeping what it had before in registers.
  __device__ __forceinline__ void renew() {
#ifndef GRCSF_EMULATED
    static_assert(size == 4, "16 bytes");
    asm volatile("" : "+r"(words[0]), "+r"(words[1]), "+r"(words[2]), "+r"(words[3])::"memory");
#endif
  }
};

}  // namespace
}  // namespace cuda
}  // namespace grcsf
