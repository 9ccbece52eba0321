/* The lanes are ranks in stage 1 and outputs in stage 2: the way of few tokens, and of vectors that hold a table. */
#include "prefetch.h"
#include "stages.h"

static size_t sum_floats(const lordba_module* module, size_t tokens) { return tokens * lordba_padded_rank(module); }

static void sum_chunk(const lordba_kernels* kernels, const lordba_call* tile, const lordba_module* module, size_t chunk,
                      float* sums) {
  const size_t first = chunk * LORDBA_CHUNK, n = lordba_at_most(module->d_in - first, LORDBA_CHUNK);
  const size_t stride = lordba_padded_rank(module), row_bytes = lordba_ceil_div(module->d_in, 8);
  float s_in[LORDBA_CHUNK];
  uint32_t packed[LORDBA_WORDS * LORDBA_MAX_RANKS + 1]; /* words can be read up to 3 bytes too far */
  lordba_prefetch_ahead(module, chunk);
  kernels->decode(&module->s_in, first, n, s_in);
  for (size_t i = n; i % LORDBA_WORD != 0; ++i) s_in[i] = 0.0f;
  for (size_t rank = 0; rank < module->r; rank += LORDBA_MAX_RANKS) {
    const size_t rows = lordba_at_most(module->r - rank, LORDBA_MAX_RANKS);
    const size_t blocks = lordba_ceil_div(rows, LORDBA_LANES);
    const uint32_t* words = packed;
    if (module->a_words) {
      words = module->a_words + chunk * LORDBA_WORDS * stride + lordba_ceil_div(n, LORDBA_WORD) * rank;
    } else {
      kernels->pack_a(module->a_signs + rank * row_bytes + first / 8, row_bytes, rows, lordba_ceil_div(n, 8), blocks,
                      packed);
    }
    kernels->sum_inputs(lordba_element(tile->x, first, tile->dtype), tile->x_stride, tile->dtype, tile->tokens, n, s_in,
                        words, blocks, sums + rank, stride);
  }
}

static void scale_ranks(const lordba_kernels* kernels, const lordba_module* module, size_t tokens, const float* sums,
                        float* h) {
  const size_t ranks = lordba_padded_rank(module);
  for (size_t rank = 0; rank < ranks; rank += LORDBA_LANES) {
    float s_mid[LORDBA_LANES];
    const size_t n = lordba_at_most(module->r - rank, LORDBA_LANES);
    kernels->decode(&module->s_mid, rank, n, s_mid);
    for (size_t t = 0; t < tokens; ++t) {
      for (size_t j = 0; j < LORDBA_LANES; ++j) {
        h[t * ranks + rank + j] = j < n ? s_mid[j] * sums[t * ranks + rank + j] : 0.0f;
      }
    }
  }
}

/* The `bytes` bytes at `from` of each of n rows as rows of `width` bytes; zeros for what is not there. */
static const uint8_t* repack_rows(const uint8_t* from, size_t row_bytes, size_t bytes, size_t n, size_t width,
                                  uint8_t* rows) {
  const size_t padded = lordba_ceil_div(n, LORDBA_LANES) * LORDBA_LANES;
  for (size_t o = 0; o < padded; ++o) {
    for (size_t k = 0; k < width; ++k) rows[o * width + k] = o < n && k < bytes ? from[o * row_bytes + k] : 0;
  }
  return rows;
}

/* One step: n outputs from output `first` on. */
static void sum_step(const lordba_kernels* kernels, const lordba_call* tile, const lordba_module* module, size_t column,
                     size_t first, size_t n, const float* h) {
  const size_t row_bytes = lordba_ceil_div(module->r, 8), stride = lordba_padded_rank(module);
  float s_out[LORDBA_OUTPUTS], carry[LORDBA_OUTPUTS];
  uint8_t packed[LORDBA_OUTPUTS * LORDBA_MAX_RANKS / 8];
  kernels->decode(&module->s_out, first, n, s_out);
  for (size_t rank = 0; rank < module->r; rank += LORDBA_MAX_RANKS) {
    const size_t ranks = lordba_at_most(module->r - rank, LORDBA_MAX_RANKS), bytes = lordba_ceil_div(ranks, 8);
    const size_t width = bytes <= 2 ? bytes : bytes <= 4 ? 4 : 8;
    const uint8_t* rows = module->b_signs + first * row_bytes + rank / 8;
    if (row_bytes != width || n % LORDBA_LANES != 0) rows = repack_rows(rows, row_bytes, bytes, n, width, packed);
    const void* base = tile->base ? lordba_element(tile->base, column + first, tile->dtype) : NULL;
    /* More than one step over the ranks happens for one token at a time only: see sum_outputs. */
    kernels->sum_ranks(h + rank, stride, tile->tokens, ranks, rows, n, s_out, rank ? carry : NULL,
                       rank + LORDBA_MAX_RANKS < module->r ? carry : NULL, base, tile->base_stride,
                       lordba_element(tile->y, column + first, tile->dtype), tile->y_stride, tile->dtype);
  }
}

static void sum_outputs(const lordba_kernels* kernels, const lordba_call* tile, const lordba_module* module,
                        size_t column, size_t begin, size_t end, const float* h) {
  const bool together = module->r <= LORDBA_MAX_RANKS;
  for (size_t t = 0; t < (together ? 1 : tile->tokens); ++t) {
    lordba_call part = *tile;
    if (!together) {
      part.tokens = 1;
      part.base = part.base ? lordba_element(part.base, t * part.base_stride, part.dtype) : NULL;
      part.y = lordba_element(part.y, t * part.y_stride, part.dtype);
    }
    for (size_t o = begin; o < end; o += LORDBA_OUTPUTS) {
      sum_step(kernels, &part, module, column, o, lordba_at_most(end - o, LORDBA_OUTPUTS),
               h + t * lordba_padded_rank(module));
    }
  }
}

const lordba_stages lordba_rank_lanes = {
    .sum_floats = sum_floats,
    .sum_chunk = sum_chunk,
    .scale_ranks = scale_ranks,
    .sum_outputs = sum_outputs,
};
