/*
 * NEON with products of 8-bit matrices, stage 1 of few tokens: no tables, signs become masks of the values' planes.
 *
 * Values are rounded as in neon_inputs.c and cut into three planes of bytes. SMMLA multiplies two rows of 8 bytes by
 * two others: here one plane of two tokens by the masks of two ranks. 8 bytes of a row of signs are 64 inputs; CMTST
 * makes the masks of bit k of each byte, inputs 8 i + k, so that is how a plane is ordered. A mask is -1 where the sign
 * is: the signed sum is the sum of all plus twice what SMMLA adds up. It is exact, as are the sums of the tables in
 * neon_inputs.c, so the two agree bit by bit, and a token alone, or too spread out for three planes, takes the tables.
 */
#if defined(__aarch64__) /* some builds hand every file to every CPU's compiler */
#include "neon_inputs.h"

#if defined(__clang__) /* where no flag of this file's own says so */
#pragma clang attribute push(__attribute__((target("i8mm"))), apply_to = function)
#endif

enum {
  SPAN = 64, /* inputs whose signs fill 8 bytes */
  SPANS = LORDBA_CHUNK / SPAN,
  SPAN_PLANES = SPAN * 3 * 2, /* bytes: for each two bits, planes 0 and 1 of token 0, of token 1, then 2 of each */
};

/* Two tokens, rounded: the sum of a token's integers, and what one of them is worth. */
typedef struct {
  uint8_t planes[SPANS * SPAN_PLANES];
  int32_t total[2];
  float unit[2];
} token_pair;

/* 16 values become integers, then a vector of each plane. */
#define ROUND_16(plane0, plane1, plane2)                                                                 \
  "ld1 {v16.4s-v19.4s}, [%[v]], #64\n\t"                                                                 \
  "fmul v16.4s, v16.4s, %[scale].4s\n\tfmul v17.4s, v17.4s, %[scale].4s\n\t"                             \
  "fmul v18.4s, v18.4s, %[scale].4s\n\tfmul v19.4s, v19.4s, %[scale].4s\n\t"                             \
  "fcvtns v16.4s, v16.4s\n\tfcvtns v17.4s, v17.4s\n\tfcvtns v18.4s, v18.4s\n\tfcvtns v19.4s, v19.4s\n\t" \
  "tbl " plane0 ".16b, {v16.16b-v19.16b}, %[index0].16b\n\ttbl " plane1                                  \
  ".16b, {v16.16b-v19.16b}, %[index1].16b"                                                               \
  "\n\ttbl " plane2                                                                                      \
  ".16b, {v16.16b-v19.16b}, %[index2].16b\n\t"                                                           \
  "add v16.4s, v16.4s, v17.4s\n\tadd v18.4s, v18.4s, v19.4s\n\t"                                         \
  "add %[total].4s, %[total].4s, v16.4s\n\tadd %[total].4s, %[total].4s, v18.4s\n\t"
#define STORE_2_BITS(order, at_low, at_high)                                                                       \
  "tbl v0.16b, {v20.16b-v23.16b}, " order ".16b\n\ttbl v1.16b, {v24.16b-v27.16b}, " order                          \
  ".16b\n\t"                                                                                                       \
  "tbl v2.16b, {v28.16b-v31.16b}, " order ".16b\n\tstp q0, q1, [%[low], " at_low "]\n\tstr q2, [%[high], " at_high \
  "]\n\t"

/* The planes of token `token` of a pair; returns the sum of its integers. v is in the order of scale_columns. */
static int32_t make_planes_of(const float* v, size_t spans, float scale, size_t token, uint8_t* planes) {
  static const uint8_t order[4][16] = {
      {0, 8, 16, 24, 32, 40, 48, 56, 1, 9, 17, 25, 33, 41, 49, 57},
      {4, 12, 20, 28, 36, 44, 52, 60, 5, 13, 21, 29, 37, 45, 53, 61},
      {2, 10, 18, 26, 34, 42, 50, 58, 3, 11, 19, 27, 35, 43, 51, 59},
      {6, 14, 22, 30, 38, 46, 54, 62, 7, 15, 23, 31, 39, 47, 55, 63},
  };
  const uint8x16_t index0 = {0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60};
  uint8_t *low = planes + 32 * token, *high = planes + 64 + 16 * token;
  int32x4_t total = vdupq_n_s32(0);
  __asm__ volatile(
      "ld1 {v4.16b-v7.16b}, [%[order]]\n\t"
      "1:\n\t" ROUND_16("v20", "v24", "v28") ROUND_16("v21", "v25", "v29") ROUND_16("v22", "v26", "v30")
          ROUND_16("v23", "v27", "v31") STORE_2_BITS("v4", "#0", "#0") STORE_2_BITS("v5", "#96", "#96")
              STORE_2_BITS("v6", "#192", "#192") STORE_2_BITS("v7", "#288", "#288")
      "subs %[spans], %[spans], #1\n\tadd %[low], %[low], #384\n\tadd %[high], %[high], #384\n\t"
      "b.ne 1b\n\t"
      : [v] "+r"(v), [spans] "+r"(spans), [low] "+r"(low), [high] "+r"(high), [total] "+w"(total)
      : [order] "r"(order), [scale] "w"(vdupq_n_f32(scale)), [index0] "w"(index0),
        [index1] "w"(vaddq_u8(index0, vdupq_n_u8(1))), [index2] "w"(vaddq_u8(index0, vdupq_n_u8(2)))
      : "memory", "cc", "v0", "v1", "v2", "v4", "v5", "v6", "v7", "v16", "v17", "v18", "v19", "v20", "v21", "v22",
        "v23", "v24", "v25", "v26", "v27", "v28", "v29", "v30", "v31");
  return vaddvq_s32(total);
}

