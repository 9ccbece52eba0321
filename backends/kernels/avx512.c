/* AVX-512. Few tokens: a table of the 16 signed sums of 4 values fills one register, and one permute looks it up for 16
 * ranks or outputs. Many tokens: token_tables.h. */
#include <immintrin.h>

#define WIDTH 16
typedef float vector __attribute__((vector_size(64)));

#include "tiles.h"

#define UNROLLED static inline __attribute__((always_inline))

/* The lowest n of 16 lanes. */
static inline __mmask16 lanes_below(size_t n) { return n < 16 ? (__mmask16)((1u << n) - 1) : (__mmask16)0xffff; }

UNROLLED vector load_n(const void* p, lordba_dtype dtype, size_t i, size_t n) {
  const __mmask16 mask = lanes_below(n);
  if (dtype == LORDBA_F32) return (vector)_mm512_maskz_loadu_ps(mask, (const float*)p + i);
  const __m256i half = _mm256_maskz_loadu_epi16(mask, (const uint16_t*)p + i);
  if (dtype == LORDBA_F16) return (vector)_mm512_cvtph_ps(half);
  return (vector)_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

/* The numbers of the upper 16-bit half of each 32-bit lane. */
UNROLLED __m512i upper_halves(void) {
  const __m256i pairs =
      _mm256_setr_epi32(0x00030001, 0x00070005, 0x000b0009, 0x000f000d, 0x00130011, 0x00170015, 0x001b0019, 0x001f001d);
  return _mm512_zextsi256_si512(pairs);
}

UNROLLED void store_n(void* p, lordba_dtype dtype, size_t i, size_t n, vector v) {
  const __mmask16 mask = lanes_below(n);
  if (dtype == LORDBA_F32) {
    _mm512_mask_storeu_ps((float*)p + i, mask, (__m512)v);
    return;
  }
  __m256i half = _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
  if (dtype == LORDBA_BF16) {
    /* Round to nearest, ties to even, by integers: the bf16 instruction flushes subnormals. */
    const __m512i bits = _mm512_castps_si512((__m512)v);
    const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
    const __mmask16 nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
    __m512i rounded = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
    rounded = _mm512_mask_add_epi32(rounded, odd, bits, _mm512_set1_epi32(0x8000));
    rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
    half = _mm512_castsi512_si256(_mm512_permutexvar_epi16(upper_halves(), rounded));
  }
  _mm256_mask_storeu_epi16((uint16_t*)p + i, mask, half);
}

/* 16 x 16 words transposed in registers. */
UNROLLED void transpose_16(__m512i r[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512i a = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88), b = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
    const __m512i c = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
    const __m512i d = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
    t[i] = _mm512_shuffle_i32x4(a, c, 0x88);
    t[8 + i] = _mm512_shuffle_i32x4(a, c, 0xdd);
    t[4 + i] = _mm512_shuffle_i32x4(b, d, 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(b, d, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}

UNROLLED void transpose(vector rows[16]) { transpose_16((__m512i*)rows); }

static void decode_16_avx512(const lordba_scales* scales, size_t begin, size_t n, float* out) {
  const uint8_t* values = scales->values;
  switch (scales->code) {
    case LORDBA_FP32:
      for (size_t i = 0; i < n; i += 16) {
        _mm512_storeu_ps(out + i, _mm512_maskz_loadu_ps(lanes_below(n - i), values + 4 * (begin + i)));
      }
      break;
    case LORDBA_FP16:
      for (size_t i = 0; i < n; i += 16) {
        const __m256i half = _mm256_maskz_loadu_epi16(lanes_below(n - i), values + 2 * (begin + i));
        _mm512_storeu_ps(out + i, _mm512_cvtph_ps(half));
      }
      break;
    case LORDBA_INT8: {
      const __m512 lo = _mm512_set1_ps(lordba_load_f32(scales->meaning));
      const __m512 step = _mm512_set1_ps(lordba_load_f32(scales->meaning + 4));
      for (size_t i = 0; i < n; i += 16) {
        const __m512i code = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(lanes_below(n - i), values + begin + i));
        const __m512 above = _mm512_cvtepi32_ps(_mm512_sub_epi32(code, _mm512_set1_epi32(1)));
        _mm512_storeu_ps(out + i, _mm512_maskz_fmadd_ps(_mm512_test_epi32_mask(code, code), above, step, lo));
      }
      break;
    }
    case LORDBA_LOG4: {
      const __m512 table = _mm512_loadu_ps(scales->meaning);
      /* Each byte in the low half of 8 bytes, its high nibble in the upper half: only 4 bits of an index count. */
      const uint8_t* codes = values + begin / 2;
      for (size_t i = 0; i < n; i += 16, codes += 8) {
        const __m128i pairs = n - i >= 16 ? _mm_loadl_epi64((const __m128i*)codes)
                                          : _mm_maskz_loadu_epi8(lanes_below((n - i + 1) / 2), codes);
        const __m512i wide = _mm512_cvtepu8_epi64(pairs);
        _mm512_storeu_ps(out + i, _mm512_permutexvar_ps(_mm512_or_si512(wide, _mm512_slli_epi64(wide, 28)), table));
      }
      break;
    }
  }
}

static void pack_a_16r_avx512(const uint8_t* a, size_t row_bytes, size_t rows, size_t bytes, size_t blocks,
                              uint32_t* words) {
  const __mmask64 used = bytes < 64 ? ((__mmask64)1 << bytes) - 1 : ~(__mmask64)0;
  for (size_t block = 0; block < blocks; ++block) {
    __m512i row[16];
#pragma GCC unroll 16
    for (size_t j = 0; j < 16; ++j) {
      const size_t rank = 16 * block + j;
      row[j] = rank < rows ? _mm512_maskz_loadu_epi8(used, a + rank * row_bytes) : _mm512_setzero_si512();
    }
    transpose_16(row);
#pragma GCC unroll 16
    for (size_t w = 0; w < 16; ++w) {
      if (4 * w < bytes) _mm512_storeu_si512(words + (w * blocks + block) * 16, row[w]);
    }
  }
}

/* +1 or -1 by bit `bit` of the lane's number: what a table entry does to its value number `bit`. */
UNROLLED __m512 sign_of_bit(int bit) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __mmask16 negative = _mm512_test_epi32_mask(lane, _mm512_set1_epi32(1 << bit));
  return _mm512_mask_blend_ps(negative, _mm512_set1_ps(1.0f), _mm512_set1_ps(-1.0f));
}

/* Of 16 inputs from input i on: lane 2p holds v[2p] + v[2p+1], lane 2p+1 the difference. */
UNROLLED __m512 sums_of_pairs(const void* x, size_t start, lordba_dtype dtype, size_t n, size_t i, const float* s_in) {
  const size_t at = start + i;
  __m512 value;
  if (i + 16 <= n) {
    value = (__m512)load_n(x, dtype, at, 16);
  } else {
    value = (__m512)load_n(x, dtype, at, i < n ? n - i : 0);
  }
  value = _mm512_mul_ps(value, _mm512_loadu_ps(s_in + i));
  return _mm512_fmadd_ps(_mm512_movehdup_ps(value), sign_of_bit(0), _mm512_moveldup_ps(value));
}

/* 16 inputs make 4 tables, each the sum of two permutations of +-(v0 + v1), +-(v0 - v1), ..., which all rank blocks
 * look up; two tokens share the numbers of the entries. The next 16 are prepared meanwhile: the chain is long. */
UNROLLED void sum_blocks(const void* x, size_t start, size_t x_stride, lordba_dtype dtype, int tokens, size_t n,
                         const float* s_in, const uint32_t* words, int blocks, float* sums, size_t sums_stride) {
  const int chains = tokens * blocks > 4 ? 1 : tokens * blocks > 1 ? 2 : 4; /* accumulators per token and block */
  const __m512 negative = _mm512_set1_ps(-0.0f);
  /* Entries of the pairs' sums by lane; 16 + lane names the same negated. */
  const __m512i ab = _mm512_setr_epi32(0, 17, 1, 16, 0, 17, 1, 16, 0, 17, 1, 16, 0, 17, 1, 16);
  const __m512i cd = _mm512_setr_epi32(2, 2, 2, 2, 19, 19, 19, 19, 3, 3, 3, 3, 18, 18, 18, 18);
  __m512 acc[2][4][4], next[2];
#pragma GCC unroll 2
  for (int t = 0; t < tokens; ++t) {
    next[t] = sums_of_pairs(x, start + t * x_stride, dtype, n, 0, s_in);
#pragma GCC unroll 4
    for (int b = 0; b < blocks; ++b) {
#pragma GCC unroll 4
      for (int c = 0; c < chains; ++c) acc[t][b][c] = _mm512_setzero_ps();
    }
  }
  for (size_t k = 0; k < n; k += 32) {
#pragma GCC unroll 2
    for (size_t half = 0; half < 2; ++half) {
      __m512 plus[2], less[2];
#pragma GCC unroll 2
      for (int t = 0; t < tokens; ++t) {
        plus[t] = next[t];
        less[t] = _mm512_xor_ps(plus[t], negative);
        const size_t i = k + 16 * half + 16;
        if (half == 0 || i < n) next[t] = sums_of_pairs(x, start + t * x_stride, dtype, n, i, s_in);
      }
#pragma GCC unroll 4
      for (int g = 0; g < 4; ++g) {
        const __m512i first = _mm512_set1_epi32(4 * g);
        const __m512i pick_ab = _mm512_add_epi32(ab, first), pick_cd = _mm512_add_epi32(cd, first);
        __m512 table[2];
#pragma GCC unroll 2
        for (int t = 0; t < tokens; ++t) {
          table[t] = _mm512_add_ps(_mm512_permutex2var_ps(plus[t], pick_ab, less[t]),
                                   _mm512_permutex2var_ps(plus[t], pick_cd, less[t]));
        }
#pragma GCC unroll 4
        for (int b = 0; b < blocks; ++b) {
          /* Permutes read 4 bits of an index: a load from byte k of the words shifts them by 8 k bits for nothing. */
          const uint8_t* word = (const uint8_t*)(words + (k / 32 * blocks + b) * 16) + 2 * half + g / 2;
          const __m512i byte = _mm512_loadu_si512(word), index = g % 2 ? _mm512_ror_epi32(byte, 4) : byte;
#pragma GCC unroll 2
          for (int t = 0; t < tokens; ++t) {
            __m512* sum = &acc[t][b][g % chains];
            *sum = _mm512_add_ps(*sum, _mm512_permutexvar_ps(index, table[t]));
          }
        }
      }
    }
  }
#pragma GCC unroll 2
  for (int t = 0; t < tokens; ++t) {
#pragma GCC unroll 4
    for (int b = 0; b < blocks; ++b) {
      __m512 sum = acc[t][b][0];
      if (chains > 1) sum = _mm512_add_ps(sum, acc[t][b][1]);
      if (chains > 2) sum = _mm512_add_ps(sum, _mm512_add_ps(acc[t][b][2], acc[t][b][3]));
      _mm512_storeu_ps(sums + t * sums_stride + 16 * b, sum);
    }
  }
}

UNROLLED void sum_pairs(const void* x, size_t x_stride, lordba_dtype dtype, size_t tokens, size_t n, const float* s_in,
                        const uint32_t* words, int blocks, float* sums, size_t sums_stride) {
  size_t t = 0;
  for (; t + 2 <= tokens; t += 2, sums += 2 * sums_stride) {
    sum_blocks(x, t * x_stride, x_stride, dtype, 2, n, s_in, words, blocks, sums, sums_stride);
  }
  if (t < tokens) sum_blocks(x, t * x_stride, x_stride, dtype, 1, n, s_in, words, blocks, sums, sums_stride);
}

UNROLLED void sum_ranks_of_x(const void* x, size_t x_stride, lordba_dtype dtype, size_t tokens, size_t n,
                             const float* s_in, const uint32_t* words, size_t blocks, float* sums, size_t sums_stride) {
  switch (blocks) {
    case 1:
      sum_pairs(x, x_stride, dtype, tokens, n, s_in, words, 1, sums, sums_stride);
      break;
    case 2:
      sum_pairs(x, x_stride, dtype, tokens, n, s_in, words, 2, sums, sums_stride);
      break;
    case 3:
      sum_pairs(x, x_stride, dtype, tokens, n, s_in, words, 3, sums, sums_stride);
      break;
    default:
      sum_pairs(x, x_stride, dtype, tokens, n, s_in, words, 4, sums, sums_stride);
  }
}

static void sum_inputs_16r_avx512(const void* x, size_t x_stride, lordba_dtype dtype, size_t tokens, size_t n,
                                  const float* s_in, const uint32_t* words, size_t blocks, float* sums,
                                  size_t sums_stride) {
  switch (dtype) {
    case LORDBA_F32:
      sum_ranks_of_x(x, x_stride, LORDBA_F32, tokens, n, s_in, words, blocks, sums, sums_stride);
      break;
    case LORDBA_F16:
      sum_ranks_of_x(x, x_stride, LORDBA_F16, tokens, n, s_in, words, blocks, sums, sums_stride);
      break;
    case LORDBA_BF16:
      sum_ranks_of_x(x, x_stride, LORDBA_BF16, tokens, n, s_in, words, blocks, sums, sums_stride);
      break;
  }
}

/* Where stage 2 finds and leaves what is not its tables, for one step of outputs. */
typedef struct {
  const uint8_t* b;
  size_t width; /* bytes of a row of B */
  bool upper;   /* the upper half of rows of 8 bytes */
  size_t n;
  const float *s_out, *carry_in;
  float* carry_out; /* carries of two tokens lie n apart */
  const void* base;
  size_t base_stride;
  void* y;
  size_t y_stride;
  lordba_dtype dtype;
} output_step;

/* Rotated right by 0 < bits < 32; shifts would compete with additions for units. */
UNROLLED __m512i rotated(__m512i words, int bits) {
  typedef uint32_t lanes __attribute__((vector_size(64)));
  return (__m512i)((lanes)words >> bits | (lanes)words << (32 - bits));
}

/* Words of 32 ranks for 16 outputs from output `o` on. */
UNROLLED __m512i load_words(const output_step* step, size_t o) {
  if (step->width == 1) return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(step->b + o)));
  if (step->width == 2) return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(step->b + 2 * o)));
  if (step->width == 4) return _mm512_loadu_si512(step->b + 4 * o);
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i pick = step->upper ? _mm512_add_epi32(even, _mm512_set1_epi32(1)) : even;
  return _mm512_permutex2var_epi32(_mm512_loadu_si512(step->b + 8 * o), pick, _mm512_loadu_si512(step->b + 8 * o + 64));
}

