/* AVX2: a table of the 8 signed sums of 3 values fills one register; a 32-bit word is ten such groups and a pair. */
#include <immintrin.h>

#include "tiles.h"

#define UNROLLED static inline __attribute__((always_inline))

enum { GROUPS_32 = 11, GROUPS_16 = 6 }; /* groups of 3 that cover 32 or 16 values, padded with zeros */

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

/* One token, one or two blocks of 16 ranks; two accumulators for each 8 lanes. */
UNROLLED void sum_token(const float* x, size_t n, const float* s_in, const uint32_t* words, size_t lanes, int halves,
                        float* sums) {
  __m256 acc[4][2];
#pragma GCC unroll 4
  for (int b = 0; b < halves; ++b) acc[b][0] = acc[b][1] = _mm256_setzero_ps();
  for (size_t k = 0; k < n; k += 32) {
    float v[32];
    if (n - k >= 32) {
#pragma GCC unroll 4
      for (int i = 0; i < 32; i += 8) {
        _mm256_storeu_ps(v + i, _mm256_mul_ps(_mm256_loadu_ps(x + k + i), _mm256_loadu_ps(s_in + k + i)));
      }
    } else {
      for (size_t i = 0; i < 32; ++i) v[i] = k + i < n ? x[k + i] * s_in[k + i] : 0.0f;
    }
    const uint32_t* word = words + k / 32 * lanes;
#pragma GCC unroll 11
    for (int g = 0; g < GROUPS_32; ++g) {
      const __m256 table = table_of_3(v + 3 * g, g + 1 < GROUPS_32);
#pragma GCC unroll 4
      for (int b = 0; b < halves; ++b) {
        const __m256i index = _mm256_srli_epi32(_mm256_loadu_si256((const __m256i*)(word + 8 * b)), 3 * g);
        acc[b][g % 2] = _mm256_add_ps(acc[b][g % 2], _mm256_permutevar8x32_ps(table, index));
      }
    }
  }
#pragma GCC unroll 4
  for (int b = 0; b < halves; ++b) {
    const __m256 sum = _mm256_add_ps(acc[b][0], acc[b][1]);
    _mm256_storeu_ps(sums + 8 * b, _mm256_add_ps(_mm256_loadu_ps(sums + 8 * b), sum));
  }
}

static void sum_inputs_16r_avx2(const float* x, size_t x_stride, size_t tokens, size_t n, const float* s_in,
                                const uint32_t* words, size_t blocks, float* sums, size_t sums_stride) {
  const size_t lanes = blocks * LORDBA_LANES;
  for (size_t t = 0; t < tokens; ++t, x += x_stride, sums += sums_stride) {
    size_t lane = 0;
    for (; lane + 32 <= lanes; lane += 32) sum_token(x, n, s_in, words + lane, lanes, 4, sums + lane);
    if (lane < lanes) sum_token(x, n, s_in, words + lane, lanes, 2, sums + lane);
  }
}

UNROLLED void sum_outputs(const float* h, int groups, const uint32_t* words, size_t n, const float* s_out, bool first,
                          bool last, const float* base, float* y) {
  __m256 table[GROUPS_32];
#pragma GCC unroll 11
  for (int g = 0; g + 1 < groups; ++g) table[g] = table_of_3(h + 3 * g, true);
  table[groups - 1] = groups == GROUPS_32
                          ? table_of_3(h + 30, false)
                          : _mm256_mul_ps(_mm256_setr_ps(1, -1, 1, -1, 1, -1, 1, -1), _mm256_broadcast_ss(h + 15));
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  for (size_t o = 0; o < n; o += 8) {
    const __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(n - o < 8 ? (int)(n - o) : 8), lane);
    const __m256i word = _mm256_loadu_si256((const __m256i*)(words + o));
    __m256 even = _mm256_permutevar8x32_ps(table[0], word);
    __m256 odd = _mm256_permutevar8x32_ps(table[1], _mm256_srli_epi32(word, 3));
#pragma GCC unroll 9
    for (int g = 2; g < groups; ++g) {
      const __m256 value = _mm256_permutevar8x32_ps(table[g], _mm256_srli_epi32(word, 3 * g));
      if (g % 2) {
        odd = _mm256_add_ps(odd, value);
      } else {
        even = _mm256_add_ps(even, value);
      }
    }
    __m256 sum = _mm256_add_ps(even, odd);
    if (!first) sum = _mm256_add_ps(sum, _mm256_maskload_ps(y + o, mask));
    if (last) {
      const __m256 start = base ? _mm256_maskload_ps(base + o, mask) : _mm256_setzero_ps();
      sum = _mm256_fmadd_ps(_mm256_loadu_ps(s_out + o), sum, start);
    }
    _mm256_maskstore_ps(y + o, mask, sum);
  }
}

static void sum_ranks_8o_avx2(const float* h, size_t h_stride, size_t tokens, bool narrow, const uint32_t* words,
                              size_t n, const float* s_out, bool first, bool last, const float* base,
                              size_t base_stride, float* y, size_t y_stride) {
  for (size_t t = 0; t < tokens; ++t) {
    const float *ht = h + t * h_stride, *bt = base ? base + t * base_stride : NULL;
    if (narrow) {
      sum_outputs(ht, GROUPS_16, words, n, s_out, first, last, bt, y + t * y_stride);
    } else {
      sum_outputs(ht, GROUPS_32, words, n, s_out, first, last, bt, y + t * y_stride);
    }
  }
}

const lordba_kernels lordba_kernels_avx2 = {
    .name = "avx2",
    .rate = 45000,
    .decode = decode_8_avx2,
    .pack_a = lordba_pack_a_scalar,
    .sum_inputs = sum_inputs_16r_avx2,
    .sum_ranks = sum_ranks_8o_avx2,
};
