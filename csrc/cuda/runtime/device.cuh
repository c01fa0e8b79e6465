// SPDX-License-Identifier: Apache-2.0
// Everything that kernels ask of the processor, behind names of our own: vectors of values
// (values.cuh), shuffles, barriers, shared memory, asynchronous copies, fast exponentials.
//
// No kernel calls an intrinsic itself. So the same sources are compiled twice: by nvcc for GPUs,
// and by any C++ compiler for the emulation of the tests (tests/emulation/emulation.h,
// GRCSF_EMULATED), which runs every thread as a fiber and looks at every shuffle, barrier and
// access to shared memory. GRCSF_WHERE gives it the line of the call; for nvcc it is nothing.
#pragma once

#include "cuda/runtime/values.cuh"

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
