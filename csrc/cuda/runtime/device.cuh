// SPDX-License-Identifier: Apache-2.0
// Everything that kernels ask of the processor, behind names of our own: vectors of values,
// shuffles, barriers, shared memory, asynchronous copies, fast exponentials.
//
// No kernel calls an intrinsic itself. So the same sources are compiled twice: by nvcc for GPUs,
// and by any C++ compiler for the emulation of the tests (tests/emulation/emulation.h,
// GRCSF_EMULATED), which runs every thread as a fiber and looks at every shuffle, barrier and
// access to shared memory. GRCSF_WHERE gives it the line of the call; for nvcc it is nothing.
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

constexpr int warp_size = 32;

// A size from which a kernel takes another way, on the host: the tests' emulation has a smaller
// one, so that small volumes take both ways.
inline std::int64_t from_size(std::int64_t size, std::int64_t emulated) {
#ifdef GRCSF_EMULATED
  return emulation::only_noting() ? size : emulated;
#else
  (void)emulated;
  return size;
#endif
}

// ---- Values ------------------------------------------------------------------------------------

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

// ---- Arithmetic --------------------------------------------------------------------------------

template <typename A>
__host__ __device__ __forceinline__ A least(A a, A b) {
  return b < a ? b : a;
}
template <typename A>
__host__ __device__ __forceinline__ A greatest(A a, A b) {
  return a < b ? b : a;
}
template <typename A>
__device__ __forceinline__ A absolute(A value) {
#ifdef GRCSF_EMULATED
  return std::fabs(value);
#else
  return fabs(value);
#endif
}

// 1 / sqrt(value); float: 2 ulp.
template <typename A>
__device__ __forceinline__ A inverse_sqrt(A value) {
#ifdef GRCSF_EMULATED
  return 1 / std::sqrt(value);
#else
  return rsqrt(value);
#endif
}

// 2^value. float: one instruction of the special-function unit, 2 ulp; subnormal results are 0.
__device__ __forceinline__ float exp2_fast(float value) {
#ifdef GRCSF_EMULATED
  return std::exp2(value);
#else
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
#endif
}
__device__ __forceinline__ double exp2_fast(double value) { return exp2(value); }

// The same number, of which the compiler knows nothing: sums that begin with it are not taken apart
// into constants that would wait in registers, nor kept from one turn of a loop for the next.
__device__ __forceinline__ std::int64_t opaque(std::int64_t value) {
#ifndef GRCSF_EMULATED
  asm volatile("" : "+l"(value));
#endif
  return value;
}
__device__ __forceinline__ int opaque(int value) {
#ifndef GRCSF_EMULATED
  asm volatile("" : "+r"(value));
#endif
  return value;
}
__device__ __forceinline__ float opaque(float value) {
#ifndef GRCSF_EMULATED
  asm volatile("" : "+f"(value));
#endif
  return value;
}

// ---- Threads -----------------------------------------------------------------------------------

__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x) % warp_size; }
__device__ __forceinline__ int warp_index() { return static_cast<int>(threadIdx.x) / warp_size; }

// All threads of the block.
__device__ __forceinline__ void sync_block(GRCSF_WHERE0) {
#ifdef GRCSF_EMULATED
  emulation::meet_block(where);
#else
  __syncthreads();
#endif
}

// All lanes of the warp; orders their accesses to shared memory.
__device__ __forceinline__ void sync_warp(GRCSF_WHERE0) {
#ifdef GRCSF_EMULATED
  emulation::meet_lanes(where);
#else
  __syncwarp();
#endif
}

// The value of another lane; all lanes of the warp take part.
template <typename A>
__device__ __forceinline__ A shuffle_from(A value, int lane GRCSF_WHERE) {
#ifdef GRCSF_EMULATED
  return emulation::shuffle(value, lane, where);
#else
  return __shfl_sync(0xffffffffu, value, lane);
#endif
}

template <typename A>
__device__ __forceinline__ A shuffle_xor(A value, int distance GRCSF_WHERE) {
#ifdef GRCSF_EMULATED
  return emulation::shuffle(value, lane_index() ^ distance, where);
#else
  return __shfl_xor_sync(0xffffffffu, value, distance);
#endif
}

// Of `lanes` neighboring lanes (a power of two), in a fixed order, the same in all of them.
template <typename A>
__device__ __forceinline__ A warp_sum(A value, int lanes = warp_size GRCSF_WHERE) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    value += shuffle_xor(value, distance GRCSF_HERE);
  }
  return value;
}

