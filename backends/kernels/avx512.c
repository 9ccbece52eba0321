/* AVX-512: a table of the 16 signed sums of 4 values fills one register; one permute looks up 16 lanes at once. */
#include <immintrin.h>

#include "tiles.h"

#define UNROLLED static inline __attribute__((always_inline))

/* The lowest n of 16 lanes. */
static inline __mmask16 lanes_below(size_t n) { return n < 16 ? (__mmask16)((1u << n) - 1) : (__mmask16)0xffff; }

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
      const __m128i nibble = _mm_set1_epi8(15);
      for (size_t i = 0; i < n; i += 16) {
        const __m128i pairs = _mm_maskz_loadu_epi8(lanes_below((n - i + 1) / 2) & 255, values + (begin + i) / 2);
        const __m128i even = _mm_and_si128(pairs, nibble), odd = _mm_and_si128(_mm_srli_epi16(pairs, 4), nibble);
        const __m512i code = _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(even, odd));
        _mm512_storeu_ps(out + i, _mm512_permutexvar_ps(code, table));
      }
      break;
    }
  }
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

/* One token: 16 values make 4 tables, each from the sums and differences of two pairs, shared by all rank blocks. */
UNROLLED void sum_token(const float* x, size_t n, const float* s_in, const uint32_t* words, int blocks, float* sums) {
  const int chains = blocks > 2 ? 2 : 4; /* accumulators per block */
  const __m512 odd = sign_of_bit(0), sign_a = sign_of_bit(0), sign_c = sign_of_bit(2);
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i one = _mm512_set1_epi32(1);
  /* Lane 2p of `pairs` holds v[2p] + v[2p+1], lane 2p+1 the difference: a - b serves (+,-) and, negated, (-,+). */
  const __m512i differ_ab = _mm512_and_si512(_mm512_xor_si512(lane, _mm512_srli_epi32(lane, 1)), one);
  const __m512i differ_cd =
      _mm512_and_si512(_mm512_srli_epi32(_mm512_xor_si512(lane, _mm512_srli_epi32(lane, 1)), 2), one);
  __m512i pick_ab[4], pick_cd[4];
#pragma GCC unroll 4
  for (int g = 0; g < 4; ++g) {
    pick_ab[g] = _mm512_add_epi32(differ_ab, _mm512_set1_epi32(4 * g));
    pick_cd[g] = _mm512_add_epi32(differ_cd, _mm512_set1_epi32(4 * g + 2));
  }
  __m512 acc[4][4];
#pragma GCC unroll 4
  for (int b = 0; b < blocks; ++b) {
#pragma GCC unroll 4
    for (int c = 0; c < chains; ++c) acc[b][c] = _mm512_setzero_ps();
  }
  for (size_t k = 0; k < n; k += 32) {
    __m512i word[4];
#pragma GCC unroll 4
    for (int b = 0; b < blocks; ++b) word[b] = _mm512_loadu_si512(words + (k / 32 * blocks + b) * 16);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const size_t i = k + 16 * half;
      const __m512 raw = _mm512_maskz_loadu_ps(i < n ? lanes_below(n - i) : 0, x + i);
      const __m512 v = _mm512_mul_ps(raw, _mm512_loadu_ps(s_in + i));
      const __m512 pairs = _mm512_fmadd_ps(_mm512_movehdup_ps(v), odd, _mm512_moveldup_ps(v));
#pragma GCC unroll 4
      for (int g = 0; g < 4; ++g) {
        const __m512 ab = _mm512_mul_ps(_mm512_permutexvar_ps(pick_ab[g], pairs), sign_a);
        const __m512 table = _mm512_fmadd_ps(_mm512_permutexvar_ps(pick_cd[g], pairs), sign_c, ab);
#pragma GCC unroll 4
        for (int b = 0; b < blocks; ++b) {
          const __m512i index = _mm512_srli_epi32(word[b], 16 * half + 4 * g);
          acc[b][g % chains] = _mm512_add_ps(acc[b][g % chains], _mm512_permutexvar_ps(index, table));
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int b = 0; b < blocks; ++b) {
    __m512 sum = _mm512_add_ps(acc[b][0], acc[b][1]);
    if (chains == 4) sum = _mm512_add_ps(sum, _mm512_add_ps(acc[b][2], acc[b][3]));
    _mm512_storeu_ps(sums + 16 * b, _mm512_add_ps(_mm512_loadu_ps(sums + 16 * b), sum));
  }
}

static void sum_inputs_16r_avx512(const float* x, size_t x_stride, size_t tokens, size_t n, const float* s_in,
                                  const uint32_t* words, size_t blocks, float* sums, size_t sums_stride) {
  for (size_t t = 0; t < tokens; ++t, x += x_stride, sums += sums_stride) {
    switch (blocks) {
      case 1:
        sum_token(x, n, s_in, words, 1, sums);
        break;
      case 2:
        sum_token(x, n, s_in, words, 2, sums);
        break;
      case 3:
        sum_token(x, n, s_in, words, 3, sums);
        break;
      default:
        sum_token(x, n, s_in, words, 4, sums);
    }
  }
}

/* One or two tokens share the words of B; `groups` tables of 4 ranks each stay in registers. */
UNROLLED void sum_outputs(const float* h, size_t h_stride, int tokens, int groups, const uint32_t* words, size_t n,
                          const float* s_out, bool first, bool last, const float* base, size_t base_stride, float* y,
                          size_t y_stride) {
  __m512 table[2][8];
#pragma GCC unroll 2
  for (int t = 0; t < tokens; ++t) {
#pragma GCC unroll 8
    for (int g = 0; g < groups; ++g) {
      const float* v = h + t * h_stride + 4 * g;
      const __m512 ab =
          _mm512_fmadd_ps(sign_of_bit(1), _mm512_set1_ps(v[1]), _mm512_mul_ps(sign_of_bit(0), _mm512_set1_ps(v[0])));
      const __m512 cd =
          _mm512_fmadd_ps(sign_of_bit(3), _mm512_set1_ps(v[3]), _mm512_mul_ps(sign_of_bit(2), _mm512_set1_ps(v[2])));
      table[t][g] = _mm512_add_ps(ab, cd);
    }
  }
  for (size_t o = 0; o < n; o += 16) {
    const __mmask16 mask = lanes_below(n - o);
    const __m512i word = _mm512_loadu_si512(words + o);
    const __m512 scale = _mm512_loadu_ps(s_out + o);
    __m512i index[8];
#pragma GCC unroll 8
    for (int g = 0; g < groups; ++g) index[g] = _mm512_srli_epi32(word, 4 * g);
#pragma GCC unroll 2
    for (int t = 0; t < tokens; ++t) {
      float* out = y + t * y_stride + o;
      __m512 even = _mm512_permutexvar_ps(index[0], table[t][0]), odd = _mm512_permutexvar_ps(index[1], table[t][1]);
#pragma GCC unroll 4
      for (int g = 2; g < groups; g += 2) {
        even = _mm512_add_ps(even, _mm512_permutexvar_ps(index[g], table[t][g]));
        odd = _mm512_add_ps(odd, _mm512_permutexvar_ps(index[g + 1], table[t][g + 1]));
      }
      __m512 sum = _mm512_add_ps(even, odd);
      if (!first) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, out));
      if (last) {
        const __m512 start = base ? _mm512_maskz_loadu_ps(mask, base + t * base_stride + o) : _mm512_setzero_ps();
        sum = _mm512_fmadd_ps(scale, sum, start);
      }
      _mm512_mask_storeu_ps(out, mask, sum);
    }
  }
}