/* 16 outputs of one or two tokens: `lanes` of them exist; `plain`: there are no carries. */
UNROLLED void sum_16_outputs(const output_step* step, const __m512 table[2][8], int tokens, int groups, bool plain,
                             lordba_dtype dtype, size_t o, size_t lanes) {
  const float* const carry_in = plain ? NULL : step->carry_in;
  float* const carry_out = plain ? NULL : step->carry_out;
  const __m512i words = load_words(step, o);
  __m512 sum[2][2];
#pragma GCC unroll 8
  for (int g = 0; g < groups; ++g) {
    const __m512i index = g == 0 ? words : rotated(words, 4 * g);
#pragma GCC unroll 2
    for (int t = 0; t < tokens; ++t) {
      const __m512 value = _mm512_permutexvar_ps(index, table[t][g]);
      sum[t][g % 2] = g < 2 ? value : _mm512_add_ps(sum[t][g % 2], value);
    }
  }
  __m512 start[2];
#pragma GCC unroll 2
  for (int t = 0; t < tokens; ++t) {
    sum[t][0] = _mm512_add_ps(sum[t][0], sum[t][1]);
    if (carry_in) sum[t][0] = _mm512_add_ps(sum[t][0], (__m512)load_n(carry_in, LORDBA_F32, t * step->n + o, lanes));
    start[t] = step->base && !carry_out ? (__m512)load_n(step->base, dtype, t * step->base_stride + o, lanes)
                                        : _mm512_setzero_ps();
  }
  const __m512 scale = _mm512_loadu_ps(step->s_out + o);
#pragma GCC unroll 2
  for (int t = 0; t < tokens; ++t) {
    if (carry_out) {
      store_n(carry_out, LORDBA_F32, t * step->n + o, lanes, (vector)sum[t][0]);
    } else {
      store_n(step->y, dtype, t * step->y_stride + o, lanes, (vector)_mm512_fmadd_ps(sum[t][0], scale, start[t]));
    }
  }
}

