/* AVX2. Few tokens: a table of the 8 signed sums of 3 values fills one register; a 32-bit word is ten such groups and a
 * pair. Many tokens: token_tables.h. */
#include <immintrin.h>

#define WIDTH 8
typedef float vector __attribute__((vector_size(32)));

#include "tiles.h"

#define UNROLLED static inline __attribute__((always_inline))

/* 1, in a way that compilers do not see: shifts and additions share units on some CPUs, shifts and multiplications do
 * not, so that value * 1 + sum is the faster way to add beside a shift. */
UNROLLED __m256 hidden_one(void) {
  __m256 one = _mm256_set1_ps(1.0f);
  __asm__("" : "+x"(one));
  return one;
}

enum { GROUPS_32 = 11, GROUPS_16 = 6, GROUPS_8 = 3 }; /* groups of 3 that cover as many values, padded with zeros */

/* All ones in the lowest n of 8 lanes. */
UNROLLED __m256i lanes_below(size_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n < 8 ? (int)n : 8), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

UNROLLED vector load_n(const void* p, lordba_dtype dtype, size_t i, size_t n) {
  if (dtype == LORDBA_F32) {
    const float* from = (const float*)p + i;
    return (vector)(n >= 8 ? _mm256_loadu_ps(from) : _mm256_maskload_ps(from, lanes_below(n)));
  }
  const uint16_t* from = (const uint16_t*)p + i;
  uint16_t part[8] = {0};
  if (n < 8) {
    for (size_t k = 0; k < n; ++k) part[k] = from[k];
    from = part;
  }
  const __m128i half = _mm_loadu_si128((const __m128i*)from);
  if (dtype == LORDBA_F16) return (vector)_mm256_cvtph_ps(half);
  return (vector)_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

/* Round to nearest, ties to even; NaN stays one. */
UNROLLED __m128i to_bf16(__m256 v) {
  const __m256i bits = _mm256_castps_si256(v), one = _mm256_set1_epi32(1);
  const __m256i even = _mm256_and_si256(_mm256_srli_epi32(bits, 16), one);
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), even);
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}

UNROLLED void store_n(void* p, lordba_dtype dtype, size_t i, size_t n, vector v) {
  if (dtype == LORDBA_F32) {
    float* to = (float*)p + i;
    if (n >= 8) {
      _mm256_storeu_ps(to, (__m256)v);
    } else {
      _mm256_maskstore_ps(to, lanes_below(n), (__m256)v);
    }
    return;
  }
  uint16_t* to = (uint16_t*)p + i;
  const __m128i half = dtype == LORDBA_F16 ? _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT) : to_bf16((__m256)v);
  if (n >= 8) {
    _mm_storeu_si128((__m128i*)to, half);
  } else {
    uint16_t part[8];
    _mm_storeu_si128((__m128i*)part, half);
    for (size_t k = 0; k < n; ++k) to[k] = part[k];
  }
}

UNROLLED void transpose(vector rows[8]) {
  __m256* r = (__m256*)rows;
  __m256 t[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m256 low = r[i], high = r[i + 4];
    r[i] = _mm256_permute2f128_ps(low, high, 0x20);
    r[i + 4] = _mm256_permute2f128_ps(low, high, 0x31);
  }
}

#include "token_tables.h"

/* Vector loads stop before the end of the stored scales; the rest goes through the reference twin. */
static void decode_8_avx2(const lordba_scales* scales, size_t begin, size_t n, float* out) {
  const uint8_t* values = scales->values;
  size_t i = 0;
  switch (scales->code) {
    case LORDBA_FP32:
      for (; i + 8 <= n; i += 8) {
        _mm256_storeu_ps(out + i, _mm256_castsi256_ps(_mm256_loadu_si256((const __m256i*)(values + 4 * (begin + i)))));
      }
      break;
    case LORDBA_FP16:
      for (; i + 8 <= n; i += 8) {
        _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(values + 2 * (begin + i)))));
      }
      break;
    case LORDBA_INT8: {
      const __m256 lo = _mm256_set1_ps(lordba_load_f32(scales->meaning));
      const __m256 step = _mm256_set1_ps(lordba_load_f32(scales->meaning + 4));
      for (; i + 8 <= n; i += 8) {
        const __m256i code = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(values + begin + i)));
        const __m256 above = _mm256_cvtepi32_ps(_mm256_sub_epi32(code, _mm256_set1_epi32(1)));
        const __m256 zero = _mm256_castsi256_ps(_mm256_cmpeq_epi32(code, _mm256_setzero_si256()));
        _mm256_storeu_ps(out + i, _mm256_andnot_ps(zero, _mm256_fmadd_ps(above, step, lo)));
      }
      break;
    }
    case LORDBA_LOG4: {
      const __m256 low = _mm256_castsi256_ps(_mm256_loadu_si256((const __m256i*)scales->meaning));
      const __m256 high = _mm256_castsi256_ps(_mm256_loadu_si256((const __m256i*)(scales->meaning + 32)));
      const __m256i shift = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
      for (; i + 8 <= n; i += 8) {
        const __m256i pairs = _mm256_set1_epi32((int)lordba_load_u32(values + (begin + i) / 2));
        const __m256i code = _mm256_srlv_epi32(pairs, shift);
        const __m256 upper =
            _mm256_castsi256_ps(_mm256_slli_epi32(code, 28)); /* bit 3 to the sign, where blendv looks */
        _mm256_storeu_ps(out + i, _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, code),
                                                   _mm256_permutevar8x32_ps(high, code), upper));
      }
      break;
    }
  }
  if (i < n) lordba_kernels_scalar.decode(scales, begin + i, n - i, out + i);
}

