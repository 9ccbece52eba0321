/* NEON: scales, dtypes and the tiles of many tokens. neon_inputs.c and neon_ranks.c have those of few. */
#if defined(__aarch64__) /* some builds hand every file to every CPU's compiler */
#include "neon.h"

#define WIDTH 4
typedef float32x4_t vector;

UNROLLED void transpose(vector v[4]) {
  const float32x4_t a = vtrn1q_f32(v[0], v[1]), b = vtrn2q_f32(v[0], v[1]);
  const float32x4_t c = vtrn1q_f32(v[2], v[3]), d = vtrn2q_f32(v[2], v[3]);
  v[0] = vreinterpretq_f32_f64(vtrn1q_f64(vreinterpretq_f64_f32(a), vreinterpretq_f64_f32(c)));
  v[1] = vreinterpretq_f32_f64(vtrn1q_f64(vreinterpretq_f64_f32(b), vreinterpretq_f64_f32(d)));
  v[2] = vreinterpretq_f32_f64(vtrn2q_f64(vreinterpretq_f64_f32(a), vreinterpretq_f64_f32(c)));
  v[3] = vreinterpretq_f32_f64(vtrn2q_f64(vreinterpretq_f64_f32(b), vreinterpretq_f64_f32(d)));
}

#include "token_tables.h"

/*
 * Full tiles of 32 tokens and fp32, faster than what compilers make of token_tables.h, and bitwise the same.
 */

/* acc += an entry for 32 tokens. */
UNROLLED void add_entry(const float* entry, vector acc[8]) {
  vector v[8];
  __asm__(
      "ldp %q[v0], %q[v1], [%[entry]]\n\tldp %q[v2], %q[v3], [%[entry], #32]\n\t"
      "ldp %q[v4], %q[v5], [%[entry], #64]\n\tldp %q[v6], %q[v7], [%[entry], #96]\n\t"
      : [v0] "=&w"(v[0]), [v1] "=&w"(v[1]), [v2] "=&w"(v[2]), [v3] "=&w"(v[3]), [v4] "=&w"(v[4]), [v5] "=&w"(v[5]),
        [v6] "=&w"(v[6]), [v7] "=&w"(v[7])
      : [entry] "r"(entry), "m"(*(const float (*)[LORDBA_TOKENS])entry));
#pragma GCC unroll 8
  for (int c = 0; c < 8; ++c) acc[c] += v[c];
}

/* One row of signs over 8 columns; `bytes` is 2 or 8. */
UNROLLED void sum_row(const float* tables, const uint8_t* signs, size_t bytes, bool add, float* sums) {
  uint64_t word = load_word(signs, bytes);
  vector acc[8];
#pragma GCC unroll 8
  for (int c = 0; c < 8; ++c) acc[c] = load(tables + (word & 15) * LORDBA_TOKENS + c * WIDTH);
#pragma GCC unroll 16
  for (size_t group = 1; group < 2 * bytes; ++group) {
    tables += LORDBA_TABLE;
    add_entry(tables + (word >> 4 * group & 15) * LORDBA_TOKENS, acc);
  }
#pragma GCC unroll 8
  for (int c = 0; c < 8; ++c) {
    float* sum = sums + c * WIDTH;
    store(sum, add ? load(sum) + acc[c] : acc[c]);
  }
}

static void sum_tables_32t_neon(const float* tables, size_t tokens, const uint8_t* signs, size_t row_bytes,
                                size_t bytes, size_t rows, bool add, float* sums) {
  if (tokens <= 4 * WIDTH) {
    sum_tables(tables, tokens, signs, row_bytes, bytes, rows, add, sums);
    return;
  }
  for (size_t row = 0; row < rows; ++row, signs += row_bytes, sums += LORDBA_TOKENS) {
    if (bytes == 8) {
      sum_row(tables, signs, 8, add, sums);
    } else if (bytes == 2) {
      sum_row(tables, signs, 2, add, sums);
    } else if (bytes == 4) {
      sum_row(tables, signs, 4, add, sums);
    } else {
      sum_row(tables, signs, bytes, add, sums);
    }
  }
}