/* `groups` tables of 4 ranks per token stay in registers; every 16 outputs look them up, two tokens the same entries.
 */
UNROLLED void sum_outputs(const output_step* step, const float* h, size_t h_stride, int tokens, int groups) {
  __m512 table[2][8];
#pragma GCC unroll 2
  for (int t = 0; t < tokens; ++t) {
#pragma GCC unroll 8
    for (int g = 0; g < groups; ++g) {
      const float* value = h + t * h_stride + 4 * g;
      const __m512 ab = _mm512_fmadd_ps(sign_of_bit(1), _mm512_set1_ps(value[1]),
                                        _mm512_mul_ps(sign_of_bit(0), _mm512_set1_ps(value[0])));
      const __m512 cd = _mm512_fmadd_ps(sign_of_bit(3), _mm512_set1_ps(value[3]),
                                        _mm512_mul_ps(sign_of_bit(2), _mm512_set1_ps(value[2])));
      table[t][g] = _mm512_add_ps(ab, cd);
    }
  }
  size_t o = 0;
  const size_t whole = step->n / 16 * 16;
  if (step->carry_in || step->carry_out) {
    for (; o < whole; o += 16) sum_16_outputs(step, table, tokens, groups, false, step->dtype, o, 16);
  } else if (step->dtype == LORDBA_F32) {
    for (; o < whole; o += 16) sum_16_outputs(step, table, tokens, groups, true, LORDBA_F32, o, 16);
  } else if (step->dtype == LORDBA_BF16) {
    for (; o < whole; o += 16) sum_16_outputs(step, table, tokens, groups, true, LORDBA_BF16, o, 16);
  }
  for (; o < step->n; o += 16) {
    sum_16_outputs(step, table, tokens, groups, false, step->dtype, o, step->n - o < 16 ? step->n - o : 16);
  }
}

