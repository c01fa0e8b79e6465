// SPDX-License-Identifier: Apache-2.0
#include "cpu/runtime/pool.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

namespace grcsf {
namespace {

constexpr std::size_t huge_page = std::size_t(2) << 20;

std::size_t rounded(std::size_t bytes) { return (bytes + huge_page - 1) / huge_page * huge_page; }

struct Block {
  void* data;
  std::size_t size;
};

#ifdef __linux__
// A mapping may begin anywhere: one huge page more is mapped, and the ends are cut off.
void* map(std::size_t size) {
  void* mapped =
      mmap(nullptr, size + huge_page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  const auto begin = reinterpret_cast<std::uintptr_t>(mapped);
  const std::uintptr_t first = (begin + huge_page - 1) / huge_page * huge_page;
  if (first > begin) munmap(mapped, first - begin);
  if (begin + huge_page > first) {
    munmap(reinterpret_cast<void*>(first + size), begin + huge_page - first);
  }
  madvise(reinterpret_cast<void*>(first), size, MADV_HUGEPAGE);
  return reinterpret_cast<void*>(first);
}

void unmap(const Block& block) { munmap(block.data, block.size); }

void mark_free(const Block& block) { madvise(block.data, block.size, MADV_FREE); }
#else
void* map(std::size_t size) { return std::aligned_alloc(huge_page, size); }

void unmap(const Block& block) { std::free(block.data); }

void mark_free(const Block&) {}
#endif

class Pool {
 public:
  void* take(std::size_t size) {
    const std::lock_guard<std::mutex> guard(mutex_);
    // The newest one: what of it is still in the cache helps. Volumes of a network come in few
    // sizes.
    for (auto block = kept_.rbegin(); block != kept_.rend(); ++block) {
      if (block->size != size) continue;
      void* data = block->data;
      kept_.erase(std::next(block).base());
      kept_bytes_ -= size;
      alive_ += size;
      return data;
    }
    alive_ += size;
    most_alive_ = std::max(most_alive_, alive_);
    while (!kept_.empty() && alive_ + kept_bytes_ > most_alive_) drop_oldest();
    void* data = map(size);
    if (data == nullptr) {
      drop_all();
      data = map(size);
    }
    if (data == nullptr) alive_ -= size;
    return data;
  }

  void give(const Block& block) {
    const std::lock_guard<std::mutex> guard(mutex_);
    alive_ -= block.size;
    mark_free(block);
    try {
      kept_.push_back(block);
      kept_bytes_ += block.size;
    } catch (const std::bad_alloc&) {
      unmap(block);
    }
  }

  PoolState state() {
    const std::lock_guard<std::mutex> guard(mutex_);
    return {alive_, kept_bytes_};
  }

  void empty() {
    const std::lock_guard<std::mutex> guard(mutex_);
    drop_all();
    most_alive_ = alive_;
  }

 private:
  void drop_oldest() {
    unmap(kept_.front());
    kept_bytes_ -= kept_.front().size;
    kept_.erase(kept_.begin());
  }

  void drop_all() {
    while (!kept_.empty()) drop_oldest();
  }

  std::mutex mutex_;
  std::vector<Block> kept_;  // oldest first
  std::size_t alive_ = 0, kept_bytes_ = 0, most_alive_ = 0;
};

// Never destroyed: tensors may die after static objects.
Pool& pool() {
  static Pool* const one = new Pool;
  return *one;
}

}  // namespace

void* take_result(std::size_t bytes) {
  void* data = pool().take(rounded(bytes));
  if (data == nullptr) throw std::bad_alloc();
  return data;
}

void give_result(void* data, std::size_t bytes) noexcept { pool().give({data, rounded(bytes)}); }

PoolState pool_state() { return pool().state(); }

void empty_pool() noexcept { pool().empty(); }

}  // namespace grcsf