UNROLLED __m256 table_of_3(const float* v, bool has_third) {
  const __m256 s0 = _mm256_setr_ps(1, -1, 1, -1, 1, -1, 1, -1), s1 = _mm256_setr_ps(1, 1, -1, -1, 1, 1, -1, -1);
  const __m256 s2 = _mm256_setr_ps(1, 1, 1, 1, -1, -1, -1, -1);
  const __m256 two = _mm256_fmadd_ps(s1, _mm256_broadcast_ss(v + 1), _mm256_mul_ps(s0, _mm256_broadcast_ss(v)));
  return has_third ? _mm256_fmadd_ps(s2, _mm256_broadcast_ss(v + 2), two) : two;
}

/* One token of scaled inputs, padded to whole words; one or two blocks of 16 ranks, two accumulators for each 8 lanes.
 */
UNROLLED void sum_blocks(const float* v, size_t n, const uint32_t* words, size_t lanes, int eights, float* sums) {
  const __m256 one = hidden_one();
  __m256 acc[4][2];
#pragma GCC unroll 4
  for (int b = 0; b < eights; ++b) acc[b][0] = acc[b][1] = _mm256_setzero_ps();
  for (size_t k = 0; k < n; k += LORDBA_WORD, v += LORDBA_WORD, words += lanes) {
#pragma GCC unroll 11
    for (int g = 0; g < GROUPS_32; ++g) {
      const __m256 table = table_of_3(v + 3 * g, g + 1 < GROUPS_32);
#pragma GCC unroll 4
      for (int b = 0; b < eights; ++b) {
        const __m256i index = _mm256_srli_epi32(_mm256_loadu_si256((const __m256i*)(words + 8 * b)), 3 * g);
        acc[b][g % 2] = _mm256_fmadd_ps(_mm256_permutevar8x32_ps(table, index), one, acc[b][g % 2]);
      }
    }
  }
#pragma GCC unroll 4
  for (int b = 0; b < eights; ++b) _mm256_storeu_ps(sums + 8 * b, _mm256_add_ps(acc[b][0], acc[b][1]));
}

static void sum_inputs_8r_avx2(const void* x, size_t x_stride, lordba_dtype dtype, size_t tokens, size_t n,
                               const float* s_in, const uint32_t* words, size_t blocks, float* sums,
                               size_t sums_stride) {
  const size_t lanes = blocks * LORDBA_LANES;
  for (size_t t = 0; t < tokens; ++t, sums += sums_stride) {
    /* All inputs first: a table that waited for its own inputs' store would be late. */
    float v[LORDBA_CHUNK];
    size_t i = 0;
    for (; i + WIDTH <= n; i += WIDTH) store(v + i, load_n(x, dtype, t * x_stride + i, WIDTH) * load(s_in + i));
    for (; i < (n + LORDBA_WORD - 1) / LORDBA_WORD * LORDBA_WORD; i += WIDTH) {
      store(v + i, load_n(x, dtype, t * x_stride + i, i < n ? n - i : 0) * load(s_in + i));
    }
    size_t lane = 0;
    for (; lane + 32 <= lanes; lane += 32) sum_blocks(v, n, words + lane, lanes, 4, sums + lane);
    if (lane < lanes) sum_blocks(v, n, words + lane, lanes, 2, sums + lane);
  }
}

/* One token's part of a step of stage 2. */
typedef struct {
  const uint8_t* b;
  size_t width; /* bytes of a row of B */
  bool upper;   /* the upper half of rows of 8 bytes */
  size_t n;
  const float *s_out, *carry_in;
  float* carry_out;
  const void* base;
  void* y;
  lordba_dtype dtype;
} output_step;

