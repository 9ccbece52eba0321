/* NEON, stage 2 of few tokens: h as tables of planes, which B's rows look up as they are stored. */
#if defined(__aarch64__) /* some builds hand every file to every CPU's compiler */
#include "neon_planes.h"

/* The tables of one token's h, rounded: a signed sum of h is unit * the sum of what they hold. */
static bool make_rank_tables(const float* h, size_t columns, uint8_t* tables, float* unit) {
#define ONES_16 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1
  static const float ones[LORDBA_MAX_RANKS] = {ONES_16, ONES_16, ONES_16, ONES_16};
  float v[LORDBA_MAX_RANKS];
  float32x4_t total = vdupq_n_f32(0.0f), most = total;
  scale_columns(h, ones, v, columns, &total, &most);
  if (!in_range(vaddvq_f32(total))) return false;
  const float scale = (float)((1 << 23) - 64) / square_root(vmaxvq_f32(most));
  column rounded[LORDBA_MAX_RANKS / COLUMN];
  int32x4_t odds = vdupq_n_s32(0);
  for (size_t c = 0; c < columns; ++c) {
    rounded[c] = round_column(v + c * COLUMN, scale);
    odds = vaddq_s32(odds, vsubq_s32(sum_of(rounded[c]), vshlq_n_s32(half_of(rounded[c]), 1)));
  }
  const int32_t odd = vaddvq_s32(odds);
  /* Half of it goes into every sum of the first group, so that no output needs to add it. */
  int32x4_t less = vsetq_lane_s32(odd / 2, vdupq_n_s32(0), 0), unused = less;
  const plane_bytes bytes = find_planes();
  for (size_t c = 0; c < columns; ++c) {
    tables = make_planes(rounded[c], vaddq_s32(half_of(rounded[c]), less), bytes, 3, &unused, tables);
    less = vdupq_n_s32(0);
  }
  *unit = -2.0f / scale;
  return true;
}

/* The words of 16 rows of B: words[c][k] are 16 ranks of outputs 8 k to 8 k + 7. */
UNROLLED void load_rows(const uint8_t* b, size_t columns, bool halves, uint8x16_t words[4][2]) {
#pragma GCC unroll 2
  for (int k = 0; k < 2; ++k) {
    if (halves) {
      words[0][k] = vreinterpretq_u8_u16(vmovl_u8(vld1_u8(b + 8 * k)));
    } else if (columns == 1) {
      words[0][k] = vld1q_u8(b + 16 * k);
    } else if (columns == 2) {
      const uint16x8x2_t rows = vld2q_u16((const uint16_t*)(b + 32 * k));
#pragma GCC unroll 2
      for (int c = 0; c < 2; ++c) words[c][k] = vreinterpretq_u8_u16(rows.val[c]);
    } else {
      const uint16x8x4_t rows = vld4q_u16((const uint16_t*)(b + 64 * k));
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) words[c][k] = vreinterpretq_u8_u16(rows.val[c]);
    }
  }
}

/* One token's row: what it is made of, and where it goes. */
typedef struct {
  const uint8_t *b, *tables;
  float unit;
  const float *s_out, *carry_in;
  float* carry_out;
  const void* base;
  void* y;
} outputs;

/* The signed sums of 16 outputs from `o` on. */
UNROLLED void sum_16(const outputs* row, size_t o, size_t columns, bool halves, float32x4_t sums[4]) {
  uint8x16_t words[4][2];
  uint16x8_t acc[MAX_PLANES][2];
  const uint8_t* tables = row->tables;
  load_rows(row->b + (halves ? o : o * 2 * columns), columns, halves, words);
#pragma GCC unroll 4
  for (size_t c = 0; c < columns; ++c) tables = look_up(tables, 3, c == 0, words[c], acc);
#pragma GCC unroll 2
  for (int k = 0; k < 2; ++k) {
    int32x4_t chosen[2];
    add_planes(acc, 3, k, chosen);
    sums[2 * k] = vmulq_n_f32(vcvtq_f32_s32(chosen[0]), row->unit);
    sums[2 * k + 1] = vmulq_n_f32(vcvtq_f32_s32(chosen[1]), row->unit);
  }
}