static void sum_ranks_16o_avx512(const float* h, size_t h_stride, size_t tokens, bool narrow, const uint32_t* words,
                                 size_t n, const float* s_out, bool first, bool last, const float* base,
                                 size_t base_stride, float* y, size_t y_stride) {
  size_t t = 0;
  for (; t < tokens; t += 2) {
    const float *ht = h + t * h_stride, *bt = base ? base + t * base_stride : NULL;
    float* yt = y + t * y_stride;
    if (t + 1 == tokens) {
      if (narrow) {
        sum_outputs(ht, h_stride, 1, 4, words, n, s_out, first, last, bt, base_stride, yt, y_stride);
      } else {
        sum_outputs(ht, h_stride, 1, 8, words, n, s_out, first, last, bt, base_stride, yt, y_stride);
      }
    } else if (narrow) {
      sum_outputs(ht, h_stride, 2, 4, words, n, s_out, first, last, bt, base_stride, yt, y_stride);
    } else {
      sum_outputs(ht, h_stride, 2, 8, words, n, s_out, first, last, bt, base_stride, yt, y_stride);
    }
  }
}

const lordba_kernels lordba_kernels_avx512 = {
    .name = "avx512",
    .rate = 100000,
    .decode = decode_16_avx512,
    .pack_a = pack_a_16r_avx512,
    .sum_inputs = sum_inputs_16r_avx512,
    .sum_ranks = sum_ranks_16o_avx512,
};
