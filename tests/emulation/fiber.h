// SPDX-License-Identifier: Apache-2.0
// Fibers: threads of execution that give the processor to each other only when they say so.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

namespace grcsf::emulation {

// What every fiber does when it is entered first; defined by emulation.cpp.
void run_fiber();

struct Fiber;

class Fibers {
 public:
  Fibers();
  ~Fibers();

  // Makes `count` fibers ready to call run_fiber() from its beginning.
  void start(int count);

  // Runs one until it leaves, or its run_fiber() ends. Called by the one that started them.
  void enter(int index);

  // Back to the caller of enter(). Called by a fiber.
  void leave();

  // Forgets fibers that wait inside run_fiber(), with what they hold.
  void abandon();

 private:
  std::vector<std::unique_ptr<Fiber>> all_;
  Fiber* current_ = nullptr;
  std::unique_ptr<Fiber> main_;
};

}  // namespace grcsf::emulation
