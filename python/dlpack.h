// SPDX-License-Identifier: Apache-2.0
// The DLPack exchange structures (version 0, capsule name "dltensor") and their reading into a
// TensorView. DLPack is what makes this module independent of any torch version.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "common/tensor_view.h"

namespace grcsf::python {

struct DLDevice {
  std::int32_t device_type;
  std::int32_t device_id;
};

struct DLDataType {
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes;
};

struct DLTensor {
  void* data;
  DLDevice device;
  std::int32_t ndim;
  DLDataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;  // null: contiguous
  std::uint64_t byte_offset;
};

struct DLManagedTensor {
  DLTensor tensor;
  void* manager_context;
  void (*deleter)(DLManagedTensor*);
};

inline DType dtype_of(const DLDataType& type, const char* argument) {
  constexpr int unsigned_integer = 1, floating = 2, brain_floating = 4;
  if (type.lanes == 1) {
    if (type.code == floating && type.bits == 64) return DType::float64;
    if (type.code == floating && type.bits == 32) return DType::float32;
    if (type.code == floating && type.bits == 16) return DType::float16;
    if (type.code == brain_floating && type.bits == 16) return DType::bfloat16;
    if (type.code == unsigned_integer && type.bits == 8) return DType::uint8;
  }
  throw pybind11::type_error(std::string(argument) + " has a DLPack dtype that no kernel takes");
}

// Gives axes of size 1 the strides of a dense tensor in the view's layout. Whatever stands there
// means nothing, and writers disagree: torch passes on what a view left, or 1 (2.6 to 2.9).
inline void set_strides_of_single_axes(TensorView& view) {
  bool channels_last = view.axes >= 4 && view.shape[1] > 1 && view.strides[1] == 1;
  if (channels_last) {
    // A tensor of one voxel is contiguous.
    channels_last = false;
    for (int axis = 2; axis < view.axes; ++axis) channels_last |= view.shape[axis] > 1;
  }
  std::int64_t stride = 1;
  const auto visit = [&](int axis) {
    if (view.shape[axis] == 1) view.strides[axis] = stride;
    stride *= view.shape[axis];
  };
  if (channels_last) visit(1);
  for (int axis = view.axes - 1; axis >= 0; --axis) {
    if (!channels_last || axis != 1) visit(axis);
  }
}

// Reads a capsule without consuming it: the caller's capsule keeps the memory for the whole call.
inline TensorView view_of(const pybind11::object& capsule, const char* argument) {
  TensorView view;
  if (capsule.is_none()) return view;
  if (!PyCapsule_IsValid(capsule.ptr(), "dltensor")) {
    throw pybind11::type_error(std::string(argument) + " is not an unused DLPack capsule");
  }
  const auto* managed =
      static_cast<const DLManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
  const DLTensor& tensor = managed->tensor;
  if (tensor.ndim > TensorView::max_axes) {
    throw pybind11::value_error(std::string(argument) + " has too many axes");
  }
  constexpr int cpu = 1, cuda = 2;
  if (tensor.device.device_type != cpu && tensor.device.device_type != cuda) {
    throw pybind11::value_error(std::string(argument) + " is on a device that no kernel takes");
  }
  view.device = tensor.device.device_type == cuda ? Device::cuda : Device::cpu;
  view.device_index = tensor.device.device_id;
  view.dtype = dtype_of(tensor.dtype, argument);
  view.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  view.axes = tensor.ndim;
  std::int64_t contiguous = 1;
  for (int axis = tensor.ndim - 1; axis >= 0; --axis) {
    view.shape[axis] = tensor.shape[axis];
    view.strides[axis] = tensor.strides == nullptr ? contiguous : tensor.strides[axis];
    contiguous *= tensor.shape[axis];
  }
  set_strides_of_single_axes(view);
  return view;
}

}  // namespace grcsf::python
