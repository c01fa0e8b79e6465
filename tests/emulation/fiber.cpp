// SPDX-License-Identifier: Apache-2.0
// Switching takes a few instructions on x86-64; elsewhere ucontext, which asks the system each
// time. AddressSanitizer is told of every switch: it keeps track of the stack it is on.
#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

#ifndef __x86_64__
#include <ucontext.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace grcsf::emulation {

constexpr std::size_t stack_bytes = 256 << 10, guard_bytes = 4096;

struct Fiber {
  std::byte* stack = nullptr;  // null for the caller of enter()
  const void* bottom = nullptr;
  std::size_t bytes = 0;
#ifdef __x86_64__
  void* pointer = nullptr;
#else
  ucontext_t context;
#endif

  ~Fiber() {
    if (stack != nullptr) munmap(stack, guard_bytes + stack_bytes);
  }
};

namespace {

Fiber *entered = nullptr, *caller = nullptr;

#ifdef __x86_64__
extern "C" void grcsf_switch_stack(void** from, void* to);
// Keeps what a function must keep on the stack, and goes on with another one.
asm(R"(
.text
.globl grcsf_switch_stack
.type grcsf_switch_stack, @function
grcsf_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size grcsf_switch_stack, .-grcsf_switch_stack
)");
#endif

void switch_to(Fiber& from, Fiber& to) {
#ifdef __SANITIZE_ADDRESS__
  void* frames = nullptr;
  __sanitizer_start_switch_fiber(&frames, to.bottom, to.bytes);
#endif
#ifdef __x86_64__
  grcsf_switch_stack(&from.pointer, to.pointer);
#else
  swapcontext(&from.context, &to.context);
#endif
#ifdef __SANITIZE_ADDRESS__
  // The caller may be another thread each time, with a stack of its own.
  const bool is_fiber = from.stack != nullptr;
  __sanitizer_finish_switch_fiber(frames, is_fiber ? &caller->bottom : nullptr,
                                  is_fiber ? &caller->bytes : nullptr);
#endif
}

void begin_fiber() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &caller->bottom, &caller->bytes);
#endif
  for (;;) {
    run_fiber();
    switch_to(*entered, *caller);
  }
}

// A stack on which the first switch begins begin_fiber().
void prepare(Fiber& fiber) {
  void* memory = mmap(nullptr, guard_bytes + stack_bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory, guard_bytes, PROT_NONE);  // stacks grow down: a fault, not another's stack
  fiber.stack = static_cast<std::byte*>(memory);
  fiber.bottom = fiber.stack + guard_bytes;
  fiber.bytes = stack_bytes;
#ifdef __x86_64__
  auto* top = reinterpret_cast<std::uint64_t*>(fiber.stack + guard_bytes + stack_bytes);
  *--top = 0;  // where begin_fiber() would return to; also keeps the stack on 16 bytes
  *--top = reinterpret_cast<std::uint64_t>(&begin_fiber);
  for (int i = 0; i < 6; ++i) *--top = 0;
  fiber.pointer = top;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack + guard_bytes;
  fiber.context.uc_stack.ss_size = stack_bytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, begin_fiber, 0);
#endif
}

}  // namespace

Fibers::Fibers() : main_(std::make_unique<Fiber>()) {}
Fibers::~Fibers() = default;

void Fibers::start(int count) {
  while (static_cast<int>(all_.size()) < count) {
    all_.push_back(std::make_unique<Fiber>());
    prepare(*all_.back());
  }
}

void Fibers::enter(int index) {
  caller = main_.get();
  entered = all_[index].get();
  switch_to(*main_, *entered);
}

void Fibers::leave() {
  Fiber& own = *entered;
  switch_to(own, *caller);
}

void Fibers::abandon() {
#ifdef __SANITIZE_ADDRESS__
  for (auto& fiber : all_) __asan_unpoison_memory_region(fiber->bottom, fiber->bytes);
#endif
  all_.clear();
}

}  // namespace grcsf::emulation
