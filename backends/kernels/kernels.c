/* The two stages, cut into tiles that live on a small stack: 12 KiB at most, whatever r and d are. */
#include "tiles.h"

enum { OUTPUTS = 1024 }; /* stage 2 tile: its words and scales fit the first-level cache */

static size_t at_most(size_t value, size_t limit) { return value < limit ? value : limit; }

size_t lordba_padded_rank(const lordba_module* module) {
  return ((size_t)module->r + LORDBA_LANES - 1) / LORDBA_LANES * LORDBA_LANES;
}

size_t lordba_chunks(const lordba_module* module) { return ((size_t)module->d_in + LORDBA_CHUNK - 1) / LORDBA_CHUNK; }

double lordba_cost(const lordba_kernels* kernels, const lordba_module* module, size_t tokens) {
  const double channels = (double)module->d_in + module->d_out;
  return (double)tokens * (double)lordba_padded_rank(module) * channels / kernels->rate;
}

bool lordba_is_zero(const lordba_kernels* kernels, const lordba_module* module) {
  if (module->r == 0) return true;
  float scales[LORDBA_LANES];
  for (size_t o = 0; o < module->d_out; o += LORDBA_LANES) {
    const size_t n = at_most(module->d_out - o, LORDBA_LANES);
    kernels->decode(&module->s_out, o, n, scales);
    for (size_t i = 0; i < n; ++i) {
      if (scales[i] != 0.0f) return false;
    }
  }
  return true;
}

void lordba_sum_inputs(const lordba_kernels* kernels, const lordba_module* module, const float* x, size_t x_stride,
                       size_t tokens, size_t begin, size_t end, float* sums) {
  const size_t stride = lordba_padded_rank(module), row_bytes = ((size_t)module->d_in + 7) / 8;
  float s_in[LORDBA_CHUNK];
  uint32_t words[LORDBA_WORDS * LORDBA_MAX_RANKS];
  for (size_t chunk = begin; chunk < end; ++chunk) {
    const size_t first = chunk * LORDBA_CHUNK, n = at_most(module->d_in - first, LORDBA_CHUNK);
    kernels->decode(&module->s_in, first, n, s_in);
    for (size_t i = n; i % LORDBA_WORD != 0; ++i) s_in[i] = 0.0f;
    for (size_t rank = 0; rank < module->r; rank += LORDBA_MAX_RANKS) {
      const size_t rows = at_most(module->r - rank, LORDBA_MAX_RANKS);
      const size_t blocks = (rows + LORDBA_LANES - 1) / LORDBA_LANES;
      kernels->pack_a(module->a_signs + rank * row_bytes + first / 8, row_bytes, rows, (n + 7) / 8, blocks, words);
      kernels->sum_inputs(x + first, x_stride, tokens, n, s_in, words, blocks, sums + rank, stride);
    }
  }
}

void lordba_scale_ranks(const lordba_kernels* kernels, const lordba_module* module, size_t tokens, size_t partials,
                        float* sums) {
  const size_t stride = lordba_padded_rank(module);
  float s_mid[LORDBA_LANES];
  for (size_t rank = 0; rank < module->r; rank += LORDBA_LANES) {
    const size_t n = at_most(module->r - rank, LORDBA_LANES);
    kernels->decode(&module->s_mid, rank, n, s_mid);
    for (size_t t = 0; t < tokens; ++t) {
      float* h = sums + t * stride + rank;
      for (size_t p = 1; p < partials; ++p) {
        for (size_t j = 0; j < n; ++j) h[j] += h[p * tokens * stride + j];
      }
      for (size_t j = 0; j < n; ++j) h[j] *= s_mid[j];
      for (size_t j = n; j < LORDBA_LANES; ++j) h[j] = 0.0f;
    }
  }
}

/* words[i] = the signs of up to 32 ranks of output i, from `bytes` bytes of each row; zeros up to the next tile. */
static void pack_b(const uint8_t* b, size_t row_bytes, size_t bytes, size_t n, uint32_t* words) {
  if (row_bytes == 2 && bytes == 2) {
    for (size_t i = 0; i < n; ++i) words[i] = lordba_load_u16(b + 2 * i);
  } else if (bytes == 4) {
    for (size_t i = 0; i < n; ++i) words[i] = lordba_load_u32(b + row_bytes * i);
  } else {
    for (size_t i = 0; i < n; ++i) {
      uint32_t word = 0;
      for (size_t k = 0; k < bytes; ++k) word |= (uint32_t)b[row_bytes * i + k] << 8 * k;
      words[i] = word;
    }
  }
  for (size_t i = n; i % LORDBA_LANES != 0; ++i) words[i] = 0;
}

void lordba_sum_ranks(const lordba_kernels* kernels, const lordba_module* module, const float* h, size_t tokens,
                      size_t begin, size_t end, const float* base, size_t base_stride, float* y, size_t y_stride) {
  const size_t h_stride = lordba_padded_rank(module), row_bytes = ((size_t)module->r + 7) / 8;
  float s_out[OUTPUTS];
  uint32_t words[OUTPUTS];
  for (size_t o = begin; o < end; o += OUTPUTS) {
    const size_t n = at_most(end - o, OUTPUTS);
    kernels->decode(&module->s_out, o, n, s_out);
    for (size_t rank = 0; rank < module->r; rank += LORDBA_WORD) {
      const size_t bytes = at_most(row_bytes - rank / 8, LORDBA_WORD / 8);
      pack_b(module->b_signs + o * row_bytes + rank / 8, row_bytes, bytes, n, words);
      kernels->sum_ranks(h + rank, h_stride, tokens, module->r - rank <= LORDBA_LANES, words, n, s_out, rank == 0,
                         rank + LORDBA_WORD >= module->r, base ? base + o : NULL, base_stride, y + o, y_stride);
    }
  }
}
