// SPDX-License-Identifier: Apache-2.0
// std::vector for files that are compiled once for each instruction set.
//
// The linker keeps one copy of a std::vector<double>'s functions for the whole library, and that
// may be the one that was compiled for AVX-512. With an allocator of internal linkage each file has
// its own. csrc/cpu/runtime/isolated.cmake ends a build in which something is shared.
#pragma once

#include <cstddef>
#include <new>
#include <vector>

namespace grcsf {
namespace {

template <typename T>
struct Allocator {
  static_assert(alignof(T) <= __STDCPP_DEFAULT_NEW_ALIGNMENT__, "operator new aligns no further");
  using value_type = T;

  Allocator() = default;
  template <typename U>
  Allocator(const Allocator<U>&) noexcept {}

  T* allocate(std::size_t count) { return static_cast<T*>(::operator new(count * sizeof(T))); }
  void deallocate(T* memory, std::size_t) noexcept { ::operator delete(memory); }

  template <typename U>
  bool operator==(const Allocator<U>&) const noexcept {
    return true;
  }
  template <typename U>
  bool operator!=(const Allocator<U>&) const noexcept {
    return false;
  }
};

template <typename T>
using Vector = std::vector<T, Allocator<T>>;

}  // namespace
}  // namespace grcsf
