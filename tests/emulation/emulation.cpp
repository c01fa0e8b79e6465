// SPDX-License-Identifier: Apache-2.0
// The fibers behind emulation.h.
#include "emulation.h"

#include <algorithm>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <vector>

#include "fiber.h"

grcsf::emulation::Index threadIdx, blockIdx, blockDim, gridDim;

namespace grcsf::emulation {
namespace {

constexpr int warp_size = 32, most_threads = 1024;
// Few, so that small tests have blocks that take several patches; where launches are only noted,
// those of an H100.
constexpr int multiprocessors = 3, noted_multiprocessors = 132;
constexpr std::size_t most_shared = 227 << 10, most_shared_of_multiprocessor = 228 << 10;

cudaError_t last_error = cudaSuccess;

// What a fiber does, or waits for.
enum class State { running, barrier, warp_barrier, shuffle, finished };

const char* name_of(State state) {
  switch (state) {
    case State::barrier:
      return "a barrier";
    case State::warp_barrier:
      return "a warp barrier";
    case State::shuffle:
      return "a shuffle";
    default:
      return "nothing";
  }
}

std::string text_of(const Where& where) {
  const std::string file = where.file;
  return file.substr(file.find_last_of('/') + 1) + ":" + std::to_string(where.line);
}

struct Copy {
  std::byte* to;
  const void* from;
  std::size_t bytes;
  Where where;
};

struct Thread {
  State state = State::running;
  Where where;
  bool open = false;  // may go on from where it waits
  std::vector<Copy> copies;
  std::vector<std::size_t> groups;  // ends of committed groups in `copies`
};

struct Warp {
  int waiting = 0;
  std::uint32_t syncs = 0;
  alignas(16) std::byte values[warp_size][16];
  alignas(16) std::byte read[warp_size][16];
};

// The last accesses to one byte of shared memory.
struct Touch {
  bool written = false, pending = false, many_warps = false;
  std::int16_t writer = -1, reader = -1;  // reader: -2 for several of one warp
  std::uint32_t write_syncs = 0, write_warp_syncs = 0;
  std::uint32_t read_syncs = 0, read_warp_syncs = 0;
  std::int16_t reading_warp = -1;
};

struct Block {
  const char* kernel = "";
  int threads = 0, waiting = 0, running = 0, own = 0;
  std::uint32_t syncs = 0;
  std::size_t shared_bytes = 0;
  std::vector<Thread> all;
  std::vector<Warp> warps;
  std::vector<Touch> touches;
  std::string failure;
  // Apart from everything else, so that AddressSanitizer sees where it ends.
  std::unique_ptr<std::byte[]> shared;