/* One or two tokens; more than 32 ranks take two passes. */
UNROLLED void sum_tokens(output_step step, size_t ranks, const float* h, size_t h_stride, int tokens) {
  if (step.width == 1) {
    sum_outputs(&step, h, h_stride, tokens, 2);
  } else if (step.width == 2) {
    sum_outputs(&step, h, h_stride, tokens, 4);
  } else if (step.width == 4) {
    sum_outputs(&step, h, h_stride, tokens, 8);
  } else {
    float half[2 * LORDBA_OUTPUTS];
    output_step low = step;
    low.carry_out = half;
    sum_outputs(&low, h, h_stride, tokens, 8);
    step.carry_in = half;
    step.upper = true;
    if (ranks <= 48) { /* h has no more */
      sum_outputs(&step, h + 32, h_stride, tokens, 4);
    } else {
      sum_outputs(&step, h + 32, h_stride, tokens, 8);
    }
  }
}
static void sum_ranks_16o_avx512(const float* h, size_t h_stride, size_t tokens, size_t ranks, const uint8_t* b,
                                 size_t n, const float* s_out, const float* carry_in, float* carry_out,
                                 const void* base, size_t base_stride, void* y, size_t y_stride, lordba_dtype dtype) {
  output_step step = {.b = b,
                      .width = ranks <= 8    ? 1
                               : ranks <= 16 ? 2
                               : ranks <= 32 ? 4
                                             : 8,
                      .n = n,
                      .s_out = s_out,
                      .carry_in = carry_in,
                      .carry_out = carry_out,
                      .base = base,
                      .base_stride = base_stride,
                      .y = y,
                      .y_stride = y_stride,
                      .dtype = dtype};
  const size_t bytes = dtype == LORDBA_F32 ? 4 : 2;
  for (; tokens >= 2; tokens -= 2, h += 2 * h_stride) {
    sum_tokens(step, ranks, h, h_stride, 2);
    if (step.base) step.base = (const uint8_t*)step.base + 2 * base_stride * bytes;
    step.y = (uint8_t*)step.y + 2 * y_stride * bytes;
  }
  if (tokens != 0) sum_tokens(step, ranks, h, h_stride, 1);
}

const lordba_kernels lordba_kernels_avx512 = {
    .name = "avx512",
    .rate_decode = 60000,
    .rate_prefill = 150000,
    .rank_lanes_up_to = SIZE_MAX,
    .decode = decode_16_avx512,
    .pack_a = pack_a_16r_avx512,
    .sum_inputs = sum_inputs_16r_avx512,
    .sum_ranks = sum_ranks_16o_avx512,
};
