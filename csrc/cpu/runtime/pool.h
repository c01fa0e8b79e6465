// SPDX-License-Identifier: Apache-2.0
// Memory of large CPU results, kept for the next result of that size.
//
// malloc maps a result above 32 MiB anew at every call and unmaps it when it dies, and the system
// clears every page again: for a volume of 113 MB that takes as long as computing it. So the memory
// of dead results is kept, in huge pages, under two rules that keep it harmless: what is alive and
// what is kept are together never more than what was once alive at a time, and what is kept is
// marked as free to take (MADV_FREE), so that the system takes it back where memory runs short.
#pragma once

#include <cstddef>

namespace grcsf {

// Results from this size on, in bytes, are worth it: glibc maps them anew.
constexpr std::size_t pooled_from = std::size_t(32) << 20;

// Memory for `bytes`, aligned to a huge page, with unspecified content. Throws std::bad_alloc.
void* take_result(std::size_t bytes);

// Gives it back, from any thread.
void give_result(void* data, std::size_t bytes) noexcept;

struct PoolState {
  std::size_t alive, kept;  // bytes
};
PoolState pool_state();

// Returns all that is kept to the system.
void empty_pool() noexcept;

}  // namespace grcsf
