// SPDX-License-Identifier: Apache-2.0
// Tensors of pooled memory, as DLPack capsules that own it.
#include "cpu/runtime/pool.h"

#include <pybind11/stl.h>

#include <memory>
#include <vector>

#include "bindings.h"
#include "dlpack.h"

namespace py = pybind11;

namespace grcsf::python {
namespace {

// What a capsule owns: the structure that consumers read, and what it points to.
struct PooledTensor {
  DLManagedTensor managed{};
  std::vector<std::int64_t> shape, strides;
  std::size_t bytes = 0;

  ~PooledTensor() {
    if (managed.tensor.data != nullptr) give_result(managed.tensor.data, bytes);
  }
};

void delete_tensor(DLManagedTensor* managed) {
  delete static_cast<PooledTensor*>(managed->manager_context);
}

// A consumer renames the capsule and calls the deleter itself when its tensor dies.
void delete_unused_capsule(PyObject* capsule) {
  if (!PyCapsule_IsValid(capsule, "dltensor")) return;
  auto* managed = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor"));
  managed->deleter(managed);
}

// An uninitialized CPU tensor; `code` and `bits` as in DLDataType.
py::object pooled_tensor(const std::vector<std::int64_t>& shape,
                         const std::vector<std::int64_t>& strides, int code, int bits) {
  auto tensor = std::make_unique<PooledTensor>();
  tensor->shape = shape;
  tensor->strides = strides;
  tensor->bytes = static_cast<std::size_t>(bits) / 8;
  for (const std::int64_t size : shape) tensor->bytes *= static_cast<std::size_t>(size);
  DLTensor& own = tensor->managed.tensor;
  own.device = {1, 0};
  own.ndim = static_cast<std::int32_t>(shape.size());
  own.dtype = {static_cast<std::uint8_t>(code), static_cast<std::uint8_t>(bits), 1};
  own.shape = tensor->shape.data();
  own.strides = tensor->strides.data();
  tensor->managed.manager_context = tensor.get();
  tensor->managed.deleter = delete_tensor;
  own.data = take_result(tensor->bytes);
  PyObject* capsule = PyCapsule_New(&tensor->managed, "dltensor", delete_unused_capsule);
  if (capsule == nullptr) throw py::error_already_set();
  tensor.release();
  return py::reinterpret_steal<py::object>(capsule);
}

}  // namespace

void bind_pool(py::module_& module) {
  module.attr("pooled_from") = pooled_from;
  module.def("pooled_tensor", pooled_tensor);
  module.def("pool_state", [] {
    const PoolState state = pool_state();
    return py::make_tuple(state.alive, state.kept);
  });
  module.def("empty_pool", empty_pool);
}

}  // namespace grcsf::python