  Thread& current() { return all[own]; }
  int warp() const { return own / warp_size; }
};

Block block;
std::vector<Launch> noted;
bool noting_only = false;
std::mutex one_kernel;
Fibers fibers;
const std::function<void()>* kernel_body = nullptr;

std::string place_of(int thread) {
  return "block " + std::to_string(blockIdx.x) + ", thread " + std::to_string(thread);
}

void fail_from(int thread, const std::string& what, const Where& where) {
  block.failure = std::string(block.kernel) + ": " + what + " (" + place_of(thread) + ", " +
                  text_of(where) + ")";
}

// Gives the processor back until this thread may go on.
void wait(State state, const Where& where) {
  Thread& own = block.current();
  own.state = state;
  own.where = where;
  own.open = false;
  fibers.leave();
  own.state = State::running;
}

// Whether all that wait do so at the same line; the failure says who does not.
bool same_line(int begin, int end) {
  for (int thread = begin + 1; thread < end; ++thread) {
    const Thread &first = block.all[begin], &other = block.all[thread];
    if (first.where.line == other.where.line && first.state == other.state) continue;
    fail_from(thread,
              std::string(name_of(other.state)) + " that not all threads reach: " +
                  place_of(begin) + " waits at " + text_of(first.where),
              other.where);
    return false;
  }
  return true;
}

// The thread that waits in vain, and one that does not come.
void report_deadlock() {
  int waits = -1, other = -1;
  for (int thread = 0; thread < block.threads; ++thread) {
    if (block.all[thread].state == State::finished) continue;
    if (waits < 0 || block.all[thread].state != State::barrier) waits = thread;
  }
  const State state = block.all[waits].state;
  const bool whole_block = state == State::barrier;
  const int begin = whole_block ? 0 : waits / warp_size * warp_size;
  const int end = whole_block ? block.threads : begin + warp_size;
  for (int thread = begin; thread < end; ++thread) {
    if (block.all[thread].state != state) other = thread;
  }
  const Thread& absent = block.all[other];
  fail_from(
      waits,
      std::string(name_of(state)) + " that not all threads reach: " + place_of(other) +
          (absent.state == State::finished ? " has ended"
                                           : std::string(" waits for ") + name_of(absent.state) +
                                                 " at " + text_of(absent.where)),
      block.all[waits].where);
}

void run_block(std::int64_t index) {
  blockIdx.x = static_cast<unsigned>(index);
  block.all.assign(block.threads, Thread());
  block.warps.assign(block.threads / warp_size, Warp());
  block.touches.assign(block.shared_bytes, Touch());
  std::memset(block.shared.get(), 0xff, block.shared_bytes);  // NaN in every floating type
  block.waiting = 0;
  block.syncs = 0;
  block.running = block.threads;
  for (int thread = 0; thread < block.threads; ++thread) block.all[thread].open = true;
  fibers.start(block.threads);
  while (block.running > 0 && block.failure.empty()) {
    bool moved = false;
    for (int thread = 0; thread < block.threads && block.failure.empty(); ++thread) {
      if (!block.all[thread].open) continue;
      block.all[thread].open = false;
      moved = true;
      block.own = thread;
      threadIdx.x = static_cast<unsigned>(thread);
      fibers.enter(thread);
    }
    if (!moved && block.failure.empty()) report_deadlock();
  }
}

void finish_thread() {
  Thread& own = block.current();
  if (!own.copies.empty()) {
    fail_from(block.own, "a copy to shared memory that nothing waits for", own.copies.back().where);
  }
  own.state = State::finished;
  block.running -= 1;
}

// Whether this thread's access is after one that was made at these counts of barriers by a thread
// of warp `other`.
bool after(std::uint32_t syncs, std::uint32_t warp_syncs, int other) {
  if (syncs != block.syncs) return true;
  return other == block.warp() && warp_syncs != block.warps[other].syncs;
}

Touch* touch_of(const std::byte* address) { return &block.touches[address - block.shared.get()]; }

}  // namespace

void run_fiber() {
  (*kernel_body)();
  finish_thread();
}

const std::vector<Launch>& launches() { return noted; }

void forget_launches(bool only_note) {
  noted.clear();
  noting_only = only_note;
}

bool only_noting() { return noting_only; }

void run_blocks(const char* kernel, std::int64_t blocks, int threads, std::size_t shared,
                const std::function<void()>& body) {
  const std::lock_guard<std::mutex> lock(one_kernel);
  if (threads < warp_size || threads > most_threads || threads % warp_size != 0 ||
      shared > most_shared) {
    last_error = cudaErrorInvalidConfiguration;
    return;
  }
  if (noted.size() < 1000) noted.push_back({kernel, blocks, threads, shared});
  if (noting_only) return;
  block.kernel = kernel;
  block.threads = threads;
  block.failure.clear();
  block.shared_bytes = shared;
  block.shared.reset(new std::byte[shared]);
  kernel_body = &body;
  blockDim.x = static_cast<unsigned>(threads);
  gridDim.x = static_cast<unsigned>(blocks);
  for (std::int64_t index = 0; index < blocks; ++index) {
    run_block(index);
    if (!block.failure.empty()) {
      fibers.abandon();
      throw std::runtime_error(block.failure);
    }
  }
}

void fail(const std::string& what, const Where& where) {
  fail_from(block.own, what, where);
  fibers.leave();
  std::abort();  // a thread that failed is never entered again
}

namespace {

// Waits for the threads [begin, end), of which `waiting` have come; the last one calls `meet` for
// all.
template <typename Meet>
void meet_others(State state, int begin, int end, int& waiting, const Where& where, Meet meet) {
  if (++waiting < end - begin) return wait(state, where);
  Thread& own = block.current();
  own.state = state;
  own.where = where;
  if (!same_line(begin, end)) fibers.leave();  // for good
  waiting = 0;
  meet();
  for (int thread = begin; thread < end; ++thread) block.all[thread].open = true;
  own.open = false;
  own.state = State::running;
}

template <typename Meet>
void meet_warp(State state, const Where& where, Meet meet) {
  Warp& warp = block.warps[block.warp()];
  const int begin = block.warp() * warp_size;
  meet_others(state, begin, begin + warp_size, warp.waiting, where, [&] { meet(warp); });
}

}  // namespace

void meet_block(const Where& where) {
  meet_others(State::barrier, 0, block.threads, block.waiting, where, [] { block.syncs += 1; });
}

void meet_lanes(const Where& where) {
  meet_warp(State::warp_barrier, where, [](Warp& warp) { warp.syncs += 1; });
}

void exchange(void* value, std::size_t bytes, int source, const Where& where) {
  const int lane = block.own % warp_size;
  if (source < 0 || source >= warp_size) {
    fail("a shuffle from lane " + std::to_string(source), where);
  }
  Warp& warp = block.warps[block.warp()];
  std::memcpy(warp.values[lane], value, bytes);
  meet_warp(State::shuffle, where,
            [](Warp& own) { std::memcpy(own.read, own.values, sizeof own.read); });
  std::memcpy(value, warp.read[source], bytes);
}

void multiply_add(float* d, const float* a, float b0, float b1, const Where& where) {
  const auto kept = [](float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    bits &= 0xffffe000u;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  };
  constexpr int size = 8, lanes = 4;  // of k, that share a row
  const int lane = block.own % warp_size, row = lane / lanes, column = lane % lanes * 2;
  const Warp& warp = block.warps[block.warp()];
  // Nothing is exchanged anew before every lane has read.
  const auto read = [&](int from, int i) {
    float value;
    std::memcpy(&value, warp.read[from] + i * sizeof value, sizeof value);
    return kept(value);
  };
  float left[2][size], right[size][2];
  float own[4] = {a[0], a[1], a[2], a[3]};
  exchange(own, sizeof own, lane, where);
  for (int k = 0; k < size; ++k) {
    for (int i = 0; i < 2; ++i) left[i][k] = read(row * lanes + k % lanes, i + k / lanes * 2);
  }
  own[0] = b0;
  own[1] = b1;
  exchange(own, sizeof own, lane, where);
  for (int k = 0; k < size; ++k) {
    for (int j = 0; j < 2; ++j) right[k][j] = read((column + j) * lanes + k % lanes, k / lanes);
  }
  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 2; ++j) {
      float sum = d[2 * i + j];
      for (int k = 0; k < size; ++k) sum += left[i][k] * right[k][j];
      d[2 * i + j] = sum;
    }
  }
}

