// SPDX-License-Identifier: Apache-2.0
// The host's side of a launch: the tensor's device, the caller's stream, and an error for whatever
// CUDA refuses.
//
// Nothing here waits for the device or allocates on it, so kernels can be captured in CUDA graphs.
// A kernel that fails while it runs is reported by CUDA at a later call, which is why every call is
// looked at; CUDA_LAUNCH_BLOCKING=1 reports it where it happened.
#pragma once

#include <stdexcept>
#include <string>

#include "common/tensor_view.h"
#include "cuda/runtime/device.cuh"

namespace grcsf {
namespace cuda {

// "2x32x128x128x128"
inline std::string shape_of(const TensorView& view) {
  std::string text;
  for (int axis = 0; axis < view.axes; ++axis) {
    text += (axis == 0 ? "" : "x") + std::to_string(view.shape[axis]);
  }
  return text;
}

// Where the kernels of one call run. Makes the tensor's device the current one while it lives.
class Queue {
 public:
  // `name` is the operator, `view` its first tensor, `stream` the caller's cudaStream_t.
  Queue(const char* name, const TensorView& view, std::uintptr_t stream)
      : name_(name), view_(view), stream_(reinterpret_cast<cudaStream_t>(stream)) {
    check(cudaGetDevice(&before_), "the current device");
    if (before_ != view.device_index) check(cudaSetDevice(view.device_index), "its device");
    check(cudaDeviceGetAttribute(&multiprocessors_, cudaDevAttrMultiProcessorCount,
                                 view.device_index),
          "the number of multiprocessors");
  }
  ~Queue() {
    if (before_ != view_.device_index) cudaSetDevice(before_);
  }
  Queue(const Queue&) = delete;
  Queue& operator=(const Queue&) = delete;

  int multiprocessors() const { return multiprocessors_; }

  // Bytes of shared memory that a block may ask for, and that a multiprocessor has.
  std::size_t shared_of_block() const { return size_of(cudaDevAttrMaxSharedMemoryPerBlockOptin); }
  std::size_t shared_of_multiprocessor() const {
    return size_of(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  }

  // Starts `blocks` blocks of `threads` threads; nothing for 0 blocks.
  template <typename... Parameters, typename... Arguments>
  void launch(const char* kernel_name, void (*kernel)(Parameters...), std::int64_t blocks,
              int threads, std::size_t shared, const Arguments&... arguments) const {
    constexpr std::int64_t most_blocks = 0x7fffffff;
    constexpr std::size_t given = 48 << 10;  // shared memory that needs no asking for
    if (blocks == 0) return;
    if (blocks > most_blocks) fail(kernel_name, std::to_string(blocks) + " blocks are too many");
    if (shared > given) {
      check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                 cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared)),
            kernel_name);
    }
#ifdef GRCSF_EMULATED
    emulation::run(kernel_name, kernel, blocks, threads, shared, arguments...);
#else
    // clang-format off: it takes >>> for the end of templates
    kernel<<<static_cast<unsigned>(blocks), threads, shared, stream_>>>(arguments...);
    // clang-format on
#endif
    check(cudaGetLastError(), kernel_name);
  }

 private:
  std::size_t size_of(cudaDeviceAttr attribute) const {
    int size = 0;
    check(cudaDeviceGetAttribute(&size, attribute, view_.device_index), "its shared memory");
    return static_cast<std::size_t>(size);
  }

  void check(cudaError_t status, const char* what) const {
    if (status == cudaSuccess) return;
    cudaGetLastError();  // the next call's error is its own
    fail(what, cudaGetErrorString(status));
  }

  [[noreturn]] void fail(const char* what, const std::string& why) const {
    throw std::runtime_error(std::string(name_) + " on CUDA, shape " + shape_of(view_) + ", " +
                             what + ": " + why);
  }

  const char* name_;
  const TensorView& view_;
  cudaStream_t stream_;
  int before_ = 0, multiprocessors_ = 0;
};

namespace {

inline std::int64_t blocks_for(std::int64_t count, std::int64_t each) {
  return (count + each - 1) / each;
}

}  // namespace
}  // namespace cuda
}  // namespace grcsf
