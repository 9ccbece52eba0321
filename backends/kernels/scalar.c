/* The reference twin of every tile, in plain C: what the others are compared with, and what runs where none exists. */
#include "tiles.h"

static float from_bits(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

static uint32_t to_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}

static float half_to_float(uint16_t half) {
  const uint32_t sign = (uint32_t)(half & 0x8000) << 16, exponent = half >> 10 & 31, mantissa = half & 1023;
  if (exponent == 0) { /* zero or subnormal: mantissa * 2^-24 */
    const float value = (float)mantissa * 0x1p-24f;
    return sign ? -value : value;
  }
  return from_bits(sign | (exponent == 31 ? 255u : exponent + 112) << 23 | mantissa << 13);
}

/* Round to nearest, ties to even, as the hardware does. */
static uint16_t float_to_half(float value) {
  const uint32_t bits = to_bits(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return (uint16_t)(sign | 0x7e00 | (magnitude >> 13 & 0x1ff)); /* NaN, quiet */
  if (magnitude >= 0x477ff000) return (uint16_t)(sign | 0x7c00);                            /* rounds to infinity */
  if (magnitude < 0x38800000) { /* subnormal: adding 0.5 leaves the rounded multiple of 2^-24 in the last bits */
    return (uint16_t)(sign | (to_bits(from_bits(magnitude) + 0.5f) - to_bits(0.5f)));
  }
  return (uint16_t)(sign | (magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000) >> 13);
}

static uint16_t float_to_bfloat(float value) {
  const uint32_t bits = to_bits(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40); /* NaN, quiet */
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float lordba_load_scalar(const void* p, lordba_dtype dtype, size_t i) {
  if (dtype == LORDBA_F32) return lordba_load_f32((const uint8_t*)p + 4 * i);
  const uint16_t bits = lordba_load_u16((const uint8_t*)p + 2 * i);
  return dtype == LORDBA_F16 ? half_to_float(bits) : from_bits((uint32_t)bits << 16);
}

void lordba_store_scalar(void* p, lordba_dtype dtype, size_t i, float value) {
  if (dtype == LORDBA_F32) {
    __builtin_memcpy((uint8_t*)p + 4 * i, &value, 4);
  } else {
    const uint16_t bits = dtype == LORDBA_F16 ? float_to_half(value) : float_to_bfloat(value);
    __builtin_memcpy((uint8_t*)p + 2 * i, &bits, 2);
  }
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
  return from_bits(to_bits(value) ^ word >> i << 31);
}

static void sum_inputs_scalar(const void* x, size_t x_stride, lordba_dtype dtype, size_t tokens, size_t n,
                              const float* s_in, const uint32_t* words, size_t blocks, float* sums,
                              size_t sums_stride) {
  const size_t lanes = blocks * LORDBA_LANES;
  for (size_t t = 0; t < tokens; ++t, sums += sums_stride) {
    for (size_t block = 0; block < lanes; block += LORDBA_LANES) {
      float acc[4][LORDBA_LANES];
      for (size_t i = 0; i < 4; ++i) {
        for (size_t j = 0; j < LORDBA_LANES; ++j) acc[i][j] = 0.0f;
      }
      for (size_t k = 0; k < n; ++k) {
        const float value = lordba_load_scalar(x, dtype, t * x_stride + k) * s_in[k];
        const uint32_t* word = words + k / LORDBA_WORD * lanes + block;
        for (size_t j = 0; j < LORDBA_LANES; ++j) acc[k % 4][j] += signed_by(value, word[j], k % LORDBA_WORD);
      }
      for (size_t j = 0; j < LORDBA_LANES; ++j) sums[block + j] = (acc[0][j] + acc[1][j]) + (acc[2][j] + acc[3][j]);
    }
  }
}

/* The signs of ranks [0, 32) or [32, 64) of an output, from a row of 1, 2, 4 or 8 bytes. */
static uint32_t row_word(const uint8_t* row, size_t width, bool upper) {
  if (upper) return lordba_load_u32(row + 4);
  return width == 1 ? row[0] : width == 2 ? lordba_load_u16(row) : lordba_load_u32(row);
}

static void sum_ranks_scalar(const float* h, size_t h_stride, size_t tokens, size_t ranks, const uint8_t* b, size_t n,
                             const float* s_out, const float* carry_in, float* carry_out, const void* base,
                             size_t base_stride, void* y, size_t y_stride, lordba_dtype dtype) {
  const size_t width = ranks <= 8 ? 1 : ranks <= 16 ? 2 : ranks <= 32 ? 4 : 8;
  for (size_t t = 0; t < tokens; ++t, h += h_stride) {
    for (size_t first = 0; first < n; first += LORDBA_LANES) {
      const size_t lanes = n - first < LORDBA_LANES ? n - first : LORDBA_LANES;
      float acc[LORDBA_LANES];
      for (size_t i = 0; i < LORDBA_LANES; ++i) acc[i] = carry_in && i < lanes ? carry_in[first + i] : 0.0f;
      for (size_t rank = 0; rank < ranks; rank += LORDBA_WORD) {
        uint32_t word[LORDBA_LANES];
        for (size_t i = 0; i < LORDBA_LANES; ++i) word[i] = row_word(b + (first + i) * width, width, rank != 0);
        for (size_t j = rank; j < ranks && j < rank + LORDBA_WORD; ++j) {
          for (size_t i = 0; i < LORDBA_LANES; ++i) acc[i] += signed_by(h[j], word[i], j % LORDBA_WORD);
        }
      }
      for (size_t i = 0; i < lanes; ++i) {
        const size_t o = first + i;
        if (carry_out) {
          carry_out[o] = acc[i];
        } else {
          const float value = acc[i] * s_out[o];
          lordba_store_scalar(y, dtype, t * y_stride + o,
                              base ? lordba_load_scalar(base, dtype, t * base_stride + o) + value : value);
        }
      }
    }
  }
}

/* Lane t of the table of 4 values. */
static void make_table(const float v[4], float* table) {
  for (size_t e = 0; e < 8; ++e) {
    const float ab = (e & 1 ? -v[0] : v[0]) + (e & 2 ? -v[1] : v[1]);
    const float sum = ab + ((e & 4 ? -v[2] : v[2]) + v[3]);
    table[e * LORDBA_TOKENS] = sum;
    table[(15 - e) * LORDBA_TOKENS] = -sum;
  }
}

static void input_tables_scalar(const void* x, size_t x_stride, lordba_dtype dtype, size_t tokens, size_t n,
                                const float* s_in, float* tables) {
  for (size_t i = 0; i < (n + 7) / 8 * 8; i += LORDBA_GROUP, tables += LORDBA_TABLE) {
    for (size_t t = 0; t < tokens; ++t) {
      float v[LORDBA_GROUP];
      for (size_t k = 0; k < LORDBA_GROUP; ++k) {
        v[k] = i + k < n ? s_in[i + k] * lordba_load_scalar(x, dtype, t * x_stride + i + k) : 0.0f;
      }
      make_table(v, tables + t);
    }
  }
}

static void rank_tables_scalar(const float* h, size_t n, size_t tokens, float* tables) {
  for (size_t j = 0; j < (n + 7) / 8 * 8; j += LORDBA_GROUP, tables += LORDBA_TABLE) {
    for (size_t t = 0; t < tokens; ++t) {
      float v[LORDBA_GROUP];
      for (size_t k = 0; k < LORDBA_GROUP; ++k) v[k] = j + k < n ? h[(j + k) * LORDBA_TOKENS + t] : 0.0f;
      make_table(v, tables + t);
    }
  }
}

static void sum_tables_scalar(const float* tables, size_t tokens, const uint8_t* signs, size_t row_bytes, size_t bytes,
                              size_t rows, bool add, float* sums) {
  for (size_t row = 0; row < rows; ++row, signs += row_bytes, sums += LORDBA_TOKENS) {
    float acc[LORDBA_TOKENS];
    for (size_t group = 0; group < 2 * bytes; ++group) {
      const size_t entry = signs[group / 2] >> 4 * (group % 2) & 15;
      const float* values = tables + group * LORDBA_TABLE + entry * LORDBA_TOKENS;
      for (size_t t = 0; t < tokens; ++t) acc[t] = group == 0 ? values[t] : acc[t] + values[t];
    }
    for (size_t t = 0; t < tokens; ++t) sums[t] = add ? sums[t] + acc[t] : acc[t];
  }
}

static void store_scalar(const float* sums, size_t tokens, size_t n, const float* s_out, const void* base,
                         size_t base_stride, void* y, size_t y_stride, lordba_dtype dtype) {
  for (size_t t = 0; t < tokens; ++t) {
    for (size_t o = 0; o < n; ++o) {
      const float value = s_out[o] * sums[o * LORDBA_TOKENS + t];
      lordba_store_scalar(y, dtype, t * y_stride + o,
                          base ? lordba_load_scalar(base, dtype, t * base_stride + o) + value : value);
    }
  }
}

const lordba_kernels lordba_kernels_scalar = {
    .name = "scalar",
    .rate_decode = 6000,
    .rate_prefill = 20000,
    .rank_lanes_up_to = 4,
    .decode = decode_scalar,
    .pack_a = lordba_pack_a_scalar,
    .sum_inputs = sum_inputs_scalar,
    .sum_ranks = sum_ranks_scalar,
    .input_tables = input_tables_scalar,
    .rank_tables = rank_tables_scalar,
    .sum_tables = sum_tables_scalar,
    .store = store_scalar,
};
