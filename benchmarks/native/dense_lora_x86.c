/* The dense LoRA on x86: AVX-512 if the compiler may use it, else AVX2 with FMA.
 *
 * Both stages keep a tile of TILE tokens by 4 vectors in registers. Stage 1: vectors lie along the inputs, a tile has 4
 * ranks, so that one token's x is loaded once for 4 ranks and never broadcast; a is [r / 4][d_in / LANES][4][LANES].
 * Stage 2: vectors lie along the outputs; b is [d_out / PANEL][r][PANEL]. Both are read front to back.
 */
#include <immintrin.h>
#include <stdbool.h>

#include "dense_lora.h"

#ifdef __AVX512F__
typedef __m512 vector;
enum { LANES = 16, TILE = 6 };
static inline vector load(const float* p) { return _mm512_loadu_ps(p); }
static inline vector load_half(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
static inline void store(float* p, vector v) { _mm512_storeu_ps(p, v); }
static inline vector zero(void) { return _mm512_setzero_ps(); }
static inline vector broadcast(float value) { return _mm512_set1_ps(value); }
static inline vector multiply_add(vector a, vector b, vector c) { return _mm512_fmadd_ps(a, b, c); }
static inline vector add(vector a, vector b) { return _mm512_add_ps(a, b); }
static inline vector transpose_add(vector a, vector b) {
  return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
}
static inline vector transpose_add_pairs(vector a, vector b) {
  return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
}
static inline __m128 sum_quarters(vector v) {
  const __m256 half =
      _mm256_add_ps(_mm512_castps512_ps256(v), _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1)));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}
#else
typedef __m256 vector;
enum { LANES = 8, TILE = 3 };
static inline vector load(const float* p) { return _mm256_loadu_ps(p); }
static inline vector load_half(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
static inline void store(float* p, vector v) { _mm256_storeu_ps(p, v); }
static inline vector zero(void) { return _mm256_setzero_ps(); }
static inline vector broadcast(float value) { return _mm256_set1_ps(value); }
static inline vector multiply_add(vector a, vector b, vector c) { return _mm256_fmadd_ps(a, b, c); }
static inline vector add(vector a, vector b) { return _mm256_add_ps(a, b); }
static inline vector transpose_add(vector a, vector b) {
  return _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
}
static inline vector transpose_add_pairs(vector a, vector b) {
  return _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x44), _mm256_shuffle_ps(a, b, 0xee));
}
static inline __m128 sum_quarters(vector v) {
  return _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
}
#endif

#define INLINE static inline __attribute__((always_inline)) /* constants among the arguments choose the code */

enum {
  PANEL = 4 * LANES,
  CHUNK = 1024,         /* inputs of stage 1 whose x, TILE tokens of it, stays in the first-level cache */
  B_ELEMENTS = 1 << 16, /* weights of stage 2 that stay in the second-level cache */
  BLOCK = 96,           /* tokens whose u lies on the stack */
  AHEAD = 4096,         /* bytes that decode prefetches ahead of its weights */
};

INLINE vector load_weights(const void* weights, size_t i, bool half) {
  return half ? load_half((const uint16_t*)weights + i) : load((const float*)weights + i);
}

INLINE const void* skip(const void* weights, size_t elements, bool half) {
  return (const char*)weights + elements * (half ? 2 : 4);
}

INLINE void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }

/* Fetches the lines of the 4 vectors that lie AHEAD of element i. */
INLINE void prefetch_weights(const void* weights, size_t i, bool half) {
  const char* p = (const char*)skip(weights, i, half) + AHEAD;
  for (int line = 0; line < PANEL * (half ? 2 : 4); line += 64) prefetch(p + line);
}

/* u[t][0..3] = or += 4 ranks of n inputs, for a constant number of tokens. `last`: no other ranks, so that the next
 * tile's x can come into the cache. */
