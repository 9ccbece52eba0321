/* NEON, stage 1 of few tokens: a chunk of x as tables of planes, which A's words look up. */
#if defined(__aarch64__) /* some builds hand every file to every CPU's compiler */
#include "neon_inputs.h"

/* Three planes of at least one column. */
UNROLLED void add_columns(const uint8_t* tables, size_t columns, const uint8_t* words, size_t stride,
                          uint16x8_t acc[MAX_PLANES][2]) {
  __asm__ volatile(
      "mov x9, %[tables]\n\t"
      "1:\n\t"
      "ld1 {v0.16b, v1.16b}, [%[words]], %[stride]\n\t"
      "subs %[columns], %[columns], #1\n\t" MAKE_INDICES LOOK_UP_PLANE("uadalp", "uadalp", "%[acc00]", "%[acc01]")
          LOOK_UP_PLANE("uadalp", "uadalp", "%[acc10]", "%[acc11]")
              LOOK_UP_PLANE("sadalp", "sadalp", "%[acc20]", "%[acc21]") "b.ne 1b\n\t"
      : [words] "+r"(words), [columns] "+r"(columns), [acc00] "+w"(acc[0][0]), [acc01] "+w"(acc[0][1]),
        [acc10] "+w"(acc[1][0]), [acc11] "+w"(acc[1][1]), [acc20] "+w"(acc[2][0]), [acc21] "+w"(acc[2][1])
      : [tables] "r"(tables), [stride] "r"(stride), [low] "w"(GROUP_LOW), [high] "w"(GROUP_HIGH), [chosen] "w"(CHOSEN)
      : "memory", "cc", "x9", "v0", "v1", "v2", "v3", "v24", "v25", "v26", "v27", "v28", "v29", "v30", "v31");
}

/* 16 ranks at a time, whose words lie `stride` bytes apart from column to column; at least one column. */
UNROLLED void sum_columns(const uint8_t* tables, size_t columns, int planes, const uint8_t* words, size_t stride,
                          int32x4_t total, float unit, float* sums) {
  uint16x8_t acc[MAX_PLANES][2];
#pragma GCC unroll 4
  for (int p = 0; p < planes; ++p) acc[p][0] = acc[p][1] = vdupq_n_u16(0);
  if (planes == 3) {
    add_columns(tables, columns, words, stride, acc);
  } else {
    for (; columns != 0; --columns, words += stride) {
      const uint8x16_t pair[2] = {vld1q_u8(words), vld1q_u8(words + 16)};
      tables = look_up(tables, planes, false, pair, acc);
    }
  }
#pragma GCC unroll 2
  for (int k = 0; k < 2; ++k) {
    int32x4_t chosen[2];
    add_planes(acc, planes, k, chosen);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const int32x4_t sum = vsubq_s32(total, vshlq_n_s32(chosen[half], 1));
      vst1q_f32(sums + 8 * k + 4 * half, vmulq_n_f32(vcvtq_f32_s32(sum), unit));
    }
  }
}

UNROLLED void sum_rounded(const float* v, size_t columns, int planes, float scale, float unit, const uint8_t* words,
                          size_t blocks, float* sums) {
  uint8_t tables[COLUMNS * MAX_PLANES * PLANE];
  int32x4_t odd = vdupq_n_s32(0);
  uint8_t* to = tables;
  const plane_bytes bytes = find_planes();
  for (const float* end = v + columns * COLUMN; v != end; v += COLUMN) {
    const column values = round_column(v, scale);
    to = make_planes(values, half_of(values), bytes, planes, &odd, to);
  }
  const int32x4_t total = vdupq_n_s32(vaddvq_s32(odd));
  const size_t stride = blocks * LORDBA_LANES * sizeof(uint16_t);
  for (size_t block = 0; block < blocks; ++block) {
    sum_columns(tables, columns, planes, words + block * LORDBA_LANES * sizeof(uint16_t), stride, total, unit,
                sums + block * LORDBA_LANES);
  }
}

