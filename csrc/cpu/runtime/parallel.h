// SPDX-License-Identifier: Apache-2.0
// Threads for the CPU kernels: the pool that torch already has, never a second one.
#pragma once

#include <cstdint>
#include <string>

namespace grcsf {

// Takes the OpenMP runtime that `library` (the path of a loaded shared object, such as torch's) is
// linked with. Without one, kernels run on the calling thread. Returns whether one was found.
bool share_openmp(const std::string& library);

// The path of the OpenMP runtime in use, or an empty string.
std::string openmp_library();

// Called with this thread's part [begin, end) of the work, and the thread's number.
using RangeFunction = void (*)(void* context, std::int64_t begin, std::int64_t end, int thread);

// Splits [0, count) into one contiguous part for each of at most `threads` threads. `function` must
// not throw: allocate before, one piece for each thread.
void parallel_ranges(std::int64_t count, int threads, RangeFunction function, void* context);

// The same for a callable body(begin, end, thread).
template <typename Body>
void parallel_for(std::int64_t count, int threads, const Body& body) {
  parallel_ranges(
      count, threads,
      [](void* context, std::int64_t begin, std::int64_t end, int thread) {
        (*static_cast<const Body*>(context))(begin, end, thread);
      },
      const_cast<Body*>(&body));
}

}  // namespace grcsf
