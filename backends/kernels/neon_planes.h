/*
 * NEON, few tokens: tables of integers, looked up byte by byte, 16 bytes at once.
 *
 * A chunk is rounded to fixed point. 16 values make a column: four groups of 4, each with the 16 sums that the bits of
 * a nibble choose. One byte (a plane) of all 64 sums fills the four registers of a TBL, which then adds 4 values of 4
 * groups for 4 ranks; UADALP adds the bytes in 16-bit lanes, one rank each. Three planes hold 24 bits of a sum. They
 * are enough unless a few values are far larger than the rest, then there is a fourth. The sums are exact but for the
 * rounding at the start, whose error is below 4e-7 of the root of the sum of squares. What fixed point cannot hold
 * (infinities, NaN, magnitudes near the ends of fp32) takes a plain loop.
 *
 * A column's word is 16 bits of a row as stored. A byte has two groups: bits 0, 1, 4, 5 and bits 2, 3, 6, 7, so that
 * the byte, or the byte shifted by 2, is an index once the two bits in between name the group.
 */
#ifndef LORDBA_NEON_PLANES_H
#define LORDBA_NEON_PLANES_H

#include "neon.h"

enum {
  COLUMN = 16,                     /* values of a column */
  COLUMNS = LORDBA_CHUNK / COLUMN, /* columns of a chunk */
  PLANE = 64,                      /* bytes of a plane of a column: 4 groups x 16 sums */
  MAX_PLANES = 4,
};

/* The values of a column so that lane g of vector k is value k of group g. */
typedef struct {
  int32x4_t values[4];
} column;

#define APART static __attribute__((noinline)) /* what is rare stays out of the way of what is not */

UNROLLED float square_root(float value) { return vget_lane_f32(vsqrt_f32(vdup_n_f32(value)), 0); }

/* Whether fixed point can hold values with this sum of squares. */
static inline bool in_range(float squares) { return squares > 0x1p-80f && squares < 0x1p80f; }

UNROLLED column round_column(const float* groups, float scale) {
  const float32x4x4_t v = vld4q_f32(groups);
  column result;
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) result.values[k] = vcvtnq_s32_f32(vmulq_n_f32(v.val[k], scale));
  return result;
}

/*
 * TBL wants its table in neighbouring registers, which compilers reach by copies, one for each register: what makes and
 * reads tables is therefore written by hand.
 */

/* The next sums are the last ones plus or minus a value. */
#define CHANGE_SUMS(add_or_sub, value)                                                                           \
  add_or_sub " v28.4s, v28.4s, %[" value "].4s\n\t" add_or_sub " v29.4s, v29.4s, %[" value "].4s\n\t" add_or_sub \
             " v30.4s, v30.4s, %[" value "].4s\n\t" add_or_sub " v31.4s, v31.4s, %[" value "].4s\n\t"
#define TAKE_PLANE(to, index) "tbl v" to ".16b, {v28.16b-v31.16b}, %[" index "].16b\n\t"
#define TAKE_3_PLANES(a, b, c) TAKE_PLANE(a, "index0") TAKE_PLANE(b, "index1") TAKE_PLANE(c, "index2")
#define MAKE_PLANES(take0, take1, take2, take3, store)                                                              \
  __asm__ volatile(                                                                                                 \
      "neg v28.4s, %[half].4s\n\t"                                                                                  \
      "sub v29.4s, %[value0].4s, %[half].4s\n\t"                                                                    \
      "sub v30.4s, %[value1].4s, %[half].4s\n\t"                                                                    \
      "sub %[odd].4s, %[odd].4s, %[half].4s\n\t"                                                                    \
      "add v31.4s, v29.4s, %[value1].4s\n\t" /* the sums of the first two values */                                 \
      take0 CHANGE_SUMS("add", "value2") take1 CHANGE_SUMS("add", "value3") take3                                   \
      "add %[odd].4s, %[odd].4s, v31.4s\n\t" CHANGE_SUMS("sub", "value2") take2 store                               \
      : [odd] "+&w"(odd), [to] "+r"(to)                                                                             \
      : [half] "w"(half), [value0] "w"(c.values[0]), [value1] "w"(c.values[1]), [value2] "w"(c.values[2]),          \
        [value3] "w"(c.values[3]), [index0] "w"(bytes.plane[0]), [index1] "w"(bytes.plane[1]),                      \
        [index2] "w"(bytes.plane[2]), [index3] "w"(bytes.plane[planes - 1])                                         \
      : "memory", "v12", "v13", "v14", "v15", "v16", "v17", "v18", "v19", "v20", "v21", "v22", "v23", "v24", "v25", \
        "v26", "v27", "v28", "v29", "v30", "v31")
#define STORE_3_PLANES                                                             \
  "st1 {v16.16b-v19.16b}, [%[to]], #64\n\tst1 {v20.16b-v23.16b}, [%[to]], #64\n\t" \
  "st1 {v24.16b-v27.16b}, [%[to]], #64\n\t"