std::byte* take_shared(int offset, std::size_t bytes, const Where& where) {
  if (offset + bytes > block.shared_bytes) {
    fail("shared memory: " + std::to_string(offset + bytes) + " bytes are taken, " +
             std::to_string(block.shared_bytes) + " were asked for",
         where);
  }
  return block.shared.get() + offset;
}

void check_read(const std::byte* address, std::size_t bytes, const Where& where) {
  Touch* touch = touch_of(address);
  const std::uint32_t warp_syncs = block.warps[block.warp()].syncs;
  for (std::size_t i = 0; i < bytes; ++i, ++touch) {
    if (touch->pending) fail("shared memory is read before its copy was waited for", where);
    if (!touch->written) fail("shared memory is read that nothing wrote", where);
    const int writer = touch->writer;
    if (writer != block.own &&
        !after(touch->write_syncs, touch->write_warp_syncs, writer / warp_size)) {
      fail("a race: shared memory is read that " + place_of(writer) +
               " wrote with no barrier between",
           where);
    }
    if (touch->read_syncs != block.syncs || touch->reader == -1) {
      touch->reader = static_cast<std::int16_t>(block.own);
      touch->reading_warp = static_cast<std::int16_t>(block.warp());
      touch->many_warps = false;
    } else {
      if (touch->reader != block.own) touch->reader = -2;
      if (touch->reading_warp != block.warp()) touch->many_warps = true;
    }
    touch->read_syncs = block.syncs;
    touch->read_warp_syncs = warp_syncs;
  }
}

