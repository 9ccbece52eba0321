#include "pack.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

static const double SMALLEST_FP16 = 0x1p-24, LARGEST_FP16 = 65504.0;

void lordba_envelope(const float* m, size_t n, size_t k, float* p, float* q, double* sums) {
  double total = 0.0;
  for (size_t j = 0; j < k; ++j) sums[j] = 0.0;
  for (size_t i = 0; i < n; ++i) {
    const float* row = m + i * k;
    double sum = 0.0;
    for (size_t j = 0; j < k; ++j) sum += fabsf(row[j]);
    for (size_t j = 0; j < k; ++j) sums[j] += fabsf(row[j]);
    p[i] = (float)(sum / (double)k);
    total += sum;
  }
  const double mean = total / ((double)n * (double)k);
  const double over = mean < (double)FLT_MIN ? (double)FLT_MIN : mean;
  for (size_t j = 0; j < k; ++j) q[j] = (float)(sums[j] / (double)n / over);
}

void lordba_pack_signs(const float* m, size_t n, size_t k, uint8_t* bits) {
  const size_t width = (k + 7) / 8;
  memset(bits, 0, n * width);
  for (size_t i = 0; i < n; ++i) {
    for (size_t j = 0; j < k; ++j) bits[i * width + j / 8] |= (uint8_t)((m[i * k + j] < 0.0f) << (j % 8));
  }
}

/* The fp16 nearest to a float that is not negative and not beyond fp16; ties go to even. */
static uint16_t to_fp16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  if (bits < 0x38800000) { /* below fp16's normal numbers: a multiple of 2^-24 */
    return (uint16_t)nearbyint((double)value * 0x1p24);
  }
  bits += 0xfff + ((bits >> 13) & 1); /* may carry into the exponent, as it should */
  return (uint16_t)((bits - 0x38000000) >> 13);
}

static double from_fp16(uint16_t bits) {
  const int exponent = bits >> 10, mantissa = bits & 1023;
  return exponent == 0 ? mantissa * 0x1p-24 : ldexp(1024 + mantissa, exponent - 25);
}

size_t lordba_stored_bytes(lordba_scale_code code, size_t n) {
  switch (code) {
    case LORDBA_FP32:
      return 4 * n;
    case LORDBA_FP16:
      return 2 * n;
    case LORDBA_INT8:
      return n;
    case LORDBA_LOG4:
      return (n + 1) / 2;
  }
  return 0;
}

void lordba_scale_levels(lordba_scale_code code, const uint16_t range[2], float* levels) {
  const double lo = from_fp16(range[0]), hi = from_fp16(range[1]);
  const int top = code == LORDBA_LOG4 ? 15 : 255;
  levels[0] = 0.0f;
  for (int i = 0; i < top; ++i) {
    const double step = (double)i / (top - 1);
    levels[1 + i] = (float)(code == LORDBA_LOG4 ? lo * pow(hi / lo, step) : lo + (hi - lo) * step);
  }
}

