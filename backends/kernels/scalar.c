/* The reference twin of every tile, in plain C: what the others are compared with, and what runs where none exists. */
#include "tiles.h"

static float half_to_float(uint16_t half) {
  const uint32_t sign = (uint32_t)(half & 0x8000) << 16, exponent = half >> 10 & 31, mantissa = half & 1023;
  if (exponent == 0) { /* zero or subnormal: mantissa * 2^-24 */
    const float value = (float)mantissa * 0x1p-24f;
    return sign ? -value : value;
  }
  const uint32_t bits = sign | (exponent == 31 ? 255u : exponent + 112) << 23 | mantissa << 13;
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

static void decode_scalar(const lordba_scales* scales, size_t begin, size_t n, float* out) {
  const uint8_t* values = scales->values;
  switch (scales->code) {
    case LORDBA_FP32:
      for (size_t i = 0; i < n; ++i) out[i] = lordba_load_f32(values + 4 * (begin + i));
      break;
    case LORDBA_FP16:
      for (size_t i = 0; i < n; ++i) out[i] = half_to_float(lordba_load_u16(values + 2 * (begin + i)));
      break;
    case LORDBA_INT8: {
      const float lo = lordba_load_f32(scales->meaning), step = lordba_load_f32(scales->meaning + 4);
      for (size_t i = 0; i < n; ++i) {
        const uint8_t code = values[begin + i];
        out[i] = code ? lo + step * (float)(code - 1) : 0.0f;
      }
      break;
    }
    case LORDBA_LOG4:
      for (size_t i = 0; i < n; ++i) {
        const size_t code = values[(begin + i) / 2] >> 4 * ((begin + i) % 2) & 15;
        out[i] = lordba_load_f32(scales->meaning + 4 * code);
      }
      break;
  }
}

void lordba_pack_a_scalar(const uint8_t* a, size_t row_bytes, size_t rows, size_t bytes, size_t blocks,
                          uint32_t* words) {
  const size_t lanes = blocks * LORDBA_LANES;
  for (size_t w = 0; 4 * w < bytes; ++w) {
    const size_t used = bytes - 4 * w;
    for (size_t j = 0; j < lanes; ++j) {
      uint32_t word = 0;
      if (j < rows) {
        const uint8_t* p = a + j * row_bytes + 4 * w;
        if (used >= 4) {
          word = lordba_load_u32(p);
        } else {
          for (size_t k = 0; k < used; ++k) word |= (uint32_t)p[k] << 8 * k;
        }
      }
      words[w * lanes + j] = word;
    }
  }
}

/* value, negated if bit `i` of the word is set; without a branch, so that compilers use what vectors there are. */
static inline float signed_by(float value, uint32_t word, size_t i) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  bits ^= word >> i << 31;
  __builtin_memcpy(&value, &bits, sizeof bits);
  return value;
}

static void sum_inputs_16r_scalar(const float* x, size_t x_stride, size_t tokens, size_t n, const float* s_in,
                                  const uint32_t* words, size_t blocks, float* sums, size_t sums_stride) {
  const size_t lanes = blocks * LORDBA_LANES;
  for (size_t t = 0; t < tokens; ++t) {
    for (size_t block = 0; block < lanes; block += LORDBA_LANES) {
      float acc[4][LORDBA_LANES];
      for (size_t i = 0; i < 4; ++i) {
        for (size_t j = 0; j < LORDBA_LANES; ++j) acc[i][j] = 0.0f;
      }
      for (size_t k = 0; k < n; ++k) {
        const float value = x[t * x_stride + k] * s_in[k];
        const uint32_t* word = words + k / LORDBA_WORD * lanes + block;
        for (size_t j = 0; j < LORDBA_LANES; ++j) acc[k % 4][j] += signed_by(value, word[j], k % LORDBA_WORD);
      }
      float* out = sums + t * sums_stride + block;
      for (size_t j = 0; j < LORDBA_LANES; ++j) out[j] += (acc[0][j] + acc[1][j]) + (acc[2][j] + acc[3][j]);
    }
  }
}

static void sum_ranks_16o_scalar(const float* h, size_t h_stride, size_t tokens, bool narrow, const uint32_t* words,
                                 size_t n, const float* s_out, bool first, bool last, const float* base,
                                 size_t base_stride, float* y, size_t y_stride) {
  const size_t ranks = narrow ? LORDBA_LANES : LORDBA_WORD;
  for (size_t t = 0; t < tokens; ++t) {
    for (size_t o = 0; o < n; o += LORDBA_LANES) {
      const size_t lanes = n - o < LORDBA_LANES ? n - o : LORDBA_LANES;
      float acc[LORDBA_LANES];
      for (size_t i = 0; i < LORDBA_LANES; ++i) acc[i] = 0.0f;
      for (size_t j = 0; j < ranks; ++j) {
        for (size_t i = 0; i < LORDBA_LANES; ++i) acc[i] += signed_by(h[t * h_stride + j], words[o + i], j);
      }
      float* out = y + t * y_stride + o;
      for (size_t i = 0; i < lanes; ++i) {
        const float sum = first ? acc[i] : out[i] + acc[i];
        out[i] = !last ? sum : base ? base[t * base_stride + o + i] + s_out[o + i] * sum : s_out[o + i] * sum;
      }
    }
  }
}

const lordba_kernels lordba_kernels_scalar = {
    .name = "scalar",
    .rate = 8000,
    .decode = decode_scalar,
    .pack_a = lordba_pack_a_scalar,
    .sum_inputs = sum_inputs_16r_scalar,
    .sum_ranks = sum_ranks_16o_scalar,
};
