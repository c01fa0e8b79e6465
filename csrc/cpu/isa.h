// SPDX-License-Identifier: Apache-2.0
// Which instruction set the CPU kernels use, chosen once when the module is loaded.
#pragma once

namespace grcsf {

// Every kernel is compiled once for each, into a namespace of that name.
enum class Isa { portable, avx2, avx512 };

// The widest that was compiled and that this processor runs. GRCSF_CPU_ISA narrows it: the widest
// up to the one it names. Throws std::runtime_error where it names none.
Isa isa();

const char* isa_name(Isa isa);

}  // namespace grcsf