/* Where TBL finds the bytes of each plane in the 16 sums of a quarter. */
typedef struct {
  uint8x16_t plane[MAX_PLANES];
} plane_bytes;

UNROLLED plane_bytes find_planes(void) {
  const uint8x16_t first = {0, 16, 32, 48, 4, 20, 36, 52, 8, 24, 40, 56, 12, 28, 44, 60};
  plane_bytes result;
#pragma GCC unroll 4
  for (int p = 0; p < MAX_PLANES; ++p) {
    result.plane[p] = vaddq_u8(first, vdupq_n_u8((uint8_t)p));
    __asm__("" : "+w"(result.plane[p])); /* or GCC loads it from memory each time */
  }
  return result;
}

/* The sum of each group. */
UNROLLED int32x4_t sum_of(column c) {
  return vaddq_s32(vaddq_s32(c.values[0], c.values[1]), vaddq_s32(c.values[2], c.values[3]));
}

/* What is taken from a group's sums: half the sum of all, rounded up. */
UNROLLED int32x4_t half_of(column c) { return vrshrq_n_s32(sum_of(c), 1); }

/* The planes of a column: for each subset of the values its sum less `half`. What is below zero by twice that is the
 * signed sum, but for what the rounding added to twice the half: `odd` collects it. */
UNROLLED uint8_t* make_planes(column c, int32x4_t half, plane_bytes bytes, int planes, int32x4_t* odd_of, uint8_t* to) {
  int32x4_t odd = *odd_of;
  if (planes == 3) {
    MAKE_PLANES(TAKE_3_PLANES("16", "20", "24"), TAKE_3_PLANES("17", "21", "25"), TAKE_3_PLANES("18", "22", "26"),
                TAKE_3_PLANES("19", "23", "27"), STORE_3_PLANES);
  } else {
    MAKE_PLANES(TAKE_3_PLANES("16", "20", "24") TAKE_PLANE("12", "index3"),
                TAKE_3_PLANES("17", "21", "25") TAKE_PLANE("13", "index3"),
                TAKE_3_PLANES("18", "22", "26") TAKE_PLANE("14", "index3"),
                TAKE_3_PLANES("19", "23", "27") TAKE_PLANE("15", "index3"),
                STORE_3_PLANES "st1 {v12.16b-v15.16b}, [%[to]], #64\n\t");
  }
  *odd_of = odd;
  return to;
}

/* Of a byte of words: the bits that choose a sum of the lower group, and what names the groups in the bits between. */
#define CHOSEN vdupq_n_u8(0x33)
#define GROUP_LOW vreinterpretq_u8_u16(vdupq_n_u16(0x0800))
#define GROUP_HIGH vreinterpretq_u8_u16(vdupq_n_u16(0x0c04))

/* The sums of one plane that two vectors of words choose, 16 ranks in all. */
#define LOOK_UP(constraint, first_add, add)                                                                        \
  __asm__ volatile(                                                                                                \
      "ld1 {v28.16b-v31.16b}, [%[tables]], #64\n\t"                                                                \
      "tbl v24.16b, {v28.16b-v31.16b}, %[low0].16b\n\ttbl v25.16b, {v28.16b-v31.16b}, %[low1].16b\n\t"             \
      "tbl v26.16b, {v28.16b-v31.16b}, %[high0].16b\n\ttbl v27.16b, {v28.16b-v31.16b}, %[high1].16b\n\t" first_add \
      " %[acc0].8h, v24.16b\n\t" first_add " %[acc1].8h, v25.16b\n\t" add " %[acc0].8h, v26.16b\n\t" add           \
      " %[acc1].8h, v27.16b\n\t"                                                                                   \
      : [tables] "+r"(tables), [acc0] constraint(acc[p][0]), [acc1] constraint(acc[p][1])                          \
      : [low0] "w"(low[0]), [low1] "w"(low[1]), [high0] "w"(high[0]), [high1] "w"(high[1])                         \
      : "memory", "v24", "v25", "v26", "v27", "v28", "v29", "v30", "v31")

/* acc += the sums that two vectors of words choose, or, if `first`, acc = them. Three planes are of
 * signed numbers, so the top one's bytes are signed. Returns the tables of the next column. */