/* Words as packed, 16 inputs of all ranks after one another, become the 8 bytes of each rank, span by span. */
static void make_rows(const uint8_t* words, size_t columns, size_t lanes, uint8_t* rows) {
  const size_t stride = lanes * sizeof(uint16_t);
  for (size_t c = 0; c < columns; c += 4, words += 4 * stride) {
    for (size_t j = 0; j < stride; j += 16, rows += 64) {
      uint16x8x4_t four;
#pragma GCC unroll 4
      for (size_t k = 0; k < 4; ++k) {
        four.val[k] = c + k < columns ? vreinterpretq_u16_u8(vld1q_u8(words + k * stride + j)) : vdupq_n_u16(0);
      }
      vst4q_u16((uint16_t*)rows, four);
    }
  }
}

/* v24 to v31: one bit each. */
#define MAKE_BITS                                                                    \
  "movi v24.16b, #1\n\tmovi v25.16b, #2\n\tmovi v26.16b, #4\n\tmovi v27.16b, #8\n\t" \
  "movi v28.16b, #16\n\tmovi v29.16b, #32\n\tmovi v30.16b, #64\n\tmovi v31.16b, #128\n\t"
#define ZEROS(p) "movi %[a" p "].4s, #0\n\tmovi %[b" p "].4s, #0\n\tmovi %[c" p "].4s, #0\n\tmovi %[d" p "].4s, #0\n\t"
#define CLOBBERED                                                                                                      \
  "memory", "cc", "v0", "v1", "v2", "v3", "v16", "v17", "v18", "v19", "v20", "v21", "v22", "v23", "v24", "v25", "v26", \
      "v27", "v28", "v29", "v30", "v31"

/* Bit k of two ranks' 8 bytes, for two tokens: acc += mask * plane, for each of three planes. */
#define ADD_RANKS(row, bit, mask, plane0, plane1, plane2, acc)                                                 \
  "cmtst " mask ".16b, " row ".16b, " bit ".16b\n\tusmmla %[" acc "0].4s, " plane0 ".16b, " mask               \
  ".16b\n\tusmmla %[" acc "1].4s, " plane1 ".16b, " mask ".16b\n\tsmmla %[" acc "2].4s, " plane2 ".16b, " mask \
  ".16b\n\t"
#define ADD_8_RANKS(bit, plane0, plane1, plane2)           \
  ADD_RANKS("v0", bit, "v22", plane0, plane1, plane2, "a") \
  ADD_RANKS("v1", bit, "v23", plane0, plane1, plane2, "b") \
  ADD_RANKS("v2", bit, "v22", plane0, plane1, plane2, "c") ADD_RANKS("v3", bit, "v23", plane0, plane1, plane2, "d")
#define ADD_2_BITS(bit0, bit1)                                                                       \
  "ld4 {v16.2d-v19.2d}, [%[planes]], #64\n\tld2 {v20.2d, v21.2d}, [%[planes]], #32\n\t" ADD_8_RANKS( \
      bit0, "v16", "v18", "v20") ADD_8_RANKS(bit1, "v17", "v19", "v21")

/* 8 ranks of two tokens: acc[k][p] are ranks 2 k and 2 k + 1 of plane p, token by token. */
UNROLLED void multiply_pair(const uint8_t* planes, size_t spans, const uint8_t* rows, size_t stride,
                            int32x4_t acc[4][3]) {
  __asm__ volatile(
      MAKE_BITS ZEROS("0") ZEROS("1")
          ZEROS("2") "1:\n\tld1 {v0.16b-v3.16b}, [%[rows]], %[stride]\n\tsubs %[spans], %[spans], #1\n\t" ADD_2_BITS(
              "v24", "v25") ADD_2_BITS("v26", "v27") ADD_2_BITS("v28", "v29") ADD_2_BITS("v30", "v31") "b.ne 1b\n\t"
      : [planes] "+r"(planes), [rows] "+r"(rows), [spans] "+r"(spans), [a0] "=&w"(acc[0][0]), [a1] "=&w"(acc[0][1]),
        [a2] "=&w"(acc[0][2]), [b0] "=&w"(acc[1][0]), [b1] "=&w"(acc[1][1]), [b2] "=&w"(acc[1][2]),
        [c0] "=&w"(acc[2][0]), [c1] "=&w"(acc[2][1]), [c2] "=&w"(acc[2][2]), [d0] "=&w"(acc[3][0]),
        [d1] "=&w"(acc[3][1]), [d2] "=&w"(acc[3][2])
      : [stride] "r"(stride)
      : CLOBBERED);
}