APART void sum_plain(const float* x, size_t n, const float* s_in, const uint8_t* words, size_t lanes, float* sums) {
  for (size_t j = 0; j < lanes; ++j) {
    float sum = 0.0f;
    for (size_t i = 0; i < n; ++i) {
      const uint16_t word = lordba_load_u16(words + 2 * (i / COLUMN * lanes + j));
      const float value = s_in[i] * lordba_load_scalar(x, LORDBA_F32, i);
      sum += word >> i % COLUMN & 1 ? -value : value;
    }
    sums[j] = sum;
  }
}

void lordba_sum_inputs_neon(const void* x, size_t x_stride, lordba_dtype dtype, size_t tokens, size_t n,
                            const float* s_in, const uint32_t* words, size_t blocks, float* sums, size_t sums_stride) {
  const uint8_t* bytes = (const uint8_t*)words;
  const size_t columns = (n + COLUMN - 1) / COLUMN;
  for (size_t t = 0; t < tokens; ++t, sums += sums_stride) {
    float v[LORDBA_CHUNK], widened[LORDBA_CHUNK], largest;
    const float* row = as_floats(x, dtype, t * x_stride, n, widened);
    const float squares = scale_inputs(row, n, s_in, v, &largest);
    const float scale = scale_of_3_planes(squares, largest, columns);
    if (scale != 0.0f) {
      sum_rounded(v, columns, 3, scale, 1.0f / scale, bytes, blocks, sums);
    } else if (in_range(squares)) {
      /* All sums are at most sqrt(n * squares). */
      const float wide = (float)(1 << 30) / square_root((float)(columns * COLUMN) * squares);
      sum_rounded(v, columns, 4, wide, 1.0f / wide, bytes, blocks, sums);
    } else {
      sum_plain(row, n, s_in, bytes, blocks * LORDBA_LANES, sums);
    }
  }
}

/* Eight rows of 16-bit words become columns of 8 words. Rows that are not there are zero. */
static void pack_rows(const uint8_t* a, size_t row_bytes, size_t rows, size_t bytes, size_t lanes, uint16_t* words) {
  for (size_t at = 0; at < bytes; at += 16) {
    const size_t used = bytes - at < 16 ? bytes - at : 16;
    uint16x8_t row[8];
    if (rows >= 8 && used == 16) {
#pragma GCC unroll 8
      for (size_t j = 0; j < 8; ++j) row[j] = vreinterpretq_u16_u8(vld1q_u8(a + j * row_bytes + at));
    } else {
      for (size_t j = 0; j < 8; ++j) {
        uint8_t rest[16] = {0};
        for (size_t k = 0; j < rows && k < used; ++k) rest[k] = a[j * row_bytes + at + k];
        row[j] = vreinterpretq_u16_u8(vld1q_u8(rest));
      }
    }
    uint16_t block[64];
    uint32x4x4_t low, high;
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      low.val[j] = vreinterpretq_u32_u16(vzip1q_u16(row[2 * j], row[2 * j + 1]));
      high.val[j] = vreinterpretq_u32_u16(vzip2q_u16(row[2 * j], row[2 * j + 1]));
    }
    vst4q_u32((uint32_t*)block, low);
    vst4q_u32((uint32_t*)(block + 32), high);
    const size_t columns = (used + 3) / 4 * 2;
    for (size_t c = 0; c < columns; ++c) vst1q_u16(words + (at / 2 + c) * lanes, vld1q_u16(block + 8 * c));
  }
}

void lordba_pack_a_neon(const uint8_t* a, size_t row_bytes, size_t rows, size_t bytes, size_t blocks, uint32_t* words) {
  const size_t lanes = blocks * LORDBA_LANES;
  for (size_t j = 0; j < lanes; j += 8) {
    pack_rows(a + j * row_bytes, row_bytes, rows > j ? rows - j : 0, bytes, lanes, (uint16_t*)words + j);
  }
}

#endif