void check_write(const std::byte* address, std::size_t bytes, const Where& where) {
  Touch* touch = touch_of(address);
  for (std::size_t i = 0; i < bytes; ++i, ++touch) {
    if (touch->pending) fail("shared memory is written while a copy to it is under way", where);
    const int writer = touch->writer;
    if (touch->written && writer != block.own &&
        !after(touch->write_syncs, touch->write_warp_syncs, writer / warp_size)) {
      fail("a race: shared memory is written that " + place_of(writer) +
               " wrote with no barrier between",
           where);
    }
    const bool read_now = touch->reader != -1 && touch->read_syncs == block.syncs;
    if (read_now && touch->reader != block.own) {
      const bool ordered = !touch->many_warps && touch->reading_warp == block.warp() &&
                           touch->read_warp_syncs != block.warps[block.warp()].syncs;
      if (!ordered) {
        fail("a race: shared memory is written that " +
                 (touch->reader >= 0 ? place_of(touch->reader) : std::string("other threads")) +
                 " read with no barrier between",
             where);
      }
    }
    touch->written = true;
    touch->writer = static_cast<std::int16_t>(block.own);
    touch->write_syncs = block.syncs;
    touch->write_warp_syncs = block.warps[block.warp()].syncs;
  }
}

void start_copy(std::byte* to, const void* from, std::size_t bytes, const Where& where) {
  if (reinterpret_cast<std::uintptr_t>(from) % bytes != 0) {
    fail("a copy of " + std::to_string(bytes) + " bytes is not from a multiple of them", where);
  }
  check_write(to, bytes, where);
  for (std::size_t i = 0; i < bytes; ++i) touch_of(to)[i].pending = true;
  block.current().copies.push_back({to, from, bytes, where});
}

void commit_copies() { block.current().groups.push_back(block.current().copies.size()); }

void wait_copies(int groups) {
  Thread& own = block.current();
  const int done = static_cast<int>(own.groups.size()) - groups;
  if (done <= 0) return;
  const std::size_t count = own.groups[done - 1];
  for (std::size_t i = 0; i < count; ++i) {
    const Copy& copy = own.copies[i];
    std::memcpy(copy.to, copy.from, copy.bytes);
    for (std::size_t byte = 0; byte < copy.bytes; ++byte) {
      Touch& touch = touch_of(copy.to)[byte];
      touch.pending = false;
      touch.write_syncs = block.syncs;
      touch.write_warp_syncs = block.warps[block.warp()].syncs;
    }
  }
  own.copies.erase(own.copies.begin(), own.copies.begin() + static_cast<std::ptrdiff_t>(count));
  own.groups.erase(own.groups.begin(), own.groups.begin() + done);
  for (std::size_t& end : own.groups) end -= count;
}

}  // namespace grcsf::emulation

// ---- The CUDA runtime
// ----------------------------------------------------------------------------

using grcsf::emulation::last_error;

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int) { return cudaSuccess; }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  using namespace grcsf::emulation;
  if (attribute == cudaDevAttrMultiProcessorCount) {
    *value = only_noting() ? noted_multiprocessors : multiprocessors;
  } else {
    const bool of_block = attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin;
    *value = static_cast<int>(of_block ? most_shared : most_shared_of_multiprocessor);
  }
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int value) {
  return static_cast<std::size_t>(value) <= grcsf::emulation::most_shared ? cudaSuccess
                                                                          : cudaErrorInvalidValue;
}

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidValue ? "invalid argument" : "invalid configuration argument";
}
