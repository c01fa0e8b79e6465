// SPDX-License-Identifier: Apache-2.0
// Which instruction set the CPU kernels use, chosen once when the module is loaded.
#pragma once

namespace grcsf {

enum class Isa { portable, avx2 };

// The widest that was compiled and that this processor runs; GRCSF_CPU_ISA=portable narrows it.
Isa isa();

const char* isa_name(Isa isa);

}  // namespace grcsf
