/*
 * The dense LoRA on NEON. Both stages keep a tile of TILE tokens by 4 vectors in registers, and both read the weights
 * front to back, 4 vectors at once.
 *
 * Stage 1: vectors lie along the inputs, a tile has 4 ranks, so that a token's x is loaded once for 4 ranks and never
 * broadcast; a is [r / 4][d_in / 4][4 ranks][4 inputs]. Stage 2: vectors lie along the outputs; b is
 * [d_out / 16][r][16].
 */
#include <arm_neon.h>

#include "dense_lora.h"

#define INLINE static inline __attribute__((always_inline)) /* constants among the arguments choose the code */
#define APART static __attribute__((noinline))              /* or GCC keeps the addresses of all tiles at once */

enum { TILE = 4, LANES = 4, PANEL = 16, BLOCK = 96 };

INLINE float32x4x4_t load_4(const void* weights, size_t i, int half) {
  if (!half) {
    const float* p = (const float*)weights + i; /* GCC copies each register of vld1q_f32_x4, but pairs these */
    return (float32x4x4_t){{vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}};
  }
  const uint16_t* p = (const uint16_t*)weights + i;
  const float16x8_t low = vreinterpretq_f16_u16(vld1q_u16(p)), high = vreinterpretq_f16_u16(vld1q_u16(p + 8));
  return (float32x4x4_t){{vcvt_f32_f16(vget_low_f16(low)), vcvt_high_f32_f16(low), vcvt_f32_f16(vget_low_f16(high)),
                          vcvt_high_f32_f16(high)}};
}

/* u [tokens][r] = ranks [j, j + 4 blocks). */
INLINE void ranks_tile(const float* x, size_t tokens, size_t d_in, const void* a, size_t j, size_t blocks, size_t r,
                       float* u, int half) {
  float32x4_t acc[TILE][2][4];
#pragma GCC unroll 4
  for (size_t t = 0; t < tokens; ++t) {
#pragma GCC unroll 8
    for (size_t k = 0; k < 4 * blocks; ++k) acc[t][k / 4][k % 4] = vdupq_n_f32(0.0f);
  }
  const size_t unroll = tokens == 1 ? 4 : 2;
  for (size_t i = 0; i < d_in; i += unroll * LANES) {
#pragma GCC unroll 4
    for (size_t step = 0; step < unroll; ++step) {
#pragma GCC unroll 2
      for (size_t block = 0; block < blocks; ++block) {
        const float32x4x4_t weights = load_4(a, (j + 4 * block) * d_in + 4 * (i + step * LANES), half);
#pragma GCC unroll 4
        for (size_t t = 0; t < tokens; ++t) {
          const float32x4_t v = vld1q_f32(x + t * d_in + i + step * LANES);
#pragma GCC unroll 4
          for (int k = 0; k < 4; ++k) acc[t][block][k] = vfmaq_f32(acc[t][block][k], weights.val[k], v);
        }
      }
    }
  }
#pragma GCC unroll 4
  for (size_t t = 0; t < tokens; ++t) {
#pragma GCC unroll 2
    for (size_t block = 0; block < blocks; ++block) {
      const float32x4_t* sum = acc[t][block];
      vst1q_f32(u + t * r + j + 4 * block, vpaddq_f32(vpaddq_f32(sum[0], sum[1]), vpaddq_f32(sum[2], sum[3])));
    }
  }
}

/* All ranks of one token. */
INLINE void ranks_of_token(const float* x, size_t d_in, const void* a, size_t begin, size_t end, float* u, int half) {
  size_t j = begin;
  for (; j + 8 <= end; j += 8) ranks_tile(x, 1, d_in, a, j, 2, 0, u, half);
  for (; j < end; j += 4) ranks_tile(x, 1, d_in, a, j, 1, 0, u, half);
}

/* y [tokens][d_out], outputs [o, o + 16 panels). */
INLINE void outputs_tile(const float* u, size_t tokens, size_t r, const void* b, size_t o, size_t panels, size_t d_out,
                         float* y, int half) {
  float32x4_t acc[TILE][8];
#pragma GCC unroll 4
  for (size_t t = 0; t < tokens; ++t) {
#pragma GCC unroll 8
    for (size_t k = 0; k < 4 * panels; ++k) acc[t][k] = vld1q_f32(y + t * d_out + o + LANES * k);
  }
  for (size_t j = 0; j < r; j += 4) {
    float32x4_t v[TILE];
#pragma GCC unroll 4
    for (size_t t = 0; t < tokens; ++t) v[t] = vld1q_f32(u + t * r + j);
#define RANK(lane)                                                                               \
  _Pragma("GCC unroll 2") for (size_t panel = 0; panel < panels; ++panel) {                      \
    const float32x4x4_t weights = load_4(b, (o + panel * PANEL) * r + (j + lane) * PANEL, half); \
    _Pragma("GCC unroll 4") for (size_t t = 0; t < tokens; ++t) {                                \
      _Pragma("GCC unroll 4") for (int k = 0; k < 4; ++k) acc[t][4 * panel + k] =                \
          vfmaq_laneq_f32(acc[t][4 * panel + k], weights.val[k], v[t], lane);                    \
    }                                                                                            \
  }
    RANK(0)
    RANK(1)
    RANK(2)
    RANK(3)
#undef RANK
  }
#pragma GCC unroll 4
  for (size_t t = 0; t < tokens; ++t) {
#pragma GCC unroll 8
    for (size_t k = 0; k < 4 * panels; ++k) vst1q_f32(y + t * d_out + o + LANES * k, acc[t][k]);
  }
}

