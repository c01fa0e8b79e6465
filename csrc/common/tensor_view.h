// SPDX-License-Identifier: Apache-2.0
// What a kernel knows of a tensor: no torch, no Python, no ownership.
#pragma once

#include <cstdint>

namespace grcsf {

enum class DType : std::uint8_t { float32, float64, bfloat16, float16, uint8 };

enum class Device : std::uint8_t { cpu, cuda };

struct TensorView {
  static constexpr int max_axes = 8;

  void* data = nullptr;
  std::int64_t shape[max_axes] = {};
  std::int64_t strides[max_axes] = {};  // in elements
  int axes = 0;
  DType dtype = DType::float32;
  Device device = Device::cpu;
  int device_index = 0;
};

}  // namespace grcsf