/* Words of 32 ranks for 8 outputs from output `o` on. */
UNROLLED __m256i load_words(const output_step* step, size_t o) {
  const uint8_t* b = step->b + step->width * o;
  if (step->width == 1) return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)b));
  if (step->width == 2) return _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)b));
  const __m256i first = _mm256_loadu_si256((const __m256i*)b);
  if (step->width == 4) return first;
  const __m256 low = _mm256_castsi256_ps(first), high = (__m256)load((const float*)b + 8);
  const __m256 words = step->upper ? _mm256_shuffle_ps(low, high, 0xdd) : _mm256_shuffle_ps(low, high, 0x88);
  return _mm256_permute4x64_epi64(_mm256_castps_si256(words), 0xd8);
}

/* 8 outputs of which `lanes` exist; `plain`: y is fp32 and there are no carries. */
UNROLLED void sum_8_outputs(const output_step* step, const __m256* table, int groups, bool plain, size_t o,
                            size_t lanes) {
  const __m256 one = hidden_one();
  const lordba_dtype dtype = plain ? LORDBA_F32 : step->dtype;
  const __m256i word = load_words(step, o);
  __m256 sum[2];
#pragma GCC unroll 11
  for (int g = 0; g < groups; ++g) {
    const __m256 value = _mm256_permutevar8x32_ps(table[g], g == 0 ? word : _mm256_srli_epi32(word, 3 * g));
    sum[g % 2] = g < 2 ? value : _mm256_fmadd_ps(value, one, sum[g % 2]);
  }
  vector acc = (vector)_mm256_add_ps(sum[0], sum[1]);
  if (!plain && step->carry_in) acc += load_n(step->carry_in, LORDBA_F32, o, lanes);
  if (!plain && step->carry_out) {
    store_n(step->carry_out, LORDBA_F32, o, lanes, acc);
    return;
  }
  acc *= load(step->s_out + o);
  if (step->base) acc += load_n(step->base, dtype, o, lanes);
  store_n(step->y, dtype, o, lanes, acc);
}

/* `last` values of the last group exist. */
UNROLLED void sum_outputs(const output_step* step, const float* h, int groups, int last) {
  __m256 table[GROUPS_32];
#pragma GCC unroll 11
  for (int g = 0; g + 1 < groups; ++g) table[g] = table_of_3(h + 3 * g, true);
  table[groups - 1] =
      last == 2 ? table_of_3(h + 3 * groups - 3, false)
                : _mm256_mul_ps(_mm256_setr_ps(1, -1, 1, -1, 1, -1, 1, -1), _mm256_broadcast_ss(h + 3 * groups - 3));
  size_t o = 0;
  if (step->dtype == LORDBA_F32 && !step->carry_in && !step->carry_out) {
    for (; o + 8 <= step->n; o += 8) sum_8_outputs(step, table, groups, true, o, 8);
  } else {
    for (; o + 8 <= step->n; o += 8) sum_8_outputs(step, table, groups, false, o, 8);
  }
  if (o < step->n) sum_8_outputs(step, table, groups, false, o, step->n - o);
}

static void sum_ranks_8o_avx2(const float* h, size_t h_stride, size_t tokens, size_t ranks, const uint8_t* b, size_t n,
                              const float* s_out, const float* carry_in, float* carry_out, const void* base,
                              size_t base_stride, void* y, size_t y_stride, lordba_dtype dtype) {
  const size_t width = ranks <= 8 ? 1 : ranks <= 16 ? 2 : ranks <= 32 ? 4 : 8, bytes = dtype == LORDBA_F32 ? 4 : 2;
  for (size_t t = 0; t < tokens; ++t, h += h_stride) {
    output_step step = {b,    width, false, n, s_out, carry_in, carry_out, NULL, (uint8_t*)y + t * y_stride * bytes,
                        dtype};
    if (base) step.base = (const uint8_t*)base + t * base_stride * bytes;
    if (width == 1) {
      sum_outputs(&step, h, GROUPS_8, 2);
    } else if (width == 2) {
      sum_outputs(&step, h, GROUPS_16, 1);
    } else if (width == 4) {
      sum_outputs(&step, h, GROUPS_32, 2);
    } else {
      float half[LORDBA_OUTPUTS];
      output_step lower = step;
      lower.carry_out = half;
      sum_outputs(&lower, h, GROUPS_32, 2);
      step.carry_in = half;
      step.upper = true;
      if (ranks <= 48) { /* h has no more */
        sum_outputs(&step, h + 32, GROUPS_16, 1);
      } else {
        sum_outputs(&step, h + 32, GROUPS_32, 2);
      }
    }
  }
}

const lordba_kernels lordba_kernels_avx2 = {
    .name = "avx2",
    .rate_decode = 45000,
    .rate_prefill = 80000,
    .rank_lanes_up_to = 4,
    .decode = decode_8_avx2,
    .pack_a = lordba_pack_a_scalar,
    .sum_inputs = sum_inputs_8r_avx2,
    .sum_ranks = sum_ranks_8o_avx2,
    .input_tables = input_tables,
    .rank_tables = rank_tables,
    .sum_tables = sum_tables,
    .store = store_tokens,
};
