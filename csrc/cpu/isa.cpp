// SPDX-License-Identifier: Apache-2.0
#include "cpu/isa.h"

#include <cstdlib>
#include <cstring>

namespace grcsf {
namespace {

Isa detect() {
  const char* wanted = std::getenv("GRCSF_CPU_ISA");
  if (wanted != nullptr && std::strcmp(wanted, "portable") == 0) return Isa::portable;
#ifdef GRCSF_HAVE_AVX2
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::portable;
}

}  // namespace

Isa isa() {
  static const Isa chosen = detect();
  return chosen;
}

const char* isa_name(Isa isa) { return isa == Isa::avx2 ? "avx2" : "portable"; }

}  // namespace grcsf