/* 4 inputs of 8 tokens at once: both halves of an entry's 8 lanes are stored together. */
static void input_tables_8t_neon(const void* x, size_t x_stride, lordba_dtype dtype, size_t tokens, size_t n,
                                 const float* s_in, float* tables) {
  if (dtype != LORDBA_F32 || tokens % 8 != 0 || n % 8 != 0) {
    input_tables(x, x_stride, dtype, tokens, n, s_in, tables);
    return;
  }
  for (size_t first = 0; first < tokens; first += 8) {
    const float *row = (const float*)x + first * x_stride, *scale = s_in;
    float* table = tables + first;
    for (const float* end = scale + n; scale != end; scale += 4, row += 4, table += LORDBA_TABLE) {
      vector v[2][4], sums[2][8];
      const vector s = load(scale);
#pragma GCC unroll 8
      for (int t = 0; t < 8; ++t) v[t / 4][t % 4] = load(row + (size_t)t * x_stride) * s;
#pragma GCC unroll 2
      for (int k = 0; k < 2; ++k) {
        transpose(v[k]);
        const vector a = v[k][0] + v[k][1], b = v[k][0] - v[k][1], c = v[k][2] + v[k][3], d = v[k][2] - v[k][3];
        const vector signed_sums[8] = {c + a, c - b, c + b, c - a, a - d, -(d + b), b - d, -(a + d)};
#pragma GCC unroll 8
        for (int e = 0; e < 8; ++e) sums[k][e] = signed_sums[e];
      }
#pragma GCC unroll 8
      for (int e = 0; e < 8; ++e) {
        store(table + e * LORDBA_TOKENS, sums[0][e]);
        store(table + e * LORDBA_TOKENS + WIDTH, sums[1][e]);
        store(table + (15 - e) * LORDBA_TOKENS, -sums[0][e]);
        store(table + (15 - e) * LORDBA_TOKENS + WIDTH, -sums[1][e]);
      }
    }
  }
}

/* 8 outputs of 4 tokens at once. */
static void store_4t_neon(const float* sums, size_t tokens, size_t n, const float* s_out, const void* base,
                          size_t base_stride, void* y, size_t y_stride, lordba_dtype dtype) {
  if (dtype != LORDBA_F32 || base == NULL || tokens % 4 != 0 || n % 8 != 0) {
    store_tokens(sums, tokens, n, s_out, base, base_stride, y, y_stride, dtype);
    return;
  }
  for (size_t first = 0; first < tokens; first += 4) {
    const float *sum = sums + first, *from = (const float*)base + first * base_stride;
    float* to = (float*)y + first * y_stride;
    for (size_t o = 0; o < n; o += 8, sum += 8 * LORDBA_TOKENS) {
      vector v[2][4], old[4][2];
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) v[i / 4][i % 4] = load(sum + i * LORDBA_TOKENS);
      const vector scale[2] = {load(s_out + o), load(s_out + o + 4)};
      transpose(v[0]);
      transpose(v[1]);
#pragma GCC unroll 4
      for (int t = 0; t < 4; ++t) {
        old[t][0] = load(from + (size_t)t * base_stride + o);
        old[t][1] = load(from + (size_t)t * base_stride + o + 4);
      }
#pragma GCC unroll 4
      for (int t = 0; t < 4; ++t) {
        store(to + (size_t)t * y_stride + o, old[t][0] + v[0][t] * scale[0]);
        store(to + (size_t)t * y_stride + o + 4, old[t][1] + v[1][t] * scale[1]);
      }
    }
  }
}

/* The floats of 16 codes: each byte of the 16 meanings is a table of its own. */
UNROLLED void store_meanings(uint8x16x4_t meaning, uint8x16_t codes, float* out) {
  uint8x16x4_t bytes;
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) bytes.val[k] = vqtbl1q_u8(meaning.val[k], codes);
  vst4q_u8((uint8_t*)out, bytes);
}

/* 32 codes at a time, written by hand: ST4 wants neighbouring registers, which GCC reaches by copies. */
static void decode_pairs(uint8x16x4_t meaning, const uint8_t* pairs, size_t blocks, float* out) {
  if (blocks == 0) return;
  __asm__ volatile(
      "1:\n\t"
      "ld1 {v16.16b}, [%[pairs]], #16\n\t"
      "subs %[blocks], %[blocks], #1\n\t"
      "and v17.16b, v16.16b, %[nibble].16b\n\t"
      "ushr v16.16b, v16.16b, #4\n\t"
      "zip1 v18.16b, v17.16b, v16.16b\n\t"
      "zip2 v19.16b, v17.16b, v16.16b\n\t"
      "tbl v20.16b, {%[byte0].16b}, v18.16b\n\ttbl v21.16b, {%[byte1].16b}, v18.16b\n\t"
      "tbl v22.16b, {%[byte2].16b}, v18.16b\n\ttbl v23.16b, {%[byte3].16b}, v18.16b\n\t"
      "tbl v24.16b, {%[byte0].16b}, v19.16b\n\ttbl v25.16b, {%[byte1].16b}, v19.16b\n\t"
      "tbl v26.16b, {%[byte2].16b}, v19.16b\n\ttbl v27.16b, {%[byte3].16b}, v19.16b\n\t"
      "st4 {v20.16b-v23.16b}, [%[out]], #64\n\t"
      "st4 {v24.16b-v27.16b}, [%[out]], #64\n\t"
      "b.ne 1b\n\t"
      : [pairs] "+r"(pairs), [blocks] "+r"(blocks), [out] "+r"(out)
      : [nibble] "w"(vdupq_n_u8(15)), [byte0] "w"(meaning.val[0]), [byte1] "w"(meaning.val[1]),
        [byte2] "w"(meaning.val[2]), [byte3] "w"(meaning.val[3])
      : "memory", "cc", "v16", "v17", "v18", "v19", "v20", "v21", "v22", "v23", "v24", "v25", "v26", "v27");
}