/* Codes of scales: the nearest level, by ratio for log4, by difference for int8; 0 for 0. */
static void encode(const float* scales, size_t n, lordba_scale_code code, uint8_t* values, uint16_t range[2]) {
  float lo = INFINITY, hi = 0.0f;
  for (size_t i = 0; i < n; ++i) {
    if (scales[i] > 0.0f && scales[i] < lo) lo = scales[i];
    if (scales[i] > hi) hi = scales[i];
  }
  if (hi == 0.0f) lo = hi = 1.0f;
  range[0] = to_fp16(lo < SMALLEST_FP16 ? (float)SMALLEST_FP16 : lo);
  range[1] = to_fp16(hi < SMALLEST_FP16 ? (float)SMALLEST_FP16 : hi);
  const int top = code == LORDBA_LOG4 ? 15 : 255;
  float levels[256];
  lordba_scale_levels(code, range, levels);
  double edges[254];
  for (int i = 0; i + 1 < top; ++i) {
    const double below = levels[1 + i], above = levels[2 + i];
    edges[i] = code == LORDBA_LOG4 ? (log(above) + log(below)) / 2 : (above + below) / 2;
  }
  const double floor = SMALLEST_FP16 * 0x1p-100;
  if (code == LORDBA_LOG4) memset(values, 0, (n + 1) / 2);
  for (size_t i = 0; i < n; ++i) {
    int chosen = 0;
    if (scales[i] > 0.0f) {
      const double s = scales[i] < floor ? floor : scales[i], at = code == LORDBA_LOG4 ? log(s) : s;
      int first = 0, last = top - 1; /* how many edges lie below */
      while (first < last) {
        const int middle = (first + last) / 2;
        if (edges[middle] < at) {
          first = middle + 1;
        } else {
          last = middle;
        }
      }
      /* However fp16 rounded the ends, they are in use. */
      chosen = levels[1] == levels[top] ? 1 : scales[i] == hi ? top : scales[i] == lo ? 1 : 1 + first;
    }
    if (code == LORDBA_LOG4) {
      values[i / 2] |= (uint8_t)(chosen << (4 * (i % 2)));
    } else {
      values[i] = (uint8_t)chosen;
    }
  }
}

lordba_pack_status lordba_encode_scales(const float* scales, size_t n, lordba_scale_code code, uint8_t* values,
                                        uint16_t range[2]) {
  for (size_t i = 0; i < n; ++i) {
    if (!isfinite(scales[i])) return LORDBA_PACK_NOT_FINITE;
    if (code != LORDBA_FP32 && scales[i] > LARGEST_FP16) return LORDBA_PACK_TOO_LARGE;
  }
  range[0] = range[1] = 0;
  if (code == LORDBA_FP32) {
    memcpy(values, scales, n * sizeof(float));
  } else if (code == LORDBA_FP16) {
    for (size_t i = 0; i < n; ++i) {
      const uint16_t half = to_fp16(scales[i]), stored = half == 0 && scales[i] > 0.0f ? 1 : half;
      memcpy(values + 2 * i, &stored, sizeof stored);
    }
  } else {
    encode(scales, n, code, values, range);
  }
  return LORDBA_PACK_OK;
}

lordba_pack_status lordba_pack_module(const float* a, const float* b, size_t r, size_t d_in, size_t d_out,
                                      lordba_scale_code code, lordba_packed* packed) {
  const float* const latents[2] = {a, b};
  const size_t sizes[2] = {r * d_in, d_out * r};
  for (int l = 0; l < 2; ++l) {
    for (size_t i = 0; i < sizes[l]; ++i) {
      if (!isfinite(latents[l][i])) return LORDBA_PACK_NOT_FINITE;
    }
  }
  const size_t columns = d_in > r ? d_in : r;
  double* sums = malloc(columns * sizeof(double) + (d_in + 2 * r + d_out) * sizeof(float));
  if (sums == NULL) abort(); /* a few KB */
  float *s_in = (float*)(sums + columns), *s_mid = s_in + d_in, *q_b = s_mid + r, *s_out = q_b + r;
  lordba_envelope(a, r, d_in, s_mid, s_in, sums);
  lordba_envelope(b, d_out, r, s_out, q_b, sums);
  for (size_t i = 0; i < r; ++i) s_mid[i] *= q_b[i];
  lordba_pack_signs(a, r, d_in, packed->a_signs);
  lordba_pack_signs(b, d_out, r, packed->b_signs);
  const float* const scales[3] = {s_in, s_mid, s_out};
  const size_t lengths[3] = {d_in, r, d_out};
  lordba_pack_status status = LORDBA_PACK_OK;
  for (int i = 0; i < 3 && status == LORDBA_PACK_OK; ++i) {
    status = lordba_encode_scales(scales[i], lengths[i], code, packed->scales[i], packed->ranges[i]);
  }
  free(sums);
  return status;
}
