/* Loads started early. A model's adapters come from memory once per token, in pieces too short for the hardware to
 * foresee: without this a cold call waits for one after the other. */
#ifndef LORDBA_PREFETCH_H
#define LORDBA_PREFETCH_H

#include "stages.h"

enum { LORDBA_CACHE_LINE = 64 };

/* What a call reads first. */
static inline void lordba_prefetch_heads(const lordba_module* module) {
  const lordba_scales* const scales[3] = {&module->s_out, &module->s_in, &module->s_mid};
  for (size_t i = 0; i < 3; ++i) {
    __builtin_prefetch(scales[i]->values);
    __builtin_prefetch(scales[i]->meaning);
  }
  for (size_t j = 0; j < module->r; ++j) { /* one row of a chunk of A is a cache line */
    __builtin_prefetch(module->a_words ? (const uint8_t*)module->a_words + j * LORDBA_CACHE_LINE
                                       : module->a_signs + j * lordba_ceil_div(module->d_in, 8));
  }
}

/* Bytes [part / parts, (part + 1) / parts) of an array. */
static inline void lordba_prefetch(const void* array, size_t bytes, size_t part, size_t parts) {
  const uint8_t* p = array;
  for (size_t i = bytes * part / parts; i < bytes * (part + 1) / parts; i += LORDBA_CACHE_LINE)
    __builtin_prefetch(p + i);
}

/* While chunk `chunk` of stage 1 runs, signs and scales of the next two come, and a share of those of stage 2. */
static inline void lordba_prefetch_ahead(const lordba_module* module, size_t chunk) {
  const size_t chunks = lordba_ceil_div(module->d_in, LORDBA_CHUNK), row_bytes = lordba_ceil_div(module->d_in, 8);
  for (size_t next = chunk == 0 ? 1 : chunk + 2; next < chunks && next <= chunk + 2; ++next) {
    lordba_prefetch(module->s_in.values, lordba_value_bytes(module->s_in.code, module->d_in), next, chunks);
    if (module->a_words) {
      lordba_prefetch(module->a_words, row_bytes * lordba_padded_rank(module), next, chunks);
    } else {
      for (size_t j = 0; j < module->r; ++j) {
        __builtin_prefetch(module->a_signs + j * row_bytes + next * LORDBA_CHUNK / 8);
      }
    }
  }
  lordba_prefetch(module->b_signs, (size_t)module->d_out * lordba_ceil_div(module->r, 8), chunk, chunks);
  lordba_prefetch(module->s_out.values, lordba_value_bytes(module->s_out.code, module->d_out), chunk, chunks);
}

#endif
