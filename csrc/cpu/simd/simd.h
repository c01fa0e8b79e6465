// SPDX-License-Identifier: Apache-2.0
// Vectors of float and double, for every instruction set from one source.
//
// GRCSF_VECTOR_BYTES is set by the build: 16 (portable), 32 (AVX2) or 64 (AVX-512). The compiler's
// vector extensions give arithmetic, comparison and selection; the few instructions that they can't
// express (conversion of float16, stores that bypass the cache) stand here and nowhere else.
// Everything has internal linkage, as in half.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "common/dtypes.h"
#include "common/tensor_view.h"

namespace grcsf {
namespace {

constexpr int vector_bytes = GRCSF_VECTOR_BYTES;

template <typename A>
struct VectorOf;

template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(GRCSF_VECTOR_BYTES)));
  typedef std::int32_t integers __attribute__((vector_size(GRCSF_VECTOR_BYTES)));
  typedef std::uint32_t bits __attribute__((vector_size(GRCSF_VECTOR_BYTES)));
};

template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(GRCSF_VECTOR_BYTES)));
  typedef std::int64_t integers __attribute__((vector_size(GRCSF_VECTOR_BYTES)));
};

template <typename A>
using Vec = typename VectorOf<A>::type;
template <typename A>
using Integers = typename VectorOf<A>::integers;

// Values in one vector.
template <typename A>
constexpr int lanes = vector_bytes / static_cast<int>(sizeof(A));

// `count` rounded up to whole vectors of the widest instruction set: the pitch of a buffer row, on
// cache lines of its own.
inline std::int64_t pitch_of(std::int64_t count) { return (count + 15) / 16 * 16; }

template <typename A>
inline Vec<A> splat(A value) {
  return value - Vec<A>{};
}

template <typename To, typename From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// ---- Loads and stores, unaligned; half dtypes widen and round to nearest even (half.h) ----------