template <typename A>
__device__ __forceinline__ A warp_least(A value, int lanes = warp_size GRCSF_WHERE) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    value = least(value, shuffle_xor(value, distance GRCSF_HERE));
  }
  return value;
}

template <typename A>
__device__ __forceinline__ A warp_greatest(A value, int lanes = warp_size GRCSF_WHERE) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    value = greatest(value, shuffle_xor(value, distance GRCSF_HERE));
  }
  return value;
}

// ---- Shared memory -----------------------------------------------------------------------------

// An array of T in shared memory.
#ifdef GRCSF_EMULATED
template <typename T>
using Shared = emulation::Shared<T>;
#else
template <typename T>
struct Shared {
  T* data;

  __device__ __forceinline__ T get(int i) const { return data[i]; }
  __device__ __forceinline__ void set(int i, T value) const { data[i] = value; }
  __device__ __forceinline__ void add(int i, T value) const { data[i] += value; }
  template <int N>
  __device__ __forceinline__ Pack<T, N> get_pack(int i) const {
    return load_pack<T, N>(data + i);
  }
  template <int N>
  __device__ __forceinline__ void set_pack(int i, const Pack<T, N>& pack) const {
    store_pack<T, N>(data + i, pack);
  }
  // From the i-th value on.
  __device__ __forceinline__ Shared from(int i) const { return {data + i}; }
};
#endif

// The block's shared memory, taken piece by piece: all threads take the same pieces in the same
// order. The host adds them up with shared_bytes().
class SharedArena {
 public:
  __device__ __forceinline__ SharedArena() {
#ifdef GRCSF_EMULATED
    next_ = 0;
#else
    extern __shared__ __align__(16) unsigned char grcsf_shared[];
    next_ = grcsf_shared;
#endif
  }

  // `count` values, on a boundary of 16 bytes.
  template <typename T>
  __device__ __forceinline__ Shared<T> take(int count GRCSF_WHERE) {
    const int bytes = (count * static_cast<int>(sizeof(T)) + 15) / 16 * 16;
#ifdef GRCSF_EMULATED
    const Shared<T> piece = emulation::shared<T>(next_, count, where);
#else
    const Shared<T> piece{reinterpret_cast<T*>(next_)};
#endif
    next_ += bytes;
    return piece;
  }

 private:
#ifdef GRCSF_EMULATED
  int next_;
#else
  unsigned char* next_;
#endif
};

// Bytes that SharedArena::take<T>(count) uses.
template <typename T>
inline std::size_t shared_bytes(std::int64_t count) {
  return (static_cast<std::size_t>(count) * sizeof(T) + 15) / 16 * 16;
}

// Starts a copy of N values (4, 8 or 16 bytes) from memory to shared memory, past the registers.
template <int N, typename T>
__device__ __forceinline__ void copy_async(const Shared<T>& to, int i, const T* from GRCSF_WHERE) {
#ifdef GRCSF_EMULATED
  to.template copy_async<N>(i, from, where);
#else
  constexpr int bytes = N * static_cast<int>(sizeof(T));
  const unsigned target = static_cast<unsigned>(__cvta_generic_to_shared(to.data + i));
  if constexpr (bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target), "l"(from) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(target), "l"(from), "n"(bytes)
                 : "memory");
  }
#endif
}

// Makes one group of the copies that this thread has started since the last one.
__device__ __forceinline__ void commit_copies() {
#ifdef GRCSF_EMULATED
  emulation::commit_copies();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most the newest `groups` groups of this thread are under way. Other threads see
// the copies after the next barrier.
template <int groups>
__device__ __forceinline__ void wait_copies() {
#ifdef GRCSF_EMULATED
  emulation::wait_copies(groups);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(groups) : "memory");
#endif
}

// Sum over the block in a fixed order, the same in all threads. `space` has a value for each warp,
// and is free again after the next barrier.
template <typename A>
__device__ __forceinline__ A block_sum(A value, const Shared<A>& space GRCSF_WHERE) {
  value = warp_sum(value, warp_size GRCSF_HERE);
  if (lane_index() == 0) space.set(warp_index(), value GRCSF_HERE);
  sync_block(GRCSF_HERE0);
  const int warps = static_cast<int>(blockDim.x) / warp_size;
  A sum = 0;
  for (int warp = 0; warp < warps; ++warp) sum += space.get(warp GRCSF_HERE);
  return sum;
}

}  // namespace
}  // namespace cuda
}  // namespace grcsf
