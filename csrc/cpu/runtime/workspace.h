// SPDX-License-Identifier: Apache-2.0
// Scratch memory for all threads of a kernel, allocated before the threads start.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace grcsf {
namespace {

// `pieces` runs of `length` values, each on cache lines of its own, so that threads do not write to
// one another's. Uninitialized.
template <typename T>
class Workspace {
 public:
  Workspace(std::int64_t pieces, std::int64_t length)
      : stride_((length * sizeof(T) + line - 1) / line * line),
        data_(std::aligned_alloc(line, static_cast<std::size_t>(pieces) * stride_)) {
    if (data_ == nullptr && pieces * length > 0) throw std::bad_alloc();
  }
  ~Workspace() { std::free(data_); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  T* piece(std::int64_t index) const {
    return reinterpret_cast<T*>(static_cast<char*>(data_) + index * stride_);
  }

 private:
  static constexpr std::size_t line = 64;
  std::size_t stride_;
  void* data_;
};

}  // namespace
}  // namespace grcsf
