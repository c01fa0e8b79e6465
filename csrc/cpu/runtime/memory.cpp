// SPDX-License-Identifier: Apache-2.0
#include "cpu/runtime/memory.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstddef>
#include <cstdint>

namespace grcsf {
namespace {

std::int64_t bytes_of(DType dtype) {
  switch (dtype) {
    case DType::float64:
      return 8;
    case DType::float32:
      return 4;
    case DType::uint8:
      return 1;
    default:
      return 2;
  }
}

}  // namespace

void expect_whole_write(const TensorView& view) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (view.data == nullptr) return;
  std::int64_t bytes = bytes_of(view.dtype);
  for (int axis = 0; axis < view.axes; ++axis) bytes *= view.shape[axis];
  // From this size on glibc always maps anew (an allocation has a header too).
  constexpr std::int64_t mapped = 32 << 20;
  if (bytes < mapped) return;
  constexpr std::uintptr_t page = 2 << 20;
  const auto begin = reinterpret_cast<std::uintptr_t>(view.data);
  const std::uintptr_t first = (begin + page - 1) / page * page;
  const std::uintptr_t last = (begin + static_cast<std::uintptr_t>(bytes)) / page * page;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)view;
#endif
}

}  // namespace grcsf
