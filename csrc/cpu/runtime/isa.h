// SPDX-License-Identifier: Apache-2.0
// Which instruction set the CPU kernels use, chosen once at the first call.
#pragma once

#include <string>

namespace grcsf {

// Every kernel is compiled once for each, into a namespace of that name.
enum class Isa { portable, avx2, avx512 };

// The widest that was compiled and that this processor runs.
Isa widest_isa();

// The one in use: the widest, or what GRCSF_CPU_ISA narrows it to: the widest up to the one it
// names. Throws std::runtime_error where it names none.
Isa isa();

// Uses another from now on, for tests. Throws std::runtime_error where this processor has none of
// this name.
void choose_isa(const std::string& name);

const char* isa_name(Isa isa);

}  // namespace grcsf