/* The usual case, blocks of 16 outputs of 9 to 16 ranks in fp32 with a base: the same in one piece. */
UNROLLED void finish_16_ranks(const outputs* row, size_t blocks) {
  const uint8_t* b = row->b;
  const void* base = row->base;
  const float* s_out = row->s_out;
  void* y = row->y;
  if (blocks == 0) return;
  __asm__ volatile(
      "1:\n\t"
      "ld1 {v0.16b, v1.16b}, [%[b]], #32\n\t"
      "mov x9, %[tables]\n\t"
      MAKE_INDICES LOOK_UP_PLANE("uaddlp", "uadalp", "v16", "v17") LOOK_UP_PLANE("uaddlp", "uadalp", "v18", "v19")
      LOOK_UP_PLANE("saddlp", "sadalp", "v20", "v21")
      "usra v18.8h, v16.8h, #8\n\tusra v19.8h, v17.8h, #8\n\t"
      "usra v20.8h, v18.8h, #8\n\tusra v21.8h, v19.8h, #8\n\t"
      "sli v16.8h, v18.8h, #8\n\tsli v17.8h, v19.8h, #8\n\t"
      "ld1 {v24.4s-v27.4s}, [%[s_out]], #64\n\tld1 {v28.4s-v31.4s}, [%[base]], #64\n\t"
      "zip1 v0.8h, v16.8h, v20.8h\n\tzip2 v1.8h, v16.8h, v20.8h\n\t"
      "zip1 v2.8h, v17.8h, v21.8h\n\tzip2 v3.8h, v17.8h, v21.8h\n\t"
      "scvtf v0.4s, v0.4s\n\tscvtf v1.4s, v1.4s\n\tscvtf v2.4s, v2.4s\n\tscvtf v3.4s, v3.4s\n\t"
      "fmul v0.4s, v0.4s, %[unit].4s\n\tfmul v1.4s, v1.4s, %[unit].4s\n\t"
      "fmul v2.4s, v2.4s, %[unit].4s\n\tfmul v3.4s, v3.4s, %[unit].4s\n\t"
      "fmla v28.4s, v0.4s, v24.4s\n\tfmla v29.4s, v1.4s, v25.4s\n\t"
      "fmla v30.4s, v2.4s, v26.4s\n\tfmla v31.4s, v3.4s, v27.4s\n\t"
      "subs %[blocks], %[blocks], #1\n\t"
      "st1 {v28.4s-v31.4s}, [%[y]], #64\n\t"
      "b.ne 1b\n\t"
      : [b] "+r"(b), [s_out] "+r"(s_out), [base] "+r"(base), [y] "+r"(y), [blocks] "+r"(blocks)
      : [tables] "r"(row->tables), [low] "w"(GROUP_LOW), [high] "w"(GROUP_HIGH), [chosen] "w"(CHOSEN),
        [unit] "w"(vdupq_n_f32(row->unit))
      : "memory", "cc", "x9", "v0", "v1", "v2", "v3", "v16", "v17", "v18", "v19", "v20", "v21", "v24", "v25", "v26",
        "v27", "v28", "v29", "v30", "v31");
}

/* All outputs of a row with nothing carried, up to a multiple of 16. */
UNROLLED void finish_16(const outputs* row, size_t n, size_t columns, bool halves, bool with_base, lordba_dtype dtype) {
  for (size_t o = 0; o + LORDBA_LANES <= n; o += LORDBA_LANES) {
    float32x4_t sums[4], scale[4];
    sum_16(row, o, columns, halves, sums);
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) scale[q] = vld1q_f32(row->s_out + o + 4 * q);
    if (with_base) {
      float32x4_t base[4];
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) base[q] = load_n(row->base, dtype, o + 4 * q, 4);
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) sums[q] = vfmaq_f32(base[q], scale[q], sums[q]);
    } else {
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) sums[q] = vmulq_f32(scale[q], sums[q]);
    }
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) store_n(row->y, dtype, o + 4 * q, 4, sums[q]);
  }
}

