// SPDX-License-Identifier: Apache-2.0
// bfloat16 and float16 as storage: loads widen to float, stores round to nearest even.
//
// Plain integer arithmetic without branches on data, so that the compiler vectorizes it for every
// instruction set. Everything has internal linkage: these functions are compiled once for each
// instruction set, and the linker must never merge the copies.
#pragma once

#include <cstdint>
#include <cstring>

namespace grcsf {
namespace {

struct bfloat16 {
  std::uint16_t bits;
};

struct float16 {
  std::uint16_t bits;
};

inline float float_of(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline std::uint32_t bits_of(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float widen(float value) { return value; }

inline double widen(double value) { return value; }

inline float widen(bfloat16 value) { return float_of(std::uint32_t(value.bits) << 16); }

inline float widen(float16 value) {
  const std::uint32_t magnitude = value.bits & 0x7fffu;
  const std::uint32_t sign = std::uint32_t(value.bits & 0x8000u) << 16;
  // The exponent field lands 112 too low; one multiplication mends it, for subnormals too.
  const std::uint32_t finite = bits_of(float_of(magnitude << 13) * 0x1p112f);
  const std::uint32_t special = 0x7f800000u | (magnitude << 13);  // infinity and NaN
  return float_of(sign | (magnitude < 0x7c00u ? finite : special));
}

inline void narrow(float value, float& out) { out = value; }

inline void narrow(double value, double& out) { out = value; }

inline void narrow(double value, float& out) { out = static_cast<float>(value); }

inline void narrow(float value, bfloat16& out) {
  const std::uint32_t bits = bits_of(value);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const std::uint32_t quiet = (bits >> 16) | 0x40u;
  out.bits = static_cast<std::uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}

inline void narrow(float value, float16& out) {
  const std::uint32_t bits = bits_of(value);
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  // Normal numbers: round 13 bits away and move the exponent's bias from 127 to 15.
  const std::uint32_t normal =
      ((magnitude + 0xfffu + ((magnitude >> 13) & 1u)) >> 13) - (112u << 10);
  // Subnormal numbers: the last place of 0.5f is 2^-24, that of a float16 subnormal.
  const std::uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  const std::uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  const std::uint32_t huge = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;  // NaN, infinity
  out.bits = static_cast<std::uint16_t>(sign | (magnitude >= 0x477ff000u ? huge : finite));
}

inline void narrow(double value, bfloat16& out) { narrow(static_cast<float>(value), out); }

inline void narrow(double value, float16& out) { narrow(static_cast<float>(value), out); }

}  // namespace
}  // namespace grcsf
