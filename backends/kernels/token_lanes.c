/* The lanes are tokens, and a nibble of signs as stored picks one of 16 ready sums: the way of many tokens. */
#include "stages.h"

enum { OUTPUTS = 64 }; /* outputs of one step: their sums fit the first-level cache beside the tables */

static size_t sum_floats(const lordba_module* module, size_t tokens) {
  (void)tokens;
  return lordba_padded_rank(module) * LORDBA_TOKENS;
}

static void sum_chunk(const lordba_kernels* kernels, const lordba_call* tile, const lordba_module* module, size_t chunk,
                      float* sums) {
  const size_t first = chunk * LORDBA_CHUNK, n = lordba_at_most(module->d_in - first, LORDBA_CHUNK);
  const size_t row_bytes = lordba_ceil_div(module->d_in, 8);
  float s_in[LORDBA_CHUNK];
  _Alignas(LORDBA_ALIGNMENT) float tables[LORDBA_GROUPS * LORDBA_TABLE];
  kernels->decode(&module->s_in, first, n, s_in);
  for (size_t i = 0; i < n; i += LORDBA_BLOCK) {
    const size_t block = lordba_at_most(n - i, LORDBA_BLOCK);
    const void* x = lordba_element(tile->x, first + i, tile->dtype);
    kernels->input_tables(x, tile->x_stride, tile->dtype, tile->tokens, block, s_in + i, tables);
    kernels->sum_tables(tables, tile->tokens, module->a_signs + (first + i) / 8, row_bytes, lordba_ceil_div(block, 8),
                        module->r, i != 0, sums);
  }
}

static void scale_ranks(const lordba_kernels* kernels, const lordba_module* module, size_t tokens, const float* sums,
                        float* h) {
  for (size_t rank = 0; rank < module->r; rank += LORDBA_LANES) {
    float s_mid[LORDBA_LANES];
    const size_t n = lordba_at_most(module->r - rank, LORDBA_LANES);
    kernels->decode(&module->s_mid, rank, n, s_mid);
    for (size_t j = 0; j < n; ++j, h += LORDBA_TOKENS, sums += LORDBA_TOKENS) {
      for (size_t t = 0; t < tokens; ++t) h[t] = s_mid[j] * sums[t];
    }
  }
}

static void sum_outputs(const lordba_kernels* kernels, const lordba_call* tile, const lordba_module* module,
                        size_t column, size_t begin, size_t end, const float* h) {
  const size_t row_bytes = lordba_ceil_div(module->r, 8);
  float s_out[OUTPUTS];
  _Alignas(LORDBA_ALIGNMENT) float tables[LORDBA_GROUPS * LORDBA_TABLE], sums[OUTPUTS * LORDBA_TOKENS];
  for (size_t o = begin; o < end; o += OUTPUTS) {
    const size_t n = lordba_at_most(end - o, OUTPUTS);
    for (size_t rank = 0; rank < module->r; rank += LORDBA_BLOCK) {
      const size_t ranks = lordba_at_most(module->r - rank, LORDBA_BLOCK);
      /* With one block of ranks, its tables serve all outputs. */
      if (o == begin || module->r > LORDBA_BLOCK) {
        kernels->rank_tables(h + rank * LORDBA_TOKENS, ranks, tile->tokens, tables);
      }
      kernels->sum_tables(tables, tile->tokens, module->b_signs + o * row_bytes + rank / 8, row_bytes,
                          lordba_ceil_div(ranks, 8), n, rank != 0, sums);
    }
    kernels->decode(&module->s_out, o, n, s_out);
    const void* base = tile->base ? lordba_element(tile->base, column + o, tile->dtype) : NULL;
    kernels->store(sums, tile->tokens, n, s_out, base, tile->base_stride,
                   lordba_element(tile->y, column + o, tile->dtype), tile->y_stride, tile->dtype);
  }
}

const lordba_stages lordba_token_lanes = {
    .sum_floats = sum_floats,
    .sum_chunk = sum_chunk,
    .scale_ranks = scale_ranks,
    .sum_outputs = sum_outputs,
};
