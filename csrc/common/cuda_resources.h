// SPDX-License-Identifier: Apache-2.0
// What CUDA kernels get from the caller besides tensors.
#pragma once

#include <cstddef>
#include <cstdint>

namespace grcsf {

struct CudaResources {
  std::uintptr_t stream = 0;  // cudaStream_t

  // Uninitialized memory on the device, aligned to 256 bytes, good until the call returns: the
  // caller's allocator orders its next use after this call's kernels.
  void* (*allocate)(void* context, std::size_t bytes) = nullptr;
  void* context = nullptr;

  template <typename T>
  T* take(std::int64_t count) const {
    return static_cast<T*>(allocate(context, static_cast<std::size_t>(count) * sizeof(T)));
  }
};

}  // namespace grcsf