INLINE void ranks_tile(const float* x, size_t x_stride, size_t tokens, size_t n, const void* a, bool half, bool more,
                       bool last, float* u, size_t u_stride) {
  enum { MAX_UNROLL = 4 };
  const size_t unroll = tokens == 1 ? 4 : tokens == 2 ? 2 : 1; /* enough sums in flight to hide the latency of FMA */
  vector sums[TILE][4][MAX_UNROLL];
  for (size_t t = 0; t < tokens; ++t)
    for (int j = 0; j < 4; ++j)
      for (size_t k = 0; k < unroll; ++k) sums[t][j][k] = zero();
  for (size_t i = 0; i < n; i += unroll * LANES) {
#pragma GCC unroll 4
    for (size_t k = 0; k < unroll; ++k) {
      if (tokens == 1) prefetch_weights(a, 4 * (i + k * LANES), half);
      vector w[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) w[j] = load_weights(a, 4 * (i + k * LANES) + j * LANES, half);
#pragma GCC unroll 8
      for (size_t t = 0; t < tokens; ++t) {
        const vector v = load(x + t * x_stride + i + k * LANES);
        if (tokens > 1 && last) prefetch(x + (t + tokens) * x_stride + i + k * LANES);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) sums[t][j][k] = multiply_add(v, w[j], sums[t][j][k]);
      }
    }
  }
#pragma GCC unroll 8
  for (size_t t = 0; t < tokens; ++t) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j)
      for (size_t k = 1; k < unroll; ++k) sums[t][j][0] = add(sums[t][j][0], sums[t][j][k]);
    __m128 total = sum_quarters(
        transpose_add_pairs(transpose_add(sums[t][0][0], sums[t][1][0]), transpose_add(sums[t][2][0], sums[t][3][0])));
    if (more) total = _mm_add_ps(total, _mm_loadu_ps(u + t * u_stride));
    _mm_storeu_ps(u + t * u_stride, total);
  }
}

/* PANEL outputs of a constant number of tokens: y += B u. */
INLINE void outputs_tile(const float* u, size_t tokens, size_t r, const void* b, bool half, float* y, size_t y_stride) {
  vector sums[TILE][4];
#pragma GCC unroll 8
  for (size_t t = 0; t < tokens; ++t)
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      sums[t][k] = load(y + t * y_stride + k * LANES);
      if (tokens > 1) prefetch(y + t * y_stride + k * LANES + 2 * PANEL); /* two tiles on */
    }
#pragma GCC unroll 4
  for (size_t j = 0; j < r; ++j) {
    if (tokens == 1) prefetch_weights(b, j * PANEL, half);
    vector w[4];
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) w[k] = load_weights(b, j * PANEL + k * LANES, half);
#pragma GCC unroll 8
    for (size_t t = 0; t < tokens; ++t) {
      const vector v = broadcast(u[t * r + j]);
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) sums[t][k] = multiply_add(v, w[k], sums[t][k]);
    }
  }
#pragma GCC unroll 8
  for (size_t t = 0; t < tokens; ++t)
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) store(y + t * y_stride + k * LANES, sums[t][k]);
}

/* Calls `tile` with a constant number of tokens. */
#if defined(__AVX512F__)
#define FOR_TOKENS(n, tile) \
  switch (n) {              \
    case 1:                 \
      tile(1);              \
      break;                \
    case 2:                 \
      tile(2);              \
      break;                \
    case 3:                 \
      tile(3);              \
      break;                \
    case 4:                 \
      tile(4);              \
      break;                \
    case 5:                 \
      tile(5);              \
      break;                \
    default:                \
      tile(6);              \
      break;                \
  }
#else
#define FOR_TOKENS(n, tile) \
  switch (n) {              \
    case 1:                 \
      tile(1);              \
      break;                \
    case 2:                 \
      tile(2);              \
      break;                \
    default:                \
      tile(3);              \
      break;                \
  }
#endif

/* Tokens of the next tile: the rest, cut evenly. */
static size_t next_tile(size_t rest) { return rest / ((rest + TILE - 1) / TILE); }

INLINE void ranks(const float* x, size_t tokens, size_t d_in, const void* a, bool half, size_t begin, size_t end,
                  float* u, size_t r) {
  const size_t chunk = tokens == 1 ? d_in : CHUNK;
  for (size_t i = 0; i < d_in; i += chunk) {
    const size_t n = d_in - i < chunk ? d_in - i : chunk;
    for (size_t t = 0, size; t < tokens; t += size) {
      size = next_tile(tokens - t);
      for (size_t j = begin; j < end; j += 4) {
        const void* block = skip(a, j * d_in + 4 * i, half);
#define RANKS_TILE(tokens) \
  ranks_tile(x + t * d_in + i, d_in, tokens, n, block, half, i > 0, j + 4 == end, u + t * r + j, r)
        FOR_TOKENS(size, RANKS_TILE)
      }
    }
  }
}