UNROLLED int32x4_t join_planes(int32x4_t plane0, int32x4_t plane1, int32x4_t plane2) {
  return vmlaq_n_s32(vmlaq_n_s32(plane0, plane1, 1 << 8), plane2, 1 << 16);
}

UNROLLED float32x4_t signed_sums(int32x4_t total, int32x4_t masked, float32x4_t unit) {
  return vmulq_f32(vcvtq_f32_s32(vaddq_s32(total, vshlq_n_s32(masked, 1))), unit);
}

static void sum_pair(const token_pair* pair, size_t spans, const uint8_t* rows, size_t lanes, float* sums,
                     size_t sums_stride) {
  const int32x4_t total = vcombine_s32(vdup_n_s32(pair->total[0]), vdup_n_s32(pair->total[1]));
  const float32x4_t unit = vcombine_f32(vdup_n_f32(pair->unit[0]), vdup_n_f32(pair->unit[1]));
  for (size_t j = 0; j < lanes; j += 8) {
    int32x4_t acc[4][3];
    multiply_pair(pair->planes, spans, rows + 8 * j, 8 * lanes, acc);
    float64x2_t two[4]; /* ranks of each token */
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      two[k] = vreinterpretq_f64_f32(signed_sums(total, join_planes(acc[k][0], acc[k][1], acc[k][2]), unit));
    }
#pragma GCC unroll 2
    for (int k = 0; k < 2; ++k) {
      float* sum = sums + j + 4 * k;
      vst1q_f32(sum, vreinterpretq_f32_f64(vzip1q_f64(two[2 * k], two[2 * k + 1])));
      vst1q_f32(sum + sums_stride, vreinterpretq_f32_f64(vzip2q_f64(two[2 * k], two[2 * k + 1])));
    }
  }
}

/* Rounds one of a pair; false: three planes cannot hold it. */
static bool make_token(token_pair* pair, size_t token, const void* x, lordba_dtype dtype, size_t start, size_t n,
                       const float* s_in) {
  const size_t columns = (n + COLUMN - 1) / COLUMN, spans = (n + SPAN - 1) / SPAN;
  float v[LORDBA_CHUNK], widened[LORDBA_CHUNK], largest;
  const float squares = scale_inputs(as_floats(x, dtype, start, n, widened), n, s_in, v, &largest);
  const float scale = scale_of_3_planes(squares, largest, columns);
  if (scale == 0.0f) return false;
  for (size_t i = columns * COLUMN; i < spans * SPAN; i += 4) vst1q_f32(v + i, vdupq_n_f32(0.0f));
  pair->total[token] = make_planes_of(v, spans, scale, token, pair->planes);
  pair->unit[token] = 1.0f / scale;
  return true;
}

/* Two tokens or more. */
APART void sum_pairs(const void* x, size_t x_stride, lordba_dtype dtype, size_t tokens, size_t n, const float* s_in,
                     const uint32_t* words, size_t blocks, float* sums, size_t sums_stride) {
  const size_t lanes = blocks * LORDBA_LANES, spans = (n + SPAN - 1) / SPAN, size = lordba_element_bytes(dtype);
  uint8_t rows[SPANS * 8 * LORDBA_MAX_RANKS];
  make_rows((const uint8_t*)words, (n + COLUMN - 1) / COLUMN, lanes, rows);
  for (size_t t = 0; t < tokens; t += 2, sums += 2 * sums_stride) {
    const bool two = t + 1 < tokens;
    token_pair pair;
    if (two && make_token(&pair, 0, x, dtype, t * x_stride, n, s_in) &&
        make_token(&pair, 1, x, dtype, (t + 1) * x_stride, n, s_in)) {
      sum_pair(&pair, spans, rows, lanes, sums, sums_stride);
    } else {
      const uint8_t* first = (const uint8_t*)x + t * x_stride * size;
      lordba_sum_inputs_neon(first, x_stride, dtype, two ? 2 : 1, n, s_in, words, blocks, sums, sums_stride);
    }
  }
}

void lordba_sum_inputs_i8mm(const void* x, size_t x_stride, lordba_dtype dtype, size_t tokens, size_t n,
                            const float* s_in, const uint32_t* words, size_t blocks, float* sums, size_t sums_stride) {
  if (tokens == 1) {
    lordba_sum_inputs_neon(x, x_stride, dtype, 1, n, s_in, words, blocks, sums, sums_stride);
  } else {
    sum_pairs(x, x_stride, dtype, tokens, n, s_in, words, blocks, sums, sums_stride);
  }
}

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