inline Vec<float> load(const float* from) {
  Vec<float> value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

inline Vec<double> load(const double* from) {
  Vec<double> value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

typedef std::uint16_t Halves __attribute__((vector_size(GRCSF_VECTOR_BYTES / 2)));
using Words = VectorOf<float>::bits;

inline Words load_words(const void* from) {
  Halves halves;
  std::memcpy(&halves, from, sizeof halves);
  return __builtin_convertvector(halves, Words);
}

inline void store_words(Words words, void* to) {
  const Halves halves = __builtin_convertvector(words, Halves);
  std::memcpy(to, &halves, sizeof halves);
}

inline Vec<float> load(const bfloat16* from) {
  return bit_cast<Vec<float>>(load_words(from) << 16);
}

inline Vec<float> load(const float16* from) {
#if defined(__F16C__) && GRCSF_VECTOR_BYTES == 32
  return bit_cast<Vec<float>>(
      _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#elif defined(__AVX512F__) && GRCSF_VECTOR_BYTES == 64
  return bit_cast<Vec<float>>(
      _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#else
  Vec<float> value;
  for (int i = 0; i < lanes<float>; ++i) value[i] = widen(from[i]);
  return value;
#endif
}

inline void store(Vec<float> value, float* to) { std::memcpy(to, &value, sizeof value); }

inline void store(Vec<double> value, double* to) { std::memcpy(to, &value, sizeof value); }

inline void store(Vec<float> value, bfloat16* to) {
  const Words bits = bit_cast<Words>(value);
  const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Words quiet = (bits >> 16) | 0x40u;
  store_words((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded, to);
}

inline void store(Vec<float> value, float16* to) {
#if defined(__F16C__) && GRCSF_VECTOR_BYTES == 32
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                   _mm256_cvtps_ph(bit_cast<__m256>(value), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX512F__) && GRCSF_VECTOR_BYTES == 64
  _mm256_storeu_si256(
      reinterpret_cast<__m256i*>(to),
      _mm512_maskz_cvtps_ph(0xffff, bit_cast<__m512>(value), _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < lanes<float>; ++i) narrow(value[i], to[i]);
#endif
}

// Copies `bytes` past the cache where the target lies on whole cache lines, else through it. Only
// for what is not read again soon. parallel_ranges ends with a barrier, which orders these stores.
inline void stream_bytes(const void* from, void* to, std::int64_t bytes) {
#if defined(__SSE2__)
  if (reinterpret_cast<std::uintptr_t>(to) % 16 == 0 && bytes % 16 == 0) {
    const char* source = static_cast<const char*>(from);
    char* target = static_cast<char*>(to);
    std::int64_t i = 0;
#if defined(__AVX__)
    if (reinterpret_cast<std::uintptr_t>(to) % 32 == 0) {
      for (; i + 32 <= bytes; i += 32) {
        _mm256_stream_si256(reinterpret_cast<__m256i*>(target + i),
                            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + i)));
      }
    }
#endif
    for (; i < bytes; i += 16) {
      _mm_stream_si128(reinterpret_cast<__m128i*>(target + i),
                       _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i)));
    }
    return;
  }
#endif
  std::memcpy(to, from, static_cast<std::size_t>(bytes));
}

// One vector, likewise.
template <typename A, typename T>
inline void stream(A value, T* to) {
  alignas(64) T values[sizeof(A) / sizeof(ComputeType<T>)];
  store(value, values);
  stream_bytes(values, to, sizeof values);
}

// Makes earlier stream_bytes() of this thread visible before anything that follows.
inline void end_of_stream() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// Asks for the cache lines of `bytes` from `from`.
inline void prefetch_bytes(const void* from, std::int64_t bytes) {
  const char* first = static_cast<const char*>(from);
  for (std::int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(first + i);
}

// ---- Selection and reduction
// ---------------------------------------------------------------------

// The larger value; NaN in `value` stays.
template <typename V>
inline V at_least(V value, V floor) {
  return value < floor ? floor : value;
}

template <typename V>
inline V at_most(V value, V ceiling) {
  return value > ceiling ? ceiling : value;
}

// The sum of all lanes, in a fixed order.
template <typename A>
inline A sum_of(Vec<A> value) {
  A parts[lanes<A>];
  std::memcpy(parts, &value, sizeof value);
  for (int width = lanes<A> / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) parts[i] += parts[i + width];
  }
  return parts[0];
}

template <typename A>
inline A least_of(Vec<A> value) {
  A least = value[0];
  for (int i = 1; i < lanes<A>; ++i) least = value[i] < least ? value[i] : least;
  return least;
}

template <typename A>
inline A greatest_of(Vec<A> value) {
  A greatest = value[0];
  for (int i = 1; i < lanes<A>; ++i) greatest = value[i] > greatest ? value[i] : greatest;
  return greatest;
}

// ---- The exponential
// -----------------------------------------------------------------------------
//
// exp(x) = 2^n exp(r) with n = round(x / ln 2), r = x - n ln 2 in two parts (Cody and Waite), |r|
// <= 0.3466, and the Taylor polynomial of degree 7 (float: truncation 5e-9) or 13 (double: 5e-18).
// Relative error: at most 1.5e-7 and 4e-16 (tests/native/test_simd.py). For arguments up to 80
// (700); below -80 (-700) it is 0, so that products of what it returns do not become subnormal. NaN
// stays.

template <typename A>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  static constexpr float smallest = -80, round = 12582912.0f;  // 1.5 * 2^23
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  static constexpr int degree = 7, mantissa = 23, bias = 127;
};

template <>
struct ExpConstants<double> {
  static constexpr double smallest = -700, round = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double ln2_high = 6.93145751953125e-1, ln2_low = 1.42860682030941723212e-6;
  static constexpr int degree = 13, mantissa = 52, bias = 1023;
};

template <typename A>
inline Vec<A> exp_of(Vec<A> x) {
  using K = ExpConstants<A>;
  constexpr A reciprocal_factorials[] = {A(1),
                                         A(1),
                                         A(1) / 2,
                                         A(1) / 6,
                                         A(1) / 24,
                                         A(1) / 120,
                                         A(1) / 720,
                                         A(1) / 5040,
                                         A(1) / 40320,
                                         A(1) / 362880,
                                         A(1) / 3628800,
                                         A(1) / 39916800,
                                         A(1) / 479001600,
                                         A(1) / 6227020800};
  constexpr A log2e = A(1.44269504088896340736);
  const Vec<A> bounded = at_least(x, splat<A>(K::smallest));
  const Vec<A> shifted = bounded * log2e + K::round;
  const Vec<A> whole = shifted - K::round;
  const Vec<A> rest = (bounded - whole * K::ln2_high) - whole * K::ln2_low;
  Vec<A> sum = splat<A>(reciprocal_factorials[K::degree]);
  for (int i = K::degree - 1; i >= 0; --i) sum = sum * rest + reciprocal_factorials[i];
  // The low bits of `shifted` are n; shifted into the exponent they scale by 2^n.
  const Integers<A> power = (bit_cast<Integers<A>>(shifted) + K::bias) << K::mantissa;
  const Vec<A> value = sum * bit_cast<Vec<A>>(power);
  return x < K::smallest ? Vec<A>{} : value;
}

}  // namespace
}  // namespace grcsf