/* All outputs of one token. */
INLINE void outputs_of_token(const float* u, size_t r, const void* b, size_t begin, size_t end, float* y, int half) {
  for (size_t o = begin; o < end; o += 2 * PANEL) outputs_tile(u, 1, r, b, o, 2, 0, y, half);
}

#define TILES(tokens, name, half)                                                                        \
  APART void ranks_##name(const float* x, size_t d_in, const void* a, size_t j, size_t r, float* u) {    \
    ranks_tile(x, tokens, d_in, a, j, 1, r, u, half);                                                    \
  }                                                                                                      \
  APART void outputs_##name(const float* u, size_t r, const void* b, size_t o, size_t d_out, float* y) { \
    outputs_tile(u, tokens, r, b, o, 1, d_out, y, half);                                                 \
  }

TILES(TILE, 4t_fp32, 0)
TILES(2, 2t_fp32, 0)
TILES(TILE, 4t_fp16, 1)
TILES(2, 2t_fp16, 1)

INLINE void dense_lora(const float* x, size_t tokens, size_t d_in, size_t d_out, size_t r, const void* a, const void* b,
                       float* y, int half) {
  float u[BLOCK * DENSE_LORA_MAX_RANK];
  for (size_t first = 0; first < tokens; first += BLOCK, x += BLOCK * d_in, y += BLOCK * d_out) {
    const size_t here = tokens - first < BLOCK ? tokens - first : BLOCK, even = here / 2 * 2, odd = here - even;
    for (size_t j = 0; j < r; j += 4) {
      size_t t = 0;
      for (; t + TILE <= even; t += TILE)
        (half ? ranks_4t_fp16 : ranks_4t_fp32)(x + t * d_in, d_in, a, j, r, u + t * r);
      for (; t < even; t += 2) (half ? ranks_2t_fp16 : ranks_2t_fp32)(x + t * d_in, d_in, a, j, r, u + t * r);
    }
    if (odd) ranks_of_token(x + even * d_in, d_in, a, 0, r, u + even * r, half);
    for (size_t o = 0; o < d_out && even != 0; o += PANEL) {
      size_t t = 0;
      for (; t + TILE <= even; t += TILE) {
        (half ? outputs_4t_fp16 : outputs_4t_fp32)(u + t * r, r, b, o, d_out, y + t * d_out);
      }
      for (; t < even; t += 2) (half ? outputs_2t_fp16 : outputs_2t_fp32)(u + t * r, r, b, o, d_out, y + t * d_out);
    }
    if (odd) outputs_of_token(u + even * r, r, b, 0, d_out, y + even * d_out, half);
  }
}

void dense_lora_fp32(const float* x, size_t tokens, size_t d_in, size_t d_out, size_t r, const float* a, const float* b,
                     float* y) {
  dense_lora(x, tokens, d_in, d_out, r, a, b, y, 0);
}

void dense_lora_fp16(const float* x, size_t tokens, size_t d_in, size_t d_out, size_t r, const uint16_t* a,
                     const uint16_t* b, float* y) {
  dense_lora(x, tokens, d_in, d_out, r, a, b, y, 1);
}

void dense_lora_ranks_fp32(const float* x, size_t d_in, const float* a, size_t begin, size_t end, float* u) {
  ranks_of_token(x, d_in, a, begin, end, u, 0);
}

void dense_lora_ranks_fp16(const float* x, size_t d_in, const uint16_t* a, size_t begin, size_t end, float* u) {
  ranks_of_token(x, d_in, a, begin, end, u, 1);
}

void dense_lora_outputs_fp32(const float* u, size_t r, const float* b, size_t begin, size_t end, float* y) {
  outputs_of_token(u, r, b, begin, end, y, 0);
}

void dense_lora_outputs_fp16(const float* u, size_t r, const uint16_t* b, size_t begin, size_t end, float* y) {
  outputs_of_token(u, r, b, begin, end, y, 1);
}

#define PACK(type, name)                                                                                        \
  void name(const type* a_t, const type* b_t, size_t d_in, size_t d_out, size_t r, type* a, type* b) {          \
    for (size_t j = 0; j < r; ++j) {                                                                            \
      for (size_t i = 0; i < d_in; ++i) {                                                                       \
        a[j / 4 * 4 * d_in + i / LANES * 4 * LANES + j % 4 * LANES + i % LANES] = a_t[i * r + j];               \
      }                                                                                                         \
      for (size_t o = 0; o < d_out; ++o) b[o / PANEL * PANEL * r + j * PANEL + o % PANEL] = b_t[j * d_out + o]; \
    }                                                                                                           \
  }

PACK(float, dense_lora_pack_fp32)
PACK(uint16_t, dense_lora_pack_fp16)
