/*
 * The many-token tiles for vectors of any width, included by an instruction set's file after it defines
 *   WIDTH                      floats of a vector, a divisor of LORDBA_TOKENS
 *   vector                     a GNU vector of WIDTH floats
 *   load_n(p, dtype, i, n)     elements [i, i + n) at p as floats, n <= WIDTH, zeros after them
 *   store_n(p, dtype, i, n, v) the first n floats of v as elements [i, i + n) at p
 *   transpose(rows)            a WIDTH x WIDTH block in place
 * Every width adds in the same order, so that all instruction sets give bitwise the same result.
 */
#include "tiles.h"

#define UNROLLED static inline __attribute__((always_inline))

UNROLLED vector zeros(void) { return (vector){0}; }

UNROLLED vector load(const float* p) {
  vector v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

UNROLLED void store(float* p, vector v) { __builtin_memcpy(p, &v, sizeof v); }

/* Vectors that hold the lanes of `tokens` tokens. */
UNROLLED size_t columns_of(size_t tokens) { return (tokens + WIDTH - 1) / WIDTH; }

/* One column of the table of 4 values. Entry 15 - e is entry e negated. */
UNROLLED void make_table(const vector v[4], float* table) {
  const vector s = v[0] + v[1], d = v[0] - v[1], u = v[2] + v[3], w = v[2] - v[3];
  const vector sums[8] = {u + s, u - d, u + d, u - s, s - w, -(d + w), d - w, -(s + w)};
#pragma GCC unroll 8
  for (int e = 0; e < 8; ++e) {
    store(table + e * LORDBA_TOKENS, sums[e]);
    store(table + (15 - e) * LORDBA_TOKENS, -sums[e]);
  }
}

/* WIDTH inputs of WIDTH tokens from row `x` on; rows from `rows` on repeat the last one: their lanes are not used. */
UNROLLED void load_block(const void* x, size_t x_stride, lordba_dtype dtype, size_t rows, size_t i, size_t lanes,
                         vector scale, vector v[WIDTH]) {
  size_t at = i;
#pragma GCC unroll 16
  for (size_t t = 0; t < WIDTH; ++t) {
    v[t] = load_n(x, dtype, at, lanes) * scale;
    at += t + 1 < rows ? x_stride : 0;
  }
  transpose(v);
}

UNROLLED void make_input_tables(const void* x, size_t x_stride, lordba_dtype dtype, size_t tokens, size_t n,
                                const float* s_in, float* tables) {
  for (size_t first = 0; first < tokens; first += WIDTH) {
    const size_t rows = tokens - first < WIDTH ? tokens - first : WIDTH;
    size_t i = 0;
    for (; i + WIDTH <= n; i += WIDTH) {
      vector v[WIDTH];
      load_block(x, x_stride, dtype, rows, first * x_stride + i, WIDTH, load(s_in + i), v);
#pragma GCC unroll 4
      for (size_t k = 0; k < WIDTH; k += LORDBA_GROUP) {
        make_table(v + k, tables + (i + k) / LORDBA_GROUP * LORDBA_TABLE + first);
      }
    }
    for (; i < (n + 7) / 8 * 8; i += WIDTH) {
      const size_t lanes = i < n ? n - i : 0;
      vector v[WIDTH];
      load_block(x, x_stride, dtype, rows, first * x_stride + i, lanes, load_n(s_in, LORDBA_F32, i, lanes), v);
#pragma GCC unroll 4
      for (size_t k = 0; k < WIDTH; k += LORDBA_GROUP) {
        if (i + k < (n + 7) / 8 * 8) make_table(v + k, tables + (i + k) / LORDBA_GROUP * LORDBA_TABLE + first);
      }
    }
  }
}

static void input_tables(const void* x, size_t x_stride, lordba_dtype dtype, size_t tokens, size_t n, const float* s_in,
                         float* tables) {
  switch (dtype) {
    case LORDBA_F32:
      make_input_tables(x, x_stride, LORDBA_F32, tokens, n, s_in, tables);
      break;
    case LORDBA_F16:
      make_input_tables(x, x_stride, LORDBA_F16, tokens, n, s_in, tables);
      break;
    case LORDBA_BF16:
      make_input_tables(x, x_stride, LORDBA_BF16, tokens, n, s_in, tables);
      break;
  }
}

static void rank_tables(const float* h, size_t n, size_t tokens, float* tables) {
  const size_t padded = (n + 7) / 8 * 8;
  for (size_t j = 0; j < padded; j += LORDBA_GROUP, tables += LORDBA_TABLE) {
    for (size_t first = 0; first < tokens; first += WIDTH) {
      vector v[LORDBA_GROUP];
#pragma GCC unroll 4
      for (size_t k = 0; k < LORDBA_GROUP; ++k) {
        v[k] = j + k < n ? load(h + (j + k) * LORDBA_TOKENS + first) : zeros();
      }
      make_table(v, tables + first);
    }
  }
}

/* Up to 8 bytes, little endian. */
UNROLLED uint64_t load_word(const uint8_t* p, size_t bytes) {
  if (bytes == 8) return lordba_load_u32(p) | (uint64_t)lordba_load_u32(p + 4) << 32;
  if (bytes == 4) return lordba_load_u32(p);
  if (bytes == 2) return lordba_load_u16(p);
  uint64_t word = 0;
  for (size_t k = 0; k < bytes; ++k) word |= (uint64_t)p[k] << 8 * k;
  return word;
}

/* `bytes` bytes of `rows` rows over `columns` columns at once, each with its own accumulator. */
UNROLLED void sum_rows(const float* tables, const uint8_t* signs, size_t row_bytes, size_t bytes, size_t rows,
                       size_t columns, bool add, float* sums) {
  uint64_t word[8];
  vector acc[8][4];
#pragma GCC unroll 8
  for (size_t r = 0; r < rows; ++r) {
    word[r] = load_word(signs + r * row_bytes, bytes);
  }
#pragma GCC unroll 8
  for (size_t r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (size_t c = 0; c < columns; ++c) acc[r][c] = load(tables + (word[r] & 15) * LORDBA_TOKENS + c * WIDTH);
  }
#pragma GCC unroll 4
  for (size_t group = 1; group < 2 * bytes; ++group) {
    tables += LORDBA_TABLE;
#pragma GCC unroll 8
    for (size_t r = 0; r < rows; ++r) {
      word[r] >>= 4;
      const float* entry = tables + (word[r] & 15) * LORDBA_TOKENS;
#pragma GCC unroll 4
      for (size_t c = 0; c < columns; ++c) acc[r][c] += load(entry + c * WIDTH);
    }
  }
#pragma GCC unroll 8
  for (size_t r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (size_t c = 0; c < columns; ++c) {
      float* sum = sums + r * LORDBA_TOKENS + c * WIDTH;
      store(sum, add ? load(sum) + acc[r][c] : acc[r][c]);
    }
  }
}

/* All rows, `step` at once; the number of bytes is a constant where it is a usual one. */
UNROLLED void sum_columns(const float* tables, const uint8_t* signs, size_t row_bytes, size_t bytes, size_t rows,
                          size_t step, size_t columns, bool add, float* sums) {
  for (size_t r = 0; r < rows;) {
    const size_t here = rows - r < step ? 1 : step;
    const uint8_t* row = signs + r * row_bytes;
    float* sum = sums + r * LORDBA_TOKENS;
    if (here == 1) {
      sum_rows(tables, row, row_bytes, bytes, 1, columns, add, sum);
    } else if (bytes == LORDBA_BLOCK / 8) {
      sum_rows(tables, row, row_bytes, LORDBA_BLOCK / 8, step, columns, add, sum);
    } else if (bytes == 2) {
      sum_rows(tables, row, row_bytes, 2, step, columns, add, sum);
    } else {
      sum_rows(tables, row, row_bytes, bytes, step, columns, add, sum);
    }
    r += here;
  }
}

static void sum_tables(const float* tables, size_t tokens, const uint8_t* signs, size_t row_bytes, size_t bytes,
                       size_t rows, bool add, float* sums) {
  switch (columns_of(tokens)) {
    case 1:
      sum_columns(tables, signs, row_bytes, bytes, rows, 8, 1, add, sums);
      break;
    case 2:
      sum_columns(tables, signs, row_bytes, bytes, rows, 4, 2, add, sums);
      break;
#if WIDTH < 16
    case 3:
      sum_columns(tables, signs, row_bytes, bytes, rows, 2, 3, add, sums);
      break;
    case 4:
      sum_columns(tables, signs, row_bytes, bytes, rows, 2, 4, add, sums);
      break;
#endif
#if WIDTH < 8
    default:
      sum_columns(tables, signs, row_bytes, bytes, rows, 2, 4, add, sums);
      sum_tables(tables + 4 * WIDTH, tokens - 4 * WIDTH, signs, row_bytes, bytes, rows, add, sums + 4 * WIDTH);
#endif
  }
}

/* y = base + s_out * sums, turned back to one row per token. */
static void store_tokens(const float* sums, size_t tokens, size_t n, const float* s_out, const void* base,
                         size_t base_stride, void* y, size_t y_stride, lordba_dtype dtype) {
  for (size_t first = 0; first < tokens; first += WIDTH) {
    const size_t rows = tokens - first < WIDTH ? tokens - first : WIDTH;
    for (size_t o = 0; o < n; o += WIDTH) {
      const size_t lanes = n - o < WIDTH ? n - o : WIDTH;
      const vector scale = load_n(s_out, LORDBA_F32, o, lanes);
      vector v[WIDTH];
#pragma GCC unroll 16
      for (size_t i = 0; i < WIDTH; ++i) v[i] = i < lanes ? load(sums + (o + i) * LORDBA_TOKENS + first) : zeros();
      transpose(v);
      /* All loads before the first store: rows a multiple of 4 KiB apart would wait for each other. */
#pragma GCC unroll 16
      for (size_t t = 0; t < WIDTH; ++t) {
        v[t] *= scale;
        if (base && t < rows) v[t] = load_n(base, dtype, (first + t) * base_stride + o, lanes) + v[t];
      }
#pragma GCC unroll 16
      for (size_t t = 0; t < WIDTH; ++t) {
        if (t < rows) store_n(y, dtype, (first + t) * y_stride + o, lanes, v[t]);
      }
    }
  }
}
