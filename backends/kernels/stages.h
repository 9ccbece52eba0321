/* The two stages of one module for the up to LORDBA_TOKENS tokens of one tile, in two ways. */
#ifndef LORDBA_STAGES_H
#define LORDBA_STAGES_H

#include "tiles.h"

typedef struct {
  /* Floats of the sums of one chunk, or of h. */
  size_t (*sum_floats)(const lordba_module* module, size_t tokens);

  /* Stage 1: sums = the signed sums over one chunk of the inputs. */
  void (*sum_chunk)(const lordba_kernels* kernels, const lordba_call* tile, const lordba_module* module, size_t chunk,
                    float* sums);

  /* Between the stages: h = s_mid * sums, padded as stage 2 wants it; h may be sums. */
  void (*scale_ranks)(const lordba_kernels* kernels, const lordba_module* module, size_t tokens, const float* sums,
                      float* h);

  /* Stage 2: outputs [begin, end) of a module whose output 0 is column `column` of y; begin is a multiple of 64. */
  void (*sum_outputs)(const lordba_kernels* kernels, const lordba_call* tile, const lordba_module* module,
                      size_t column, size_t begin, size_t end, const float* h);
} lordba_stages;

extern const lordba_stages lordba_rank_lanes;  /* the lanes are ranks, then outputs */
extern const lordba_stages lordba_token_lanes; /* the lanes are tokens */

static inline size_t lordba_at_most(size_t value, size_t limit) { return value < limit ? value : limit; }
static inline size_t lordba_ceil_div(size_t value, size_t by) { return (value + by - 1) / by; }

/* Bytes of n scales without what their codes mean. */
static inline size_t lordba_value_bytes(lordba_scale_code code, size_t n) {
  return code == LORDBA_FP32 ? 4 * n : code == LORDBA_FP16 ? 2 * n : code == LORDBA_INT8 ? n : (n + 1) / 2;
}

static inline size_t lordba_padded_rank(const lordba_module* module) {
  return lordba_ceil_div(module->r, LORDBA_LANES) * LORDBA_LANES;
}

/* Element i of an array of any dtype. */
static inline void* lordba_element(const void* array, size_t i, lordba_dtype dtype) {
  return (uint8_t*)array + i * (dtype == LORDBA_F32 ? 4 : 2);
}

#endif
