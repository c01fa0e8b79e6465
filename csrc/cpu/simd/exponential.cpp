// SPDX-License-Identifier: Apache-2.0
#include "cpu/simd/exponential.h"

#include <algorithm>

#include "cpu/simd/simd.h"

namespace grcsf {
namespace GRCSF_ISA {
namespace {

template <typename A>
void fill(const ExponentialArguments& arguments) {
  const A* from = static_cast<const A*>(arguments.values.data);
  A* to = static_cast<A*>(arguments.out.data);
  const std::int64_t count = arguments.values.shape[0];
  for (std::int64_t i = 0; i < count; i += lanes<A>) {
    A values[lanes<A>] = {};
    const std::int64_t own = std::min<std::int64_t>(lanes<A>, count - i);
    std::copy_n(from + i, own, values);
    store(exp_of<A>(load(values)), values);
    std::copy_n(values, own, to + i);
  }
}

}  // namespace

void exponential(const ExponentialArguments& arguments) {
  if (arguments.values.dtype == DType::float64) return fill<double>(arguments);
  fill<float>(arguments);
}

}  // namespace GRCSF_ISA
}  // namespace grcsf
