// SPDX-License-Identifier: Apache-2.0
// Switching takes a few instructions on x86-64; elsewhere ucontext, which asks the system each
// time. AddressSanitizer is told of every switch: it keeps track of the stack it is on.
#include "fibre.h"

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

struct Fibre {
  std::byte* stack = nullptr;  // null for the caller of enter()
  const void* bottom = nullptr;
  std::size_t bytes = 0;
#ifdef __x86_64__
  void* pointer = nullptr;
#else
  ucontext_t context;
#endif

  ~Fibre() {
    if (stack != nullptr) munmap(stack, guard_bytes + stack_bytes);
  }
};

namespace {

Fibre *entered = nullptr, *caller = nullptr;

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

void switch_to(Fibre& from, Fibre& to) {
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
  const bool is_fibre = from.stack != nullptr;
  __sanitizer_finish_switch_fiber(frames, is_fibre ? &caller->bottom : nullptr,
                                  is_fibre ? &caller->bytes : nullptr);
#endif
}

void begin_fibre() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &caller->bottom, &caller->bytes);
#endif
  for (;;) {
    run_fibre();
    switch_to(*entered, *caller);
  }
}

// A stack on which the first switch begins begin_fibre().
void prepare(Fibre& fibre) {
  void* memory = mmap(nullptr, guard_bytes + stack_bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory, guard_bytes, PROT_NONE);  // stacks grow down: a fault, not another's stack
  fibre.stack = static_cast<std::byte*>(memory);
  fibre.bottom = fibre.stack + guard_bytes;
  fibre.bytes = stack_bytes;
#ifdef __x86_64__
  auto* top = reinterpret_cast<std::uint64_t*>(fibre.stack + guard_bytes + stack_bytes);
  *--top = 0;  // where begin_fibre() would return to; also keeps the stack on 16 bytes
  *--top = reinterpret_cast<std::uint64_t>(&begin_fibre);
  for (int i = 0; i < 6; ++i) *--top = 0;
  fibre.pointer = top;
#else
  getcontext(&fibre.context);
  fibre.context.uc_stack.ss_sp = fibre.stack + guard_bytes;
  fibre.context.uc_stack.ss_size = stack_bytes;
  fibre.context.uc_link = nullptr;
  makecontext(&fibre.context, begin_fibre, 0);
#endif
}

}  // namespace

Fibres::Fibres() : main_(std::make_unique<Fibre>()) {}
Fibres::~Fibres() = default;

void Fibres::start(int count) {
  while (static_cast<int>(all_.size()) < count) {
    all_.push_back(std::make_unique<Fibre>());
    prepare(*all_.back());
  }
}

void Fibres::enter(int index) {
  caller = main_.get();
  entered = all_[index].get();
  switch_to(*main_, *entered);
}

void Fibres::leave() {
  Fibre& own = *entered;
  switch_to(own, *caller);
}

void Fibres::abandon() {
#ifdef __SANITIZE_ADDRESS__
  for (auto& fibre : all_) __asan_unpoison_memory_region(fibre->bottom, fibre->bytes);
#endif
  all_.clear();
}

}  // namespace grcsf::emulation
