// SPDX-License-Identifier: Apache-2.0
// CUDA on the CPU, for tests: what csrc/cuda/runtime/device.cuh and launch.cuh need to compile
// kernels as C++.
//
// A block runs at a time, every thread of it as a fiber that keeps going until it waits for others.
// What a GPU leaves undefined is an error here, with block, thread and line:
// - a barrier, warp barrier or shuffle that not all threads reach, or reach at different lines;
// - shared memory that is read before anything wrote there, or outside of an array;
// - shared memory that two threads touch, one of them writing, without a barrier between them. This
//   needs no unlucky schedule: every access is compared with the last ones, by counts of barriers;
// - copies to shared memory that are not waited for.
// Memory outside is looked after by AddressSanitizer, with which this is built.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

namespace grcsf::emulation {

struct Index {
  unsigned x = 0;
};

}  // namespace grcsf::emulation

// Of the running fiber.
extern grcsf::emulation::Index threadIdx, blockIdx, blockDim, gridDim;

// ---- The CUDA runtime as far as launch.cuh knows it ---------------------------------------------

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

cudaError_t cudaGetLastError();
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);
const char* cudaGetErrorString(cudaError_t error);

namespace grcsf::emulation {

// The line of a call: every wrapper of device.cuh has one as its last argument.
struct Where {
  const char* file;
  int line;
  Where(const char* f = __builtin_FILE(), int l = __builtin_LINE()) : file(f), line(l) {}
};

// ---- Launching
// -----------------------------------------------------------------------------------

// What was launched since the last forget_launches().
struct Launch {
  std::string kernel;
  std::int64_t blocks;
  int threads;
  std::size_t shared;
};
const std::vector<Launch>& launches();

// Forgets launches; those that follow are noted and, if `only_note`, not run.
void forget_launches(bool only_note);
bool only_noting();

// Runs `body` once for every thread of every block. Throws std::runtime_error for what is wrong.
void run_blocks(const char* kernel, std::int64_t blocks, int threads, std::size_t shared,
                const std::function<void()>& body);

template <typename... Parameters, typename... Arguments>
void run(const char* name, void (*kernel)(Parameters...), std::int64_t blocks, int threads,
         std::size_t shared, const Arguments&... arguments) {
  run_blocks(name, blocks, threads, shared, [&] { kernel(arguments...); });
}

// ---- What threads do together ------------------------------------------------------------------

void meet_block(const Where& where);
void meet_lanes(const Where& where);

// Exchanges `bytes` of this lane's value for those of lane `source`.
void exchange(void* value, std::size_t bytes, int source, const Where& where);

template <typename A>
A shuffle(A value, int source, const Where& where) {
  exchange(&value, sizeof value, source, where);
  return value;
}

// d += a b of tensor cores (csrc/cuda/runtime/tensor_core.cuh): a lane's four values of d and of a,
// and its two of b. The low 13 bits of a and b do not count.
void multiply_add(float* d, const float* a, float b0, float b1, const Where& where);

// ---- Shared memory
// -------------------------------------------------------------------------------

// All of these end the kernel where the access is wrong.
std::byte* take_shared(int offset, std::size_t bytes, const Where& where);
void check_read(const std::byte* address, std::size_t bytes, const Where& where);
void check_write(const std::byte* address, std::size_t bytes, const Where& where);
void start_copy(std::byte* to, const void* from, std::size_t bytes, const Where& where);
void commit_copies();
void wait_copies(int groups);
[[noreturn]] void fail(const std::string& what, const Where& where);

template <typename T>
class Shared {
 public:
  Shared() = default;
  Shared(std::byte* data, int count) : data_(data), count_(count) {}

  T get(int i, const Where& where = Where()) const {
    T value;
    std::memcpy(&value, read(i, 1, where), sizeof value);
    return value;
  }
  void set(int i, T value, const Where& where = Where()) const {
    std::memcpy(written(i, 1, where), &value, sizeof value);
  }
  void add(int i, T value, const Where& where = Where()) const {
    set(i, get(i, where) + value, where);
  }
  // The result is a Pack<T, N>: any structure of N values.
  template <int N, typename Pack = void>
  auto get_pack(int i, const Where& where = Where()) const;
  template <int N, typename Pack>
  void set_pack(int i, const Pack& pack, const Where& where = Where()) const {
    static_assert(sizeof(Pack) == N * sizeof(T), "a pack of N values");
    aligned(i, sizeof pack, where);
    std::memcpy(written(i, N, where), &pack, sizeof pack);
  }
  Shared from(int i, const Where& where = Where()) const {
    if (i < 0 || i > count_) outside(i, 0, where);
    return Shared(data_ + i * sizeof(T), count_ - i);
  }
  template <int N>
  void copy_async(int i, const T* from, const Where& where) const {
    inside(i, N, where);
    aligned(i, N * sizeof(T), where);
    start_copy(data_ + i * sizeof(T), from, N * sizeof(T), where);
  }

  const std::byte* read(int i, int values, const Where& where) const {
    inside(i, values, where);
    check_read(data_ + i * sizeof(T), values * sizeof(T), where);
    return data_ + i * sizeof(T);
  }
  void aligned(int i, std::size_t bytes, const Where& where) const {
    if (reinterpret_cast<std::uintptr_t>(data_ + i * sizeof(T)) % bytes != 0) {
      fail("shared memory: a vector of " + std::to_string(bytes) +
               " bytes is not on a multiple of them",
           where);
    }
  }

 private:
  std::byte* written(int i, int values, const Where& where) const {
    inside(i, values, where);
    check_write(data_ + i * sizeof(T), values * sizeof(T), where);
    return data_ + i * sizeof(T);
  }
  void inside(int i, int values, const Where& where) const {
    if (i < 0 || i + values > count_) outside(i, values, where);
  }
  [[noreturn]] void outside(int i, int values, const Where& where) const {
    fail("shared memory: values " + std::to_string(i) + " to " + std::to_string(i + values) +
             " are outside of an array of " + std::to_string(count_),
         where);
  }

  std::byte* data_ = nullptr;
  int count_ = 0;
};

template <typename T>
Shared<T> shared(int offset, int count, const Where& where) {
  return Shared<T>(take_shared(offset, static_cast<std::size_t>(count) * sizeof(T), where), count);
}

}  // namespace grcsf::emulation

// Pack is a template of device.cuh, which includes this file first.
namespace grcsf::cuda {
namespace {
template <typename T, int N>
struct Pack;
}
}  // namespace grcsf::cuda

namespace grcsf::emulation {

template <typename T>
template <int N, typename>
auto Shared<T>::get_pack(int i, const Where& where) const {
  cuda::Pack<T, N> pack;
  aligned(i, sizeof pack, where);
  std::memcpy(&pack, read(i, N, where), sizeof pack);
  return pack;
}

}  // namespace grcsf::emulation