UNROLLED const uint8_t* look_up(const uint8_t* tables, int planes, bool first, const uint8x16_t words[2],
                                uint16x8_t acc[MAX_PLANES][2]) {
  uint8x16_t low[2], high[2];
#pragma GCC unroll 2
  for (int k = 0; k < 2; ++k) {
    high[k] = vbslq_u8(CHOSEN, vshrq_n_u8(words[k], 2), GROUP_HIGH);
    low[k] = vbslq_u8(CHOSEN, words[k], GROUP_LOW);
  }
#pragma GCC unroll 4
  for (int p = 0; p < planes; ++p) {
    const bool are_signed = p == 2 && planes == 3;
    if (first && are_signed) {
      LOOK_UP("=&w", "saddlp", "sadalp");
    } else if (first) {
      LOOK_UP("=&w", "uaddlp", "uadalp");
    } else if (are_signed) {
      LOOK_UP("+&w", "sadalp", "sadalp");
    } else {
      LOOK_UP("+&w", "uadalp", "uadalp");
    }
  }
  return tables;
}

/* The same for loops by hand: words v0 and v1 become indices v0 to v3; [x9] is the plane, v24 to v31 are free. */
#define MAKE_INDICES                                                                   \
  "ushr v2.16b, v0.16b, #2\n\tushr v3.16b, v1.16b, #2\n\t"                             \
  "bif v0.16b, %[low].16b, %[chosen].16b\n\tbif v1.16b, %[low].16b, %[chosen].16b\n\t" \
  "bif v2.16b, %[high].16b, %[chosen].16b\n\tbif v3.16b, %[high].16b, %[chosen].16b\n\t"
#define LOOK_UP_PLANE(add, next, acc0, acc1)                                                          \
  "ld1 {v28.16b-v31.16b}, [x9], #64\n\t"                                                              \
  "tbl v24.16b, {v28.16b-v31.16b}, v0.16b\n\ttbl v25.16b, {v28.16b-v31.16b}, v1.16b\n\t"              \
  "tbl v26.16b, {v28.16b-v31.16b}, v2.16b\n\ttbl v27.16b, {v28.16b-v31.16b}, v3.16b\n\t" add " " acc0 \
  ".8h, v24.16b\n\t" add " " acc1 ".8h, v25.16b\n\t" next " " acc0 ".8h, v26.16b\n\t" next " " acc1 ".8h, v27.16b\n\t"

/* The sums of words k: what is above a byte of a plane's carries into the next plane. */
UNROLLED void add_planes(uint16x8_t acc[MAX_PLANES][2], int planes, int k, int32x4_t out[2]) {
  uint16x8_t low = acc[0][k], second = acc[1][k], high = acc[2][k];
  /* Intrinsics would have GCC copy each of the registers that these instructions change. */
  __asm__(
      "usra %[second].8h, %[low].8h, #8\n\tusra %[high].8h, %[second].8h, #8\n\t"
      "sli %[low].8h, %[second].8h, #8\n\t"
      : [low] "+w"(low), [second] "+w"(second), [high] "+w"(high));
  if (planes == 4) high = vsliq_n_u16(high, vsraq_n_u16(acc[3][k], high, 8), 8);
  out[0] = vreinterpretq_s32_u16(vzip1q_u16(low, high));
  out[1] = vreinterpretq_s32_u16(vzip2q_u16(low, high));
}

/* Columns of v = s_in * x in groups, with what is needed to choose the scale: sums of squares by lane, and the largest
 * of a group. */
UNROLLED void scale_columns(const float* x, const float* s_in, float* v, size_t columns, float32x4_t* total_of,
                            float32x4_t* most_of) {
  float32x4_t total = *total_of, most = *most_of;
  if (columns == 0) return;
  __asm__ volatile(
      "1:\n\t"
      "ld1 {v16.4s-v19.4s}, [%[x]], #64\n\t"
      "ld1 {v20.4s-v23.4s}, [%[s_in]], #64\n\t"
      "fmul v16.4s, v16.4s, v20.4s\n\tfmul v17.4s, v17.4s, v21.4s\n\t"
      "fmul v18.4s, v18.4s, v22.4s\n\tfmul v19.4s, v19.4s, v23.4s\n\t"
      "fmul v20.4s, v16.4s, v16.4s\n\tfmul v21.4s, v18.4s, v18.4s\n\t"
      "fmla v20.4s, v17.4s, v17.4s\n\tfmla v21.4s, v19.4s, v19.4s\n\t"
      "st2 {v16.2d, v17.2d}, [%[v]], #32\n\t" /* pairs 1 and 2 of each 8 change places */
      "st2 {v18.2d, v19.2d}, [%[v]], #32\n\t"
      "faddp v20.4s, v20.4s, v21.4s\n\t"
      "subs %[columns], %[columns], #1\n\t"
      "fadd %[total].4s, %[total].4s, v20.4s\n\t"
      "fmax %[most].4s, %[most].4s, v20.4s\n\t"
      "b.ne 1b\n\t"
      : [x] "+r"(x), [s_in] "+r"(s_in), [v] "+r"(v), [columns] "+r"(columns), [total] "+&w"(total), [most] "+&w"(most)
      :
      : "memory", "cc", "v16", "v17", "v18", "v19", "v20", "v21", "v22", "v23");
  *total_of = total;
  *most_of = most;
}

#endif
