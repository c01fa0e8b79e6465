// SPDX-License-Identifier: Apache-2.0
#include "cpu/isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace grcsf {
namespace {

Isa widest() {
  const char* wanted = std::getenv("GRCSF_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return Isa::avx512;
  for (const Isa isa : {Isa::portable, Isa::avx2, Isa::avx512}) {
    if (std::string(wanted) == isa_name(isa)) return isa;
  }
  throw std::runtime_error(std::string("GRCSF_CPU_ISA is '") + wanted +
                           "', expected portable, avx2 or avx512");
}

Isa detect() {
  const Isa most = widest();
  (void)most;
#ifdef GRCSF_HAVE_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2 && avx512 && most >= Isa::avx512) return Isa::avx512;
  if (avx2 && most >= Isa::avx2) return Isa::avx2;
#endif
  return Isa::portable;
}

}  // namespace

Isa isa() {
  static const Isa chosen = detect();
  return chosen;
}

const char* isa_name(Isa isa) {
  return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "portable";
}

}  // namespace grcsf
