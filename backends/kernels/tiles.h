/* What one instruction set provides: small tiles over a chunk of inputs or some ranks. kernels.c cuts calls into them.
 */
#ifndef LORDBA_TILES_H
#define LORDBA_TILES_H

#include "lordba_kernels.h"

#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF /* however a call is cut, its result is the same: also where no flag says so */
#endif

enum {
  LORDBA_CHUNK = 512,                        /* stage 1 sums the inputs in chunks; a partial sum belongs to one */
  LORDBA_LANES = 16,                         /* ranks are padded to a multiple of this */
  LORDBA_WORD = 32,                          /* signs per packed word */
  LORDBA_WORDS = LORDBA_CHUNK / LORDBA_WORD, /* words per rank in a chunk */
  LORDBA_MAX_BLOCKS = 4,                     /* blocks of LORDBA_LANES ranks that share one pass over x */
  LORDBA_MAX_RANKS = LORDBA_MAX_BLOCKS * LORDBA_LANES,

  LORDBA_OUTPUTS = 1024, /* the most outputs of one sum_ranks */

  LORDBA_TOKENS = 32,                /* tokens of one tile: the lanes of a table's entry */
  LORDBA_GROUP = 4,                  /* values whose 16 signed sums make one table */
  LORDBA_TABLE = 16 * LORDBA_TOKENS, /* floats of one table */
  LORDBA_BLOCK = 64,                 /* values whose tables fit the first-level cache */
  LORDBA_GROUPS = LORDBA_BLOCK / LORDBA_GROUP,
};

struct lordba_kernels {
  const char* name;
  float rate_decode, rate_prefill; /* signed additions per microsecond and thread, hot, measured roughly */
  size_t rank_lanes_up_to;         /* tokens of a call up to which the first of the two ways is the faster one */

  /* Decodes scales [begin, begin + n) into out; may write up to the next multiple of LORDBA_LANES. begin is even. */
  void (*decode)(const lordba_scales* scales, size_t begin, size_t n, float* out);

  /*
   * The lanes are ranks, then outputs.
   */

  /* Turns a chunk of A, `rows` <= LORDBA_MAX_RANKS rows of `bytes` <= 64 bytes, into the order that sum_inputs reads:
   * ceil(bytes / 4) words for each of blocks * LORDBA_LANES ranks. Rows and bits that are not there become 0. */
  void (*pack_a)(const uint8_t* a, size_t row_bytes, size_t rows, size_t bytes, size_t blocks, uint32_t* words);

  /* sums[t][j] = signed sum of s_in * x over a chunk's n inputs, for blocks * LORDBA_LANES ranks. s_in is padded with
   * zeros to a multiple of LORDBA_WORD, x is not; words can be read up to 3 bytes too far. */
  void (*sum_inputs)(const void* x, size_t x_stride, lordba_dtype dtype, size_t tokens, size_t n, const float* s_in,
                     const uint32_t* words, size_t blocks, float* sums, size_t sums_stride);

  /* Stage 2 over `ranks` <= LORDBA_MAX_RANKS ranks and n outputs: acc[t][o] = carry_in[o] + sum_j B[o][j] h[t][j]. h
   * is padded with zeros to a multiple of LORDBA_LANES. B's rows of 1, 2, 4 or 8 bytes (up to 8, 16, 32 or 64 ranks)
   * lie one after the other and can be read up to a multiple of LORDBA_LANES rows; so can s_out. With carry_out, acc is
   * stored there (it may be carry_in); without, y = base + s_out * acc. carry_in and base may be NULL. */
  void (*sum_ranks)(const float* h, size_t h_stride, size_t tokens, size_t ranks, const uint8_t* b, size_t n,
                    const float* s_out, const float* carry_in, float* carry_out, const void* base, size_t base_stride,
                    void* y, size_t y_stride, lordba_dtype dtype);

  /*
   * The lanes are tokens. The 16 signed sums of 4 values make a table
   * [16][LORDBA_TOKENS]: entry e is ((+-v0 +- v1) + (+-v2 +- v3)), value k negative where bit k of e is set. A nibble
   * of a row of signs, as stored, is the number of the entry to add.
   */

  /* Tables of n <= LORDBA_BLOCK inputs (zeros up to a multiple of 8) of `tokens` rows of x, scaled by s_in. */
  void (*input_tables)(const void* x, size_t x_stride, lordba_dtype dtype, size_t tokens, size_t n, const float* s_in,
                       float* tables);

  /* Tables of n <= LORDBA_BLOCK rows of h [n][LORDBA_TOKENS] (zeros up to a multiple of 8). */
  void (*rank_tables)(const float* h, size_t n, size_t tokens, float* tables);

  /* Sums the entries that `bytes` <= LORDBA_BLOCK / 8 bytes of each row of signs name, from zero, first to last.
   * sums [rows][LORDBA_TOKENS] becomes the sum, or, if `add`, what it was plus the sum. Lanes from `tokens` on are
   * not used. */
  void (*sum_tables)(const float* tables, size_t tokens, const uint8_t* signs, size_t row_bytes, size_t bytes,
                     size_t rows, bool add, float* sums);

  /* y[t][o] = base[t][o] + s_out[o] * sums[o][t] for n outputs; base may be NULL. */
  void (*store)(const float* sums, size_t tokens, size_t n, const float* s_out, const void* base, size_t base_stride,
                void* y, size_t y_stride, lordba_dtype dtype);
};

extern const lordba_kernels lordba_kernels_scalar;
void lordba_pack_a_scalar(const uint8_t* a, size_t row_bytes, size_t rows, size_t bytes, size_t blocks,
                          uint32_t* words);
/* Element i of an array of any dtype as a float, and back, rounded to the nearest. */
float lordba_load_scalar(const void* p, lordba_dtype dtype, size_t i);
void lordba_store_scalar(void* p, lordba_dtype dtype, size_t i, float value);

#if defined(__x86_64__) && !defined(LORDBA_WITHOUT_X86) /* for builds that have no flags per file */
#define LORDBA_X86
extern const lordba_kernels lordba_kernels_avx2;
extern const lordba_kernels lordba_kernels_avx512;
#elif defined(__aarch64__)
extern const lordba_kernels lordba_kernels_neon;
extern const lordba_kernels lordba_kernels_i8mm;
#endif

#define UNROLLED static inline __attribute__((always_inline))

static inline size_t lordba_element_bytes(lordba_dtype dtype) { return dtype == LORDBA_F32 ? 4 : 2; }

/* Element i of an array of any dtype. */
static inline void* lordba_element(const void* array, size_t i, lordba_dtype dtype) {
  return (uint8_t*)array + i * lordba_element_bytes(dtype);
}

/* Bytes of the rows of B that sum_ranks reads: 1, 2, 4 or 8. */
static inline size_t lordba_row_width(size_t ranks) { return ranks <= 8 ? 1 : ranks <= 16 ? 2 : ranks <= 32 ? 4 : 8; }

/* Constant-size copies that compilers turn into plain loads. */
static inline uint32_t lordba_load_u32(const uint8_t* p) {
  uint32_t value;
  __builtin_memcpy(&value, p, sizeof value);
  return value;
}

static inline uint16_t lordba_load_u16(const uint8_t* p) {
  uint16_t value;
  __builtin_memcpy(&value, p, sizeof value);
  return value;
}

static inline float lordba_load_f32(const uint8_t* p) {
  float value;
  __builtin_memcpy(&value, p, sizeof value);
  return value;
}

#endif
