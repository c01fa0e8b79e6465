// SPDX-License-Identifier: Apache-2.0
// Products of a warp on tensor cores, in TF32: float32 operands of which 11 bits count.
//
// Half-precision data is exact in TF32. What is not is split in two, which together have all bits.
// Fragments: lane 4 g + t holds a[g][t], a[g + 8][t], a[g][t + 4] and a[g + 8][t + 4] of a [16][8],
// b[t][g] and b[t + 4][g] of b [8][8], and d[g][2 t], d[g][2 t + 1], d[g + 8][2 t] and
// d[g + 8][2 t + 1] of d [16][8].
#pragma once

#include "cuda/runtime/device.cuh"

namespace grcsf {
namespace cuda {
namespace {

using Fragment = Pack<float, 4>;

// Rounded to the nearest TF32; NaN stays NaN.
__device__ __forceinline__ float tf32_of(float value) {
#ifdef GRCSF_EMULATED
  if (value != value) return value;
  return as_float((as_word(value) + 0x1000u) & 0xffffe000u);
#else
  unsigned result;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(result) : "f"(value));
  return __uint_as_float(result);
#endif
}

// d += a b; all lanes of the warp take part.
__device__ __forceinline__ void multiply_add(Fragment& d, const Fragment& a, float b0,
                                             float b1 GRCSF_WHERE) {
#ifdef GRCSF_EMULATED
  emulation::multiply_add(&d[0], &a[0], b0, b1, where);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])),
        "r"(__float_as_uint(a[3])), "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
#endif
}

// A left operand of eight rows: each is there twice, as what TF32 keeps of it (row g) and what is
// left (row g + 8).
__device__ __forceinline__ Fragment split_rows(float first, float second) {
  const float high0 = tf32_of(first), high1 = tf32_of(second);
  return {{high0, first - high0, high1, second - high1}};
}

// d += a b with b from data of type T: float32 is split too.
template <typename T>
__device__ __forceinline__ void multiply_add_data(Fragment& d, const Fragment& a, float b0,
                                                  float b1 GRCSF_WHERE) {
  if constexpr (sizeof(T) == 2) {
    multiply_add(d, a, b0, b1 GRCSF_HERE);
  } else {
    const float high0 = tf32_of(b0), high1 = tf32_of(b1);
    multiply_add(d, a, high0, high1 GRCSF_HERE);
    multiply_add(d, a, b0 - high0, b1 - high1 GRCSF_HERE);
  }
}

}  // namespace
}  // namespace cuda
}  // namespace grcsf
