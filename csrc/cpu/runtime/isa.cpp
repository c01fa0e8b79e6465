// SPDX-License-Identifier: Apache-2.0
#include "cpu/runtime/isa.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace grcsf {
namespace {

Isa named(const std::string& name, const std::string& where) {
  for (const Isa isa : {Isa::portable, Isa::avx2, Isa::avx512}) {
    if (name == isa_name(isa)) return isa;
  }
  throw std::runtime_error(where + " is '" + name + "', expected portable, avx2 or avx512");
}

Isa widest_wanted() {
  const char* wanted = std::getenv("GRCSF_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return Isa::avx512;
  return named(wanted, "GRCSF_CPU_ISA");
}

std::atomic<Isa>& chosen() {
  static std::atomic<Isa> isa{std::min(widest_wanted(), widest_isa())};
  return isa;
}

}  // namespace

Isa widest_isa() {
#ifdef GRCSF_HAVE_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2 && avx512) return Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::portable;
}

Isa isa() { return chosen(); }

void choose_isa(const std::string& name) {
  const Isa wanted = named(name, "isa");
  if (wanted > widest_isa()) {
    throw std::runtime_error("isa is '" + name + "', and this build on this processor has " +
                             isa_name(widest_isa()) + " at most");
  }
  chosen() = wanted;
}

const char* isa_name(Isa isa) {
  return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "portable";
}

}  // namespace grcsf