/* Any outputs [o, n), where a block may have fewer than 16, or sums of other ranks may come in or go out. */
APART void finish_any(outputs all, size_t o, size_t n, size_t columns, bool halves, lordba_dtype dtype) {
  for (; o < n; o += LORDBA_LANES) {
    float32x4_t sums[4];
    float values[LORDBA_LANES];
    if (columns == 1) {
      sum_16(&all, o, 1, halves, sums);
    } else if (columns == 2) {
      sum_16(&all, o, 2, false, sums);
    } else {
      sum_16(&all, o, 4, false, sums);
    }
    for (int q = 0; q < 4; ++q) vst1q_f32(values + 4 * q, sums[q]);
    for (size_t i = 0; i < LORDBA_LANES && o + i < n; ++i) {
      const float sum = all.carry_in ? all.carry_in[o + i] + values[i] : values[i];
      if (all.carry_out) {
        all.carry_out[o + i] = sum;
      } else {
        const float base = all.base ? lordba_load_scalar(all.base, dtype, o + i) : 0.0f;
        lordba_store_scalar(all.y, dtype, o + i, __builtin_fmaf(all.s_out[o + i], sum, base));
      }
    }
  }
}

UNROLLED void sum_row(const outputs* row, size_t n, size_t columns, bool halves, lordba_dtype dtype) {
  size_t o = 0;
  if (!row->carry_in && !row->carry_out) {
    o = n / LORDBA_LANES * LORDBA_LANES;
    if (dtype == LORDBA_F32 && row->base && columns == 1 && !halves) {
      finish_16_ranks(row, n / LORDBA_LANES);
    } else if (dtype != LORDBA_F32) {
      finish_16(row, n, columns, halves, row->base != NULL, dtype);
    } else if (row->base) {
      finish_16(row, n, columns, halves, true, LORDBA_F32);
    } else {
      finish_16(row, n, columns, halves, false, LORDBA_F32);
    }
  }
  if (o < n) finish_any(*row, o, n, columns, halves, dtype);
}

void lordba_sum_ranks_neon(const float* h, size_t h_stride, size_t tokens, size_t ranks, const uint8_t* b, size_t n,
                           const float* s_out, const float* carry_in, float* carry_out, const void* base,
                           size_t base_stride, void* y, size_t y_stride, lordba_dtype dtype) {
  const size_t width = lordba_row_width(ranks), size = lordba_element_bytes(dtype);
  const size_t columns = width <= 2 ? 1 : width / 2, given = (ranks + COLUMN - 1) / COLUMN * COLUMN;
  for (size_t t = 0; t < tokens; ++t, h += h_stride) {
    uint8_t tables[LORDBA_MAX_RANKS / COLUMN * 3 * PLANE];
    float padded[LORDBA_MAX_RANKS];
    const float* ranks_of = h;
    if (given < columns * COLUMN) {
      for (size_t j = 0; j < columns * COLUMN; ++j) padded[j] = j < given ? h[j] : 0.0f;
      ranks_of = padded;
    }
    outputs row = {.b = b, .tables = tables, .s_out = s_out, .carry_in = carry_in, .carry_out = carry_out};
    row.base = base ? (const uint8_t*)base + t * base_stride * size : NULL;
    row.y = (uint8_t*)y + t * y_stride * size;
    if (!make_rank_tables(ranks_of, columns, tables, &row.unit)) {
      lordba_kernels_scalar.sum_ranks(h, h_stride, 1, ranks, b, n, s_out, carry_in, carry_out, row.base, base_stride,
                                      row.y, y_stride, dtype);
    } else if (width == 1) {
      sum_row(&row, n, 1, true, dtype);
    } else if (width == 2) {
      sum_row(&row, n, 1, false, dtype);
    } else if (width == 4) {
      sum_row(&row, n, 2, false, dtype);
    } else {
      sum_row(&row, n, 4, false, dtype);
    }
  }
}

#endif