static size_t decode_log4(const lordba_scales* scales, size_t begin, size_t n, float* out) {
  const uint8_t* values = scales->values + begin / 2;
  const uint8x16x4_t meaning = vld4q_u8(scales->meaning);
  size_t i = n / 32 * 32;
  decode_pairs(meaning, values, n / 32, out);
  if (i + 16 <= n) {
    const uint8x8_t pairs = vld1_u8(values + i / 2);
    const uint8x8x2_t codes = vzip_u8(vand_u8(pairs, vdup_n_u8(15)), vshr_n_u8(pairs, 4));
    store_meanings(meaning, vcombine_u8(codes.val[0], codes.val[1]), out + i);
    i += 16;
  }
  return i;
}

static size_t decode_int8(const lordba_scales* scales, size_t begin, size_t n, float* out) {
  const float lo = lordba_load_f32(scales->meaning), step = lordba_load_f32(scales->meaning + 4);
  size_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const uint16x8_t codes = vmovl_u8(vld1_u8(scales->values + begin + i));
    const uint32x4_t code[2] = {vmovl_u16(vget_low_u16(codes)), vmovl_high_u16(codes)};
    for (int k = 0; k < 2; ++k) {
      const float32x4_t above = vcvtq_f32_s32(vsubq_s32(vreinterpretq_s32_u32(code[k]), vdupq_n_s32(1)));
      const float32x4_t value = vaddq_f32(vdupq_n_f32(lo), vmulq_n_f32(above, step));
      vst1q_f32(out + i + 4 * k,
                vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(value), vtstq_u32(code[k], code[k]))));
    }
  }
  return i;
}

/* Vector loads stop before the end of the stored scales; the rest goes through the reference twin. */
static void decode_neon(const lordba_scales* scales, size_t begin, size_t n, float* out) {
  size_t i = 0;
  switch (scales->code) {
    case LORDBA_FP32:
      for (; i + 4 <= n; i += 4) store(out + i, load_n(scales->values, LORDBA_F32, begin + i, 4));
      break;
    case LORDBA_FP16:
      for (; i + 4 <= n; i += 4) store(out + i, load_n(scales->values, LORDBA_F16, begin + i, 4));
      break;
    case LORDBA_INT8:
      i = decode_int8(scales, begin, n, out);
      break;
    case LORDBA_LOG4:
      i = decode_log4(scales, begin, n, out);
      break;
  }
  if (i < n) lordba_kernels_scalar.decode(scales, begin + i, n - i, out + i);
}

const lordba_kernels lordba_kernels_neon = {
    .name = "neon",
    .rate_decode = 20000,
    .rate_prefill = 20000,
    .rank_lanes_up_to = 16, /* by the count of instructions */
    .decode = decode_neon,
    .pack_a = lordba_pack_a_neon,
    .sum_inputs = lordba_sum_inputs_neon,
    .sum_ranks = lordba_sum_ranks_neon,
    .input_tables = input_tables_8t_neon,
    .rank_tables = rank_tables,
    .sum_tables = sum_tables_32t_neon,
    .store = store_4t_neon,
};

const lordba_kernels lordba_kernels_i8mm = {
    .name = "i8mm",
    .rate_decode = 20000,
    .rate_prefill = 20000,
    .rank_lanes_up_to = 16, /* by the count of instructions */
    .decode = decode_neon,
    .pack_a = lordba_pack_a_neon,
    .sum_inputs = lordba_sum_inputs_i8mm,
    .sum_ranks = lordba_sum_ranks_neon,
    .input_tables = input_tables_8t_neon,
    .rank_tables = rank_tables,
    .sum_tables = sum_tables_32t_neon,
    .store = store_4t_neon,
};

#endif
