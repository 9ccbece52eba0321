/* NEON, what stage 1 of few tokens starts from: a chunk of x as scaled floats, and how fixed point can hold it. */
#ifndef LORDBA_NEON_INPUTS_H
#define LORDBA_NEON_INPUTS_H

#include "neon_planes.h"

static const float SPREAD = 160.0f; /* of the squares: up to here, the error of three planes is below 4.4e-7 */

APART void copy_rest(const float* x, size_t n, float* rest) {
  for (size_t k = 0; k < COLUMN; ++k) rest[k] = k < n ? lordba_load_scalar(x, LORDBA_F32, k) : 0.0f;
}

/* All of a chunk, padded with zeros to whole columns; returns the sum of squares and, in *largest, that of the largest
 * group. */
static inline float scale_inputs(const float* x, size_t n, const float* s_in, float* v, float* largest) {
  float32x4_t total = vdupq_n_f32(0.0f), most = total;
  const size_t whole = n / COLUMN * COLUMN;
  scale_columns(x, s_in, v, n / COLUMN, &total, &most);
  if (whole < n) {
    float rest[COLUMN];
    copy_rest(x + whole, n - whole, rest);
    scale_columns(rest, s_in + whole, v + whole, 1, &total, &most);
  }
  *largest = vmaxvq_f32(most);
  return vaddvq_f32(total);
}

/* n <= LORDBA_CHUNK elements of any dtype from element `start` on, as floats: in place or in `widened`. */
static inline const float* as_floats(const void* x, lordba_dtype dtype, size_t start, size_t n, float* widened) {
  if (dtype == LORDBA_F32) return (const float*)x + start;
  size_t i = 0;
  for (; i + 4 <= n; i += 4) vst1q_f32(widened + i, load_n(x, dtype, start + i, 4));
  for (; i < n; ++i) widened[i] = lordba_load_scalar(x, dtype, start + i);
  return widened;
}

/* The scale at which three planes hold a chunk of this many columns; 0: they cannot. A group's sum is at most
 * 2 sqrt(largest), and a table holds half of it. */
UNROLLED float scale_of_3_planes(float squares, float largest, size_t columns) {
  if (!in_range(squares) || !((float)(columns * COLUMN) * largest < SPREAD * squares)) return 0.0f;
  return (float)((1 << 23) - 64) / square_root(largest);
}

#endif