INLINE void outputs(const float* u, size_t tokens, size_t r, const void* b, bool half, size_t begin, size_t end,
                    float* y, size_t d_out) {
  const size_t chunk = (B_ELEMENTS / r + PANEL - 1) / PANEL * PANEL;
  for (size_t first = begin; first < end; first += chunk) {
    const size_t last = end - first < chunk ? end : first + chunk;
    for (size_t t = 0, size; t < tokens; t += size) {
      size = next_tile(tokens - t);
      for (size_t o = first; o < last; o += PANEL) {
        const void* panel = skip(b, o * r, half);
#define OUTPUTS_TILE(tokens) outputs_tile(u + t * r, tokens, r, panel, half, y + t * d_out + o, d_out)
        FOR_TOKENS(size, OUTPUTS_TILE)
      }
    }
  }
}

INLINE void dense_lora(const float* x, size_t tokens, size_t d_in, size_t d_out, size_t r, const void* a, const void* b,
                       bool half, float* y) {
  float u[BLOCK * DENSE_LORA_MAX_RANK];
  for (size_t t = 0; t < tokens; t += BLOCK) {
    const size_t n = tokens - t < BLOCK ? tokens - t : BLOCK;
    ranks(x + t * d_in, n, d_in, a, half, 0, r, u, r);
    outputs(u, n, r, b, half, 0, d_out, y + t * d_out, d_out);
  }
}

#define PACK(a_t, b_t, d_in, d_out, r, a, b)                                                                  \
  for (size_t j = 0; j < r; ++j) {                                                                            \
    for (size_t i = 0; i < d_in; ++i)                                                                         \
      a[j / 4 * 4 * d_in + i / LANES * 4 * LANES + j % 4 * LANES + i % LANES] = a_t[i * r + j];               \
    for (size_t o = 0; o < d_out; ++o) b[o / PANEL * PANEL * r + j * PANEL + o % PANEL] = b_t[j * d_out + o]; \
  }

void dense_lora_pack_fp32(const float* a_t, const float* b_t, size_t d_in, size_t d_out, size_t r, float* a, float* b) {
  PACK(a_t, b_t, d_in, d_out, r, a, b)
}

void dense_lora_pack_fp16(const uint16_t* a_t, const uint16_t* b_t, size_t d_in, size_t d_out, size_t r, uint16_t* a,
                          uint16_t* b) {
  PACK(a_t, b_t, d_in, d_out, r, a, b)
}

void dense_lora_fp32(const float* x, size_t tokens, size_t d_in, size_t d_out, size_t r, const float* a, const float* b,
                     float* y) {
  dense_lora(x, tokens, d_in, d_out, r, a, b, false, y);
}

void dense_lora_fp16(const float* x, size_t tokens, size_t d_in, size_t d_out, size_t r, const uint16_t* a,
                     const uint16_t* b, float* y) {
  dense_lora(x, tokens, d_in, d_out, r, a, b, true, y);
}

void dense_lora_ranks_fp32(const float* x, size_t d_in, const float* a, size_t begin, size_t end, float* u) {
  ranks(x, 1, d_in, a, false, begin, end, u, 0);
}

void dense_lora_ranks_fp16(const float* x, size_t d_in, const uint16_t* a, size_t begin, size_t end, float* u) {
  ranks(x, 1, d_in, a, true, begin, end, u, 0);
}

void dense_lora_outputs_fp32(const float* u, size_t r, const float* b, size_t begin, size_t end, float* y) {
  outputs(u, 1, r, b, false, begin, end, y, 0);
}

void dense_lora_outputs_fp16(const float* u, size_t r, const uint16_t* b, size_t begin, size_t end, float* y) {
  outputs(u, 1, r, b, true, begin, end, y, 0);
}
