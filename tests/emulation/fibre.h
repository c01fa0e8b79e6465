// SPDX-License-Identifier: Apache-2.0
// Fibres: threads of execution that give the processor to each other only when they say so.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

namespace grcsf::emulation {

// What every fibre does when it is entered first; defined by emulation.cpp.
void run_fibre();

struct Fibre;

class Fibres {
 public:
  Fibres();
  ~Fibres();

  // Makes `count` fibres ready to call run_fibre() from its beginning.
  void start(int count);

  // Runs one until it leaves, or its run_fibre() ends. Called by the one that started them.
  void enter(int index);

  // Back to the caller of enter(). Called by a fibre.
  void leave();

  // Forgets fibres that wait inside run_fibre(), with what they hold.
  void abandon();

 private:
  std::vector<std::unique_ptr<Fibre>> all_;
  Fibre* current_ = nullptr;
  std::unique_ptr<Fibre> main_;
};

}  // namespace grcsf::emulation
