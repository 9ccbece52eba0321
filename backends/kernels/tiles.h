/* What one instruction set provides: small tiles on packed 32-bit words. kernels.c cuts the stages into them. */
#ifndef LORDBA_TILES_H
#define LORDBA_TILES_H

#include "lordba_kernels.h"

enum {
  LORDBA_WORD = 32,                          /* signs per packed word */
  LORDBA_WORDS = LORDBA_CHUNK / LORDBA_WORD, /* words per rank in a chunk */
  LORDBA_MAX_BLOCKS = 4,                     /* blocks of LORDBA_LANES ranks that share one pass over x */
  LORDBA_MAX_RANKS = LORDBA_MAX_BLOCKS * LORDBA_LANES,
};

struct lordba_kernels {
  const char* name;
  float rate; /* signed additions per microsecond and thread in a warm prefill, measured roughly */

  /* Decodes scales [begin, begin + n) into out; may write up to the next multiple of LORDBA_LANES. begin is even. */
  void (*decode)(const lordba_scales* scales, size_t begin, size_t n, float* out);

  /* Turns a chunk of A, `rows` rows of `bytes` <= 64 bytes, into words[word][lane]: bit i of word w of lane j is the
   * sign of A[j][32 w + i]. Rows and bits that are not there become 0. */
  void (*pack_a)(const uint8_t* a, size_t row_bytes, size_t rows, size_t bytes, size_t blocks, uint32_t* words);

  /* sums[t][j] += signed sum over the chunk's n inputs of s_in * x, for blocks * LORDBA_LANES ranks.
   * s_in is padded with zeros to a multiple of LORDBA_WORD. */
  void (*sum_inputs)(const float* x, size_t x_stride, size_t tokens, size_t n, const float* s_in, const uint32_t* words,
                     size_t blocks, float* sums, size_t sums_stride);

  /* Stage 2 over at most 32 ranks (16 if `narrow`) and n outputs; words[o] holds the signs of output o.
   * `first` starts from zero, otherwise from the raw sums in y; `last` applies s_out and base. */
  void (*sum_ranks)(const float* h, size_t h_stride, size_t tokens, bool narrow, const uint32_t* words, size_t n,
                    const float* s_out, bool first, bool last, const float* base, size_t base_stride, float* y,
                    size_t y_stride);
};

extern const lordba_kernels lordba_kernels_scalar;
void lordba_pack_a_scalar(const uint8_t* a, size_t row_bytes, size_t rows, size_t bytes, size_t blocks,
                          uint32_t* words);

#if defined(__x86_64__)
extern const lordba_kernels lordba_kernels_avx2;
extern const lordba_kernels lordba_kernels_avx512;
#endif

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
