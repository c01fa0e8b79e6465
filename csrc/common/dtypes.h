// SPDX-License-Identifier: Apache-2.0
// The C++ types of dtypes, and what they are computed in.
#pragma once

#include <type_traits>

#include "common/half.h"
#include "common/tensor_view.h"

namespace grcsf {
namespace {

// The type in which data of type T is computed with.
template <typename T>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <typename T>
using ComputeType = typename ComputeOf<std::remove_const_t<T>>::type;

template <typename T>
struct TypeOf {
  using type = T;
};

// Calls body(TypeOf<T>()) for the T that data of this dtype is stored in.
template <typename Body>
inline void for_dtype(DType dtype, Body body) {
  switch (dtype) {
    case DType::float64:
      return body(TypeOf<double>());
    case DType::float32:
      return body(TypeOf<float>());
    case DType::float16:
      return body(TypeOf<float16>());
    default:
      return body(TypeOf<bfloat16>());
  }
}

}  // namespace
}  // namespace grcsf
