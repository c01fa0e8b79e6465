// SPDX-License-Identifier: Apache-2.0
#include "cpu/runtime/parallel.h"

#include <dlfcn.h>

#include <algorithm>

namespace grcsf {
namespace {

// _C is not linked with an OpenMP runtime. PyTorch wheels bring their own copy under their own file
// name; linking would load the system's beside it, and the two pools would spin against each other
// after every parallel region. So the three entry points that are needed are looked up in the copy
// that torch uses. GOMP_parallel is the stable ABI of GCC's runtime, and LLVM's and Intel's export
// it as well.
struct OpenMP {
  void (*parallel)(void (*body)(void*), void* data, unsigned threads, unsigned flags) = nullptr;
  int (*thread_num)() = nullptr;
  int (*num_threads)() = nullptr;
};

OpenMP openmp;

struct Region {
  RangeFunction function;
  void* context;
  std::int64_t count;
};

void run_part(void* data) {
  const auto& region = *static_cast<const Region*>(data);
  // The runtime may give fewer threads than were asked for.
  const int thread = openmp.thread_num();
  const int threads = openmp.num_threads();
  const std::int64_t share = region.count / threads;
  const std::int64_t rest = region.count % threads;
  const std::int64_t begin = thread * share + std::min<std::int64_t>(thread, rest);
  const std::int64_t end = begin + share + (thread < rest ? 1 : 0);
  if (begin < end) region.function(region.context, begin, end, thread);
}

}  // namespace

bool share_openmp(const std::string& library) {
  void* handle = dlopen(library.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  if (handle == nullptr) return false;
  OpenMP found;
  found.parallel = reinterpret_cast<decltype(found.parallel)>(dlsym(handle, "GOMP_parallel"));
  found.thread_num =
      reinterpret_cast<decltype(found.thread_num)>(dlsym(handle, "omp_get_thread_num"));
  found.num_threads =
      reinterpret_cast<decltype(found.num_threads)>(dlsym(handle, "omp_get_num_threads"));
  dlclose(handle);  // the library stays loaded: its owner holds it
  if (!found.parallel || !found.thread_num || !found.num_threads) return false;
  openmp = found;
  return true;
}

std::string openmp_library() {
  Dl_info info;
  if (openmp.parallel == nullptr) return "";
  if (dladdr(reinterpret_cast<void*>(openmp.parallel), &info) == 0) return "";
  return info.dli_fname;
}

void parallel_ranges(std::int64_t count, int threads, RangeFunction function, void* context) {
  if (count <= 0) return;
  threads = static_cast<int>(std::min<std::int64_t>(threads, count));
  if (threads <= 1 || openmp.parallel == nullptr) {
    function(context, 0, count, 0);
    return;
  }
  Region region{function, context, count};
  openmp.parallel(run_part, &region, static_cast<unsigned>(threads), 0);
}

}  // namespace grcsf
