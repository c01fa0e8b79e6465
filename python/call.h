// SPDX-License-Identifier: Apache-2.0
// What every binding of an operator needs: its kernel for the tensors' device, and the resources
// that the caller lends it.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "common/cuda_resources.h"
#include "common/tensor_view.h"

// GRCSF_KERNEL(gcu_forward, view) is the kernel for the device that `view` is on. The emulation of
// tests/emulation runs CUDA's kernels on CPU tensors.
#if defined(GRCSF_EMULATED)
#define GRCSF_KERNEL(function, view) cuda::function
#elif defined(GRCSF_HAVE_CUDA)
#define GRCSF_KERNEL(function, view) \
  ((view).device == Device::cuda ? cuda::function : grcsf::function)
#else
#define GRCSF_KERNEL(function, view) grcsf::function
#endif

namespace grcsf::python {

// (threads, stream, allocate) of grcsf_kernels.native.resources(). Lives as long as the call and
// keeps what was allocated for it.
class Call {
 public:
  explicit Call(const pybind11::tuple& resources)
      : allocate_(resources[2]),
        threads(resources[0].cast<int>()),
        cuda{resources[1].cast<std::uintptr_t>(), allocate, this} {}
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

 private:
  // Called without the interpreter's lock.
  static void* allocate(void* context, std::size_t bytes) {
    const pybind11::gil_scoped_acquire lock;
    auto* call = static_cast<Call*>(context);
    const pybind11::tuple piece = call->allocate_(bytes);
    call->held_.push_back(piece[0]);
    return reinterpret_cast<void*>(piece[1].cast<std::uintptr_t>());
  }

  pybind11::object allocate_;
  std::vector<pybind11::object> held_;

 public:
  const int threads;
  const CudaResources cuda;
};

}  // namespace grcsf::python
