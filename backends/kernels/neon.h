/* What the NEON files share: vectors of 4 floats, in memory of any dtype. */
#ifndef LORDBA_NEON_H
#define LORDBA_NEON_H

#include <arm_neon.h>

#include "tiles.h"

#define UNROLLED static inline __attribute__((always_inline))

/* Elements [i, i + n) at p as floats, n <= 4, zeros after them. */
UNROLLED float32x4_t load_n(const void* p, lordba_dtype dtype, size_t i, size_t n) {
  if (n < 4) {
    float v[4] = {0.0f};
    for (size_t k = 0; k < n; ++k) v[k] = lordba_load_scalar(p, dtype, i + k);
    return vld1q_f32(v);
  }
  if (dtype == LORDBA_F32) return vreinterpretq_f32_u8(vld1q_u8((const uint8_t*)p + 4 * i));
  const uint16x4_t bits = vreinterpret_u16_u8(vld1_u8((const uint8_t*)p + 2 * i));
  if (dtype == LORDBA_F16) return vcvt_f32_f16(vreinterpret_f16_u16(bits));
  return vreinterpretq_f32_u32(vshll_n_u16(bits, 16));
}

/* Rounds to the nearest, ties to even; NaN stays NaN. */
UNROLLED uint16x4_t to_bfloat(float32x4_t v) {
  const uint32x4_t bits = vreinterpretq_u32_f32(v);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint16x4_t rounded = vaddhn_u32(vaddq_u32(bits, odd), vdupq_n_u32(0x7fff));
  const uint16x4_t quiet = vorr_u16(vshrn_n_u32(bits, 16), vdup_n_u16(0x40));
  return vbsl_u16(vmovn_u32(vceqq_f32(v, v)), rounded, quiet);
}

/* The first n <= 4 floats of v as elements [i, i + n) at p. */
UNROLLED void store_n(void* p, lordba_dtype dtype, size_t i, size_t n, float32x4_t v) {
  if (n < 4) {
    float lanes[4];
    vst1q_f32(lanes, v);
    for (size_t k = 0; k < n; ++k) lordba_store_scalar(p, dtype, i + k, lanes[k]);
  } else if (dtype == LORDBA_F32) {
    vst1q_u8((uint8_t*)p + 4 * i, vreinterpretq_u8_f32(v));
  } else {
    const uint16x4_t bits = dtype == LORDBA_F16 ? vreinterpret_u16_f16(vcvt_f16_f32(v)) : to_bfloat(v);
    vst1_u8((uint8_t*)p + 2 * i, vreinterpret_u8_u16(bits));
  }
}

/* neon_inputs.c and neon_ranks.c */
void lordba_pack_a_neon(const uint8_t* a, size_t row_bytes, size_t rows, size_t bytes, size_t blocks, uint32_t* words);
void lordba_sum_inputs_neon(const void* x, size_t x_stride, lordba_dtype dtype, size_t tokens, size_t n,
                            const float* s_in, const uint32_t* words, size_t blocks, float* sums, size_t sums_stride);
void lordba_sum_ranks_neon(const float* h, size_t h_stride, size_t tokens, size_t ranks, const uint8_t* b, size_t n,
                           const float* s_out, const float* carry_in, float* carry_out, const void* base,
                           size_t base_stride, void* y, size_t y_stride, lordba_dtype dtype);

#endif
