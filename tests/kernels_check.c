/* Compiled by test_kernels.py with sanitizers: every kernel over ragged shapes, in buffers of exact size.
 *   kernels_check auto             prints the instruction set that is chosen here
 *   kernels_check parity ISA       prints the worst error against a double reference; exit 3: not available here
 *   kernels_check calls ISA        several modules, splits, bases, strides, special values, transposition, bad calls
 *   kernels_check same ISA OTHER [TOKENS]   one call, of many tokens if not told, gives bitwise the same on both
 *   kernels_check hostile          truncated and damaged blobs: an error or a harmless result, never a bad access
 *   kernels_check overread         negative control: claims more bytes than there are, the sanitizer must stop it */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "lordba_kernels.h"

enum { HEADER = 32, RECORD = 64 };

static uint64_t random_state = 1;

static uint32_t random_u32(void) {
  random_state = random_state * 6364136223846793005u + 1442695040888963407u;
  return (uint32_t)(random_state >> 33);
}

static float random_float(void) { return (float)random_u32() / 1073741824.0f - 1.0f; }

static void* copy_of(const void* bytes, size_t size) { return memcpy(malloc(size ? size : 1), bytes, size); }

/* A blob with one module; *scales receives s_in, s_mid, s_out as doubles, one after the other. */
static uint8_t* make_blob(uint32_t r, uint32_t d_in, uint32_t d_out, lordba_scale_code code, size_t* size,
                          double* scales) {
  const uint32_t counts[3] = {d_in, r, d_out};
  uint64_t lengths[5] = {(uint64_t)r * ((d_in + 7) / 8), (uint64_t)d_out * ((r + 7) / 8)}, offsets[5];
  for (int i = 0; i < 3; ++i) lengths[2 + i] = lordba_scale_bytes(code, counts[i]);
  uint64_t total = HEADER + RECORD;
  for (int i = 0; i < 5; ++i) offsets[i] = total, total += lengths[i];
  uint8_t* blob = calloc(total, 1);
  const uint32_t header[4] = {0x44524f4c, 0x00004142, 1, 1}, record[4] = {r, d_in, d_out, (uint32_t)code};
  memcpy(blob, header, 16);
  memcpy(blob + 16, &total, 8);
  memcpy(blob + HEADER, record, 16);
  memcpy(blob + HEADER + 16, offsets, 40);
  for (uint64_t i = offsets[0]; i < offsets[2]; ++i)
    blob[i] = (uint8_t)random_u32(); /* dirty padding must not matter */
  for (int v = 0; v < 3; ++v) {
    uint8_t* section = blob + offsets[2 + v];
    float table[16] = {0.0f};
    for (int c = 1; c < 16; ++c) table[c] = 0.1f * powf(1.3f, (float)c);
    const float line[2] = {0.25f, 0.01f};
    if (code == LORDBA_LOG4) memcpy(section, table, 64);
    if (code == LORDBA_INT8) memcpy(section, line, 8);
    for (uint32_t i = 0; i < counts[v]; ++i, ++scales) {
      const uint32_t draw = random_u32();
      if (code == LORDBA_FP32) {
        const float value = 0.1f + (float)(draw % 1000) / 1000.0f;
        memcpy(section + 4 * i, &value, 4);
        *scales = value;
      } else if (code == LORDBA_FP16) { /* mostly near 1, some subnormal */
        const uint16_t exponent = draw % 8 ? 13 + draw % 3 : 0, mantissa = draw >> 8 & 1023,
                       half = (uint16_t)(exponent << 10 | mantissa);
        memcpy(section + 2 * i, &half, 2);
        *scales = exponent ? ldexp(1024 + mantissa, exponent - 25) : ldexp(mantissa, -24);
      } else if (code == LORDBA_INT8) {
        const uint8_t c = (uint8_t)draw;
        section[8 + i] = c;
        *scales = c ? line[0] + line[1] * (double)(c - 1) : 0.0;
      } else {
        const uint8_t c = draw % 16;
        section[64 + i / 2] |= (uint8_t)(c << 4 * (i % 2));
        *scales = table[c];
      }
    }
  }
  *size = total;
  return blob;
}

static double sign(const uint8_t* row, uint32_t i) { return row[i / 8] >> i % 8 & 1 ? -1.0 : 1.0; }

/* Rounded to the dtype and back, by double arithmetic of our own. */
static double rounded(double value, lordba_dtype dtype) {
  if (dtype == LORDBA_F32 || value == 0 || !isfinite(value)) return (float)value;
  int exponent;
  frexp(value, &exponent);
  const int bits = dtype == LORDBA_F16 ? 11 : 8, lowest = dtype == LORDBA_F16 ? -24 : -133;
  const int last = exponent - bits > lowest ? exponent - bits : lowest;
  return ldexp(rint(ldexp(value, -last)), last);
}

static void put(void* array, size_t i, double value, lordba_dtype dtype) {
  uint8_t* bytes = array;
  const float exact = (float)rounded(value, dtype);
  uint32_t bits;
  memcpy(&bits, &exact, 4);
  if (dtype == LORDBA_F32) {
    memcpy(bytes + 4 * i, &bits, 4);
    return;
  }
  uint16_t half = (uint16_t)(bits >> 16);
  if (dtype == LORDBA_F16) {
    int exponent;
    const double fraction = fabs(frexp(exact, &exponent));
    if (!isfinite(exact)) {
      half = isnan(exact) ? 0x7e00 : 0x7c00;
    } else if (exponent > -14) {
      half = exact == 0 ? 0 : (uint16_t)((exponent + 14) << 10 | ((int)ldexp(fraction, 11) & 1023));
    } else {
      half = (uint16_t)ldexp(fabs(exact), 24);
    }
    if (signbit(exact)) half |= 0x8000;
  }
  memcpy(bytes + 2 * i, &half, 2);
}

static double get(const void* array, size_t i, lordba_dtype dtype) {
  const uint8_t* bytes = array;
  uint32_t bits = 0;
  if (dtype == LORDBA_F32) {
    memcpy(&bits, bytes + 4 * i, 4);
  } else {
    uint16_t half;
    memcpy(&half, bytes + 2 * i, 2);
    if (dtype == LORDBA_F16) {
      const int exponent = half >> 10 & 31, mantissa = half & 1023;
      double value = exponent ? ldexp(1024 + mantissa, exponent - 25) : ldexp(mantissa, -24);
      if (exponent == 31) value = mantissa ? NAN : INFINITY;
      return half & 0x8000 ? -value : value;
    }
    bits = (uint32_t)half << 16;
  }
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

static size_t bytes_of(lordba_dtype dtype) { return dtype == LORDBA_F32 ? 4 : 2; }

/* The call cut for `threads` threads, its tiles run from last to first; true if it ran. */
static bool run(const lordba_kernels* kernels, const lordba_call* call, size_t threads) {
  lordba_plan plan;
  if (lordba_plan_call(kernels, call, threads, &plan) != LORDBA_OK) return false;
  void* workspace = aligned_alloc(LORDBA_ALIGNMENT, (plan.workspace + 63) / 64 * 64 + 64);
  memset(workspace, 0xff, plan.workspace); /* NaN: nothing may be read before it is written */
  for (size_t stage = 0; stage < plan.stages; ++stage) {
    for (size_t tile = plan.tiles[stage]; tile-- > 0;) {
      lordba_run_tile(kernels, call, &plan, workspace, stage, tile);
    }
  }
  free(workspace);
  return true;
}

/* y[t][column + o] in double. */
static void reference(const lordba_module* module, const double* scales, const lordba_call* call, const double* base,
                      size_t width, size_t column, double* y) {
  double* h = malloc((module->r + 1) * sizeof(double));
  for (size_t t = 0; t < call->tokens; ++t) {
    for (uint32_t j = 0; j < module->r; ++j) {
      h[j] = 0;
      const uint8_t* row = module->a_signs + (size_t)j * ((module->d_in + 7) / 8);
      for (uint32_t i = 0; i < module->d_in; ++i) {
        h[j] += sign(row, i) * scales[i] * get(call->x, t * call->x_stride + i, call->dtype);
      }
      h[j] *= scales[module->d_in + j];
    }
    for (uint32_t o = 0; o < module->d_out; ++o) {
      double sum = 0;
      const uint8_t* row = module->b_signs + (size_t)o * ((module->r + 7) / 8);
      for (uint32_t j = 0; j < module->r; ++j) sum += sign(row, j) * h[j];
      const size_t at = t * width + column + o;
      y[at] = sum * scales[module->d_in + module->r + o] + (base ? base[at] : 0.0);
    }
  }
  free(h);
}

/* Worst error relative to the largest output, in units of what is allowed: 1e-6, or the dtype's rounding. */
static double error_of(const double* expected, const void* y, size_t n, size_t stride, size_t width,
                       lordba_dtype dtype) {
  double worst = 0, largest = 0;
  for (size_t i = 0; i < n; ++i) largest = fmax(largest, fabs(expected[i]));
  for (size_t i = 0; i < n; ++i) {
    const double found = get(y, i / width * stride + i % width, dtype);
    /* Half a unit of the last place, and 1e-6 that may tip it over to the next. */
    const double rounding =
        dtype == LORDBA_F32 ? 0 : fabs(expected[i]) * (dtype == LORDBA_F16 ? 0x1p-11 : 0x1p-8) + 0x1p-24;
    const double error = fabs(expected[i] - found) - rounding;
    if (isnan(found)) return INFINITY;
    worst = fmax(worst, error / fmax(largest, 1e-30));
  }
  return worst / 1e-6;
}

/* One module: x and y of exact size, then at odd addresses; fresh and prepared; cut for 1, 2, 3 and 8 threads. */
static double check(const lordba_kernels* kernels, uint32_t r, uint32_t d_in, uint32_t d_out, lordba_scale_code code,
                    lordba_dtype dtype, size_t tokens, bool with_base) {
  size_t size;
  double* scales = malloc((r + d_in + d_out) * sizeof(double));
  uint8_t* blob = make_blob(r, d_in, d_out, code, &size, scales);
  lordba_module module, prepared;
  if (lordba_blob_module(blob, size, 0, &module) != LORDBA_OK) return INFINITY;
  const size_t x_bytes = tokens * d_in * bytes_of(dtype), n = tokens * d_out, y_bytes = n * bytes_of(dtype);
  void *x = malloc(x_bytes), *base = malloc(y_bytes);
  double *base_values = malloc(n * sizeof(double)), *expected = malloc(n * sizeof(double));
  for (size_t i = 0; i < tokens * d_in; ++i) put(x, i, random_float(), dtype);
  for (size_t i = 0; i < n; ++i) {
    put(base, i, random_float(), dtype);
    base_values[i] = get(base, i, dtype);
  }
  void* memory = aligned_alloc(LORDBA_ALIGNMENT, lordba_prepared_size(&module, false));
  if (lordba_prepare(kernels, &module, false, memory, lordba_prepared_size(&module, false), &prepared)) return INFINITY;
  lordba_call call = {.modules = &module,
                      .count = 1,
                      .dtype = dtype,
                      .tokens = tokens,
                      .x = x,
                      .x_stride = d_in,
                      .base = with_base ? base : NULL,
                      .base_stride = d_out,
                      .y_stride = d_out};
  reference(&module, scales, &call, with_base ? base_values : NULL, d_out, 0, expected);
  double worst = 0;
  uint8_t *first = malloc(y_bytes), *y = malloc(y_bytes), *odd_x = malloc(x_bytes + 2), *odd_y = malloc(y_bytes + 2);
  call.y = first;
  if (!run(kernels, &call, 1)) return INFINITY;
  worst = error_of(expected, first, n, d_out, d_out, dtype);
  const size_t threads[] = {1, 2, 3, 8};
  for (size_t i = 0; i < 8; ++i) {
    call.modules = i % 2 ? &prepared : &module;
    call.y = y;
    call.x = x;
    if (i == 3) { /* two bytes off: aligned for halves, not for floats */
      memcpy(odd_x + 2, x, x_bytes);
      call.x = odd_x + 2;
      call.y = odd_y + 2;
    }
    if (i == 4 && with_base) { /* y += */
      memcpy(y, base, y_bytes);
      call.base = y;
    }
    if (!run(kernels, &call, threads[i / 2]) || memcmp(first, call.y, y_bytes) != 0) worst = INFINITY;
    call.base = with_base ? base : NULL;
  }
  free(odd_y), free(odd_x), free(y), free(first), free(memory), free(expected), free(base_values);
  free(base), free(x), free(blob), free(scales);
  return worst;
}

static int parity(const lordba_kernels* kernels) {
  const uint32_t sizes[][3] = {{1, 1, 1},       {3, 5, 7},     {8, 8, 8},      {12, 31, 33},   {16, 512, 1024},
                               {16, 513, 1025}, {17, 576, 9},  {24, 100, 50},  {33, 1537, 40}, {40, 520, 1100},
                               {64, 600, 200},  {130, 77, 61}, {16, 11008, 20}};
  const size_t tokens[] = {1, 2, 5, 16, 33, 70};
  double worst = 0;
  for (size_t s = 0; s < sizeof sizes / sizeof *sizes; ++s) {
    for (size_t t = 0; t < 6; ++t) {
      for (int code = 0; code < 4; ++code) {
        const lordba_dtype dtype = (lordba_dtype)((s + t + (size_t)code) % 3);
        if (sizes[s][1] > 2000 && tokens[t] > 5) continue;
        const double error = check(kernels, sizes[s][0], sizes[s][1], sizes[s][2], (lordba_scale_code)code, dtype,
                                   tokens[t], (s + (size_t)code + t) % 2);
        if (!(error < 1)) {
          printf("r=%u d_in=%u d_out=%u code=%d dtype=%d tokens=%zu: error %g of the allowed\n", sizes[s][0],
                 sizes[s][1], sizes[s][2], code, (int)dtype, tokens[t], error);
        }
        worst = fmax(worst, error);
      }
    }
  }
  printf("worst %g of the allowed\n", worst);
  return worst < 1 ? 0 : 1;
}

#define EXPECT(condition)                                          \
  do {                                                             \
    if (!(condition)) {                                            \
      printf("line %d: %s does not hold\n", __LINE__, #condition); \
      ++failures;                                                  \
    }                                                              \
  } while (0)

/* Three modules side by side, the middle one without adapter; rows with gaps that nothing may touch. */
static int check_modules(const lordba_kernels* kernels, size_t tokens) {
  int failures = 0;
  enum { D_IN = 600, X_STRIDE = 605 };
  const uint32_t ranks[3] = {24, 0, 16}, d_outs[3] = {300, 70, 530};
  const size_t width = 900, stride = 903;
  lordba_module modules[3];
  double* scales[3];
  uint8_t* blobs[3];
  for (int m = 0; m < 3; ++m) {
    size_t size;
    scales[m] = malloc((ranks[m] + 1 + D_IN + d_outs[m]) * sizeof(double));
    blobs[m] = make_blob(ranks[m] ? ranks[m] : 1, D_IN, d_outs[m], LORDBA_LOG4, &size, scales[m]);
    EXPECT(lordba_blob_module(blobs[m], size, 0, &modules[m]) == LORDBA_OK);
    if (ranks[m] == 0) modules[m].r = 0;
  }
  float* x = malloc(tokens * X_STRIDE * sizeof(float));
  double *base = malloc(tokens * width * sizeof(double)), *expected = malloc(tokens * width * sizeof(double));
  float *y = malloc(tokens * stride * sizeof(float)), *start = malloc(tokens * stride * sizeof(float));
  for (size_t i = 0; i < tokens * X_STRIDE; ++i) x[i] = i % X_STRIDE < D_IN ? random_float() : NAN;
  for (size_t i = 0; i < tokens * stride; ++i) start[i] = random_float();
  for (size_t i = 0; i < tokens * width; ++i) expected[i] = base[i] = start[i / width * stride + i % width];
  lordba_call call = {.modules = modules,
                      .count = 3,
                      .tokens = tokens,
                      .x = x,
                      .x_stride = X_STRIDE,
                      .base = y,
                      .base_stride = stride,
                      .y = y,
                      .y_stride = stride};
  reference(&modules[0], scales[0], &call, base, width, 0, expected);
  reference(&modules[2], scales[2], &call, base, width, 370, expected);
  for (size_t threads = 1; threads <= 16; threads *= 2) {
    memcpy(y, start, tokens * stride * sizeof(float));
    EXPECT(run(kernels, &call, threads));
    EXPECT(error_of(expected, y, tokens * width, stride, width, LORDBA_F32) < 1);
    for (size_t i = 0; i < tokens * stride; ++i) {
      if (i % stride >= width) EXPECT(y[i] == start[i]);
    }
  }
  free(start), free(y), free(expected), free(base), free(x);
  for (int m = 0; m < 3; ++m) free(blobs[m]), free(scales[m]);
  return failures;
}

/* NaN and infinity of one token reach all its outputs and no other token's; subnormal inputs are not lost. */
static int check_special(const lordba_kernels* kernels, size_t tokens, lordba_dtype dtype) {
  int failures = 0;
  size_t size;
  double scales[20 + 90 + 50];
  uint8_t* blob = make_blob(20, 90, 50, LORDBA_FP32, &size, scales);
  lordba_module module;
  EXPECT(lordba_blob_module(blob, size, 0, &module) == LORDBA_OK);
  void *x = malloc(tokens * 90 * 4), *y = malloc(tokens * 50 * 4);
  double* expected = malloc(tokens * 50 * sizeof(double));
  lordba_call call = {
      .modules = &module, .count = 1, .dtype = dtype, .tokens = tokens, .x = x, .x_stride = 90, .y = y, .y_stride = 50};
  for (int special = 0; special < 3; ++special) {
    for (size_t i = 0; i < tokens * 90; ++i) put(x, i, random_float() * (special == 2 ? 0x1p-130 : 1), dtype);
    const double value = special == 0 ? (double)NAN : (double)INFINITY;
    if (special < 2) put(x, (tokens - 1) * 90 + 37, value, dtype);
    EXPECT(run(kernels, &call, 1));
    reference(&module, scales, &call, NULL, 50, 0, expected);
    for (size_t i = 0; i < tokens * 50; ++i) {
      const double found = get(y, i, dtype);
      if (special < 2 && i / 50 == tokens - 1) {
        EXPECT(!isfinite(found)); /* infinity meets its negative in the second stage: NaN, as in eager */
      } else {
        EXPECT(isfinite(found));
        if (special == 2 && dtype != LORDBA_F16) { /* the last places: 2^-149 and 2^-133 */
          const double last = dtype == LORDBA_BF16 ? 0x1p-133 : 0x1p-141;
          EXPECT(fabs(found - expected[i]) <= fabs(expected[i]) * 0x1p-8 + last);
        }
      }
    }
  }
  free(expected), free(y), free(x), free(blob);
  return failures;
}

/* The transposed module gives dX = s_in * (A^T (s_mid * (B^T (s_out * dY)))). */
static int check_transposed(const lordba_kernels* kernels, uint32_t r, uint32_t d_in, uint32_t d_out, size_t tokens) {
  int failures = 0;
  size_t size;
  double* scales = malloc((r + d_in + d_out) * sizeof(double));
  uint8_t* blob = make_blob(r, d_in, d_out, LORDBA_INT8, &size, scales);
  lordba_module module, back;
  EXPECT(lordba_blob_module(blob, size, 0, &module) == LORDBA_OK);
  const size_t bytes = lordba_prepared_size(&module, true);
  void* memory = aligned_alloc(LORDBA_ALIGNMENT, bytes);
  EXPECT(lordba_prepare(kernels, &module, true, memory, bytes, &back) == LORDBA_OK);
  float *dy = malloc(tokens * d_out * sizeof(float)), *dx = malloc(tokens * d_in * sizeof(float));
  double* expected = malloc(tokens * d_in * sizeof(double));
  for (size_t i = 0; i < tokens * d_out; ++i) dy[i] = random_float();
  lordba_call call = {
      .modules = &back, .count = 1, .tokens = tokens, .x = dy, .x_stride = d_out, .y = dx, .y_stride = d_in};
  EXPECT(run(kernels, &call, 1));
  for (size_t t = 0; t < tokens; ++t) {
    for (uint32_t i = 0; i < d_in; ++i) expected[t * d_in + i] = 0;
    for (uint32_t j = 0; j < r; ++j) {
      double g = 0;
      for (uint32_t o = 0; o < d_out; ++o) {
        g += sign(module.b_signs + o * ((r + 7) / 8), j) * scales[d_in + r + o] * dy[t * d_out + o];
      }
      for (uint32_t i = 0; i < d_in; ++i) {
        expected[t * d_in + i] += sign(module.a_signs + j * ((d_in + 7) / 8), i) * scales[d_in + j] * g * scales[i];
      }
    }
  }
  EXPECT(error_of(expected, dx, tokens * d_in, d_in, d_in, LORDBA_F32) < 1);
  free(expected), free(dx), free(dy), free(memory), free(blob), free(scales);
  return failures;
}

static int check_bad_calls(const lordba_kernels* kernels) {
  int failures = 0;
  size_t size;
  double scales[19 + 45 + 35];
  uint8_t* blob = make_blob(19, 45, 35, LORDBA_FP32, &size, scales);
  lordba_module modules[2];
  EXPECT(lordba_blob_module(blob, size, 0, &modules[0]) == LORDBA_OK);
  modules[1] = modules[0];
  float x[2 * 45] = {0}, y[2 * 70];
  _Alignas(LORDBA_ALIGNMENT) uint8_t memory[1 << 16];
  const lordba_call good = {.modules = modules,
                            .count = 2,
                            .tokens = 2,
                            .x = x,
                            .x_stride = 45,
                            .base = y,
                            .base_stride = 70,
                            .y = y,
                            .y_stride = 70};
  lordba_plan plan;
  EXPECT(lordba_plan_call(kernels, &good, 1, &plan) == LORDBA_OK);
  EXPECT(lordba_apply(kernels, &good, memory, plan.workspace) == LORDBA_OK);
  EXPECT(lordba_apply(kernels, &good, memory, plan.workspace - 1) == LORDBA_SMALL_WORKSPACE);
  EXPECT(lordba_apply(kernels, &good, memory + 4, plan.workspace) == LORDBA_BAD_POINTER);
  EXPECT(lordba_apply(kernels, &good, NULL, plan.workspace) == LORDBA_BAD_POINTER);
#define BAD(status, ...)                                            \
  do {                                                              \
    lordba_call call = good;                                        \
    __VA_ARGS__;                                                    \
    EXPECT(lordba_plan_call(kernels, &call, 1, &plan) == (status)); \
  } while (0)
  BAD(LORDBA_BAD_POINTER, call.x = NULL);
  BAD(LORDBA_BAD_POINTER, call.y = NULL);
  BAD(LORDBA_BAD_POINTER, call.modules = NULL);
  BAD(LORDBA_BAD_DTYPE, call.dtype = (lordba_dtype)3);
  BAD(LORDBA_BAD_SIZE, call.count = 0);
  BAD(LORDBA_BAD_SIZE, call.x_stride = 44);
  BAD(LORDBA_BAD_SIZE, call.y_stride = 69);
  BAD(LORDBA_BAD_SIZE, call.base_stride = 69);
  BAD(LORDBA_OK, call.base_stride = 0; call.base = NULL);
  BAD(LORDBA_OK, call.tokens = 0; call.x = NULL; call.y = NULL);
  EXPECT(plan.stages == 0 && plan.workspace == 0);
  modules[1].d_in = 46;
  BAD(LORDBA_BAD_SIZE, (void)call);
  modules[1].d_in = 45;
  modules[1].d_out = 0;
  BAD(LORDBA_BAD_SIZE, (void)call);
  lordba_module prepared;
  const size_t bytes = lordba_prepared_size(&modules[0], true);
  EXPECT(lordba_prepare(kernels, &modules[0], true, memory, bytes - 1, &prepared) == LORDBA_SMALL_WORKSPACE);
  EXPECT(lordba_prepare(kernels, &modules[0], true, memory + 1, bytes, &prepared) == LORDBA_BAD_POINTER);
  /* All of s_out zero: y = base bit by bit, whatever x holds. */
  EXPECT(!lordba_is_zero(&modules[0]));
  memset(blob + (modules[0].s_out.values - blob), 0, 35 * 4);
  EXPECT(lordba_is_zero(&modules[0]));
  lordba_call call = good;
  call.count = 1;
  for (size_t i = 0; i < 2 * 45; ++i) x[i] = NAN;
  for (size_t i = 0; i < 2 * 70; ++i) y[i] = (float)i;
  EXPECT(run(kernels, &call, 1));
  for (size_t i = 0; i < 2 * 70; ++i) EXPECT(y[i] == (float)i);
  call.base = NULL;
  EXPECT(run(kernels, &call, 4));
  for (size_t i = 0; i < 70; ++i) EXPECT(y[i] == (i < 35 ? 0.0f : (float)i));
  free(blob);
  return failures;
}

/* Against the C library's own pow, over ranges of every size that fp16 has. */
static int check_meaning(void) {
  int failures = 0;
  float meaning[16];
  for (uint32_t lo = 1; lo < 0x7c00; lo += 37) {
    for (uint32_t hi = lo; hi < 0x7c00; hi += 301) {
      const uint16_t range[2] = {(uint16_t)lo, (uint16_t)hi};
      const double from = get(range, 0, LORDBA_F16), to = get(range, 1, LORDBA_F16);
      EXPECT(lordba_scale_meaning(LORDBA_LOG4, (const uint8_t*)range, meaning) && meaning[0] == 0);
      EXPECT(meaning[1] == from && meaning[15] == to);
      for (int c = 2; c < 15; ++c) {
        const double level = from * pow(to / from, (c - 1) / 14.0);
        EXPECT(fabs(meaning[c] - level) <= 1e-7 * level);
      }
      EXPECT(lordba_scale_meaning(LORDBA_INT8, (const uint8_t*)range, meaning));
      EXPECT(meaning[0] == from && meaning[1] == (float)((to - from) / 254));
    }
  }
  const uint16_t bad[][2] = {{0, 1}, {2, 1}, {0x8001, 1}, {1, 0x7c00}, {1, 0x7e00}, {0x7e00, 0x7e00}};
  for (size_t i = 0; i < sizeof bad / sizeof *bad; ++i) {
    EXPECT(!lordba_scale_meaning(LORDBA_LOG4, (const uint8_t*)bad[i], meaning));
  }
  return failures;
}

static int calls(const lordba_kernels* kernels) {
  int failures = check_bad_calls(kernels) + check_meaning();
  const size_t tokens[] = {1, 3, 8, 40};
  for (int t = 0; t < 4; ++t) {
    failures += check_modules(kernels, tokens[t]);
    for (int dtype = 0; dtype < 3; ++dtype) failures += check_special(kernels, tokens[t], (lordba_dtype)dtype);
    failures += check_transposed(kernels, 16, 576, 192, tokens[t]);
    failures += check_transposed(kernels, 5, 9, 35, tokens[t]);
    failures += check_transposed(kernels, 70, 100, 44, tokens[t]);
  }
  printf("%d failures\n", failures);
  return failures ? 1 : 0;
}

static int same(const lordba_kernels* kernels, const lordba_kernels* other, size_t tokens) {
  size_t size;
  const size_t d_in = 700, d_out = 330;
  double* scales = malloc((20 + d_in + d_out) * sizeof(double));
  uint8_t* blob = make_blob(20, 700, 330, LORDBA_LOG4, &size, scales);
  lordba_module module;
  if (lordba_blob_module(blob, size, 0, &module) != LORDBA_OK) return 1;
  float* x = malloc(tokens * d_in * sizeof(float));
  float *y = malloc(tokens * d_out * sizeof(float)), *again = malloc(tokens * d_out * sizeof(float));
  for (size_t i = 0; i < tokens * d_in; ++i) x[i] = random_float();
  lordba_call call = {
      .modules = &module, .count = 1, .tokens = tokens, .x = x, .x_stride = d_in, .y = y, .y_stride = d_out};
  bool equal = run(kernels, &call, 1);
  call.y = again;
  equal = equal && run(other, &call, 1) && memcmp(y, again, tokens * d_out * sizeof(float)) == 0;
  free(again), free(y), free(x), free(blob), free(scales);
  printf("%s\n", equal ? "the same" : "not the same");
  return equal ? 0 : 1;
}

/* Runs what a damaged blob still describes, if its d_in and d_out are those the program would insist on. */
static bool survives(const uint8_t* bytes, size_t size, const float* x) {
  uint8_t* blob = copy_of(bytes, size);
  lordba_module module;
  const bool valid = lordba_blob_module(blob, size, 0, &module) == LORDBA_OK;
  if (valid && module.r != 0 && module.d_in == 45 && module.d_out == 35) {
    float* y = malloc(6 * 35 * sizeof(float));
    const lordba_call call = {
        .modules = &module, .count = 1, .tokens = 6, .x = x, .x_stride = 45, .y = y, .y_stride = 35};
    run(lordba_select(NULL), &call, 1);
    free(y);
  }
  free(blob);
  return valid;
}

static int hostile(void) {
  float* x = calloc(6 * 45, sizeof(float));
  size_t size, accepted = 0;
  double scales[19 + 45 + 35];
  for (int code = 0; code < 4; ++code) {
    uint8_t* blob = make_blob(19, 45, 35, (lordba_scale_code)code, &size, scales);
    for (size_t length = 0; length < size; ++length) accepted += survives(blob, length, x);
    for (int trial = 0; trial < 20000; ++trial) {
      uint8_t* damaged = copy_of(blob, size);
      for (int k = 0; k <= trial % 3; ++k) damaged[8 + random_u32() % (HEADER + RECORD - 8)] = (uint8_t)random_u32();
      survives(damaged, size, x);
      free(damaged);
    }
    free(blob);
  }
  free(x);
  printf("truncated blobs accepted: %zu\n", accepted);
  return accepted == 0 ? 0 : 1;
}

static int overread(void) {
  size_t size;
  double scales[19 + 45 + 35];
  float x[45] = {0}, y[35];
  uint8_t* blob = make_blob(19, 45, 35, LORDBA_FP32, &size, scales);
  uint8_t* truncated = copy_of(blob, size - 4);
  lordba_module module;
  if (lordba_blob_module(truncated, size, 0, &module) != LORDBA_OK) return 1;
  const lordba_call call = {
      .modules = &module, .count = 1, .tokens = 1, .x = x, .x_stride = 45, .y = y, .y_stride = 35};
  run(lordba_select("scalar"), &call, 1);
  return 0;
}

int main(int argc, char** argv) {
  const lordba_kernels* kernels = lordba_select(argc > 2 ? argv[2] : NULL);
  if (!kernels) return 3;
  if (argc == 2 && strcmp(argv[1], "auto") == 0) return puts(lordba_isa(kernels)) < 0;
  if (argc == 3 && strcmp(argv[1], "parity") == 0) return parity(kernels);
  if (argc == 3 && strcmp(argv[1], "calls") == 0) return calls(kernels);
  if (argc >= 4 && strcmp(argv[1], "same") == 0) {
    return same(kernels, lordba_select(argv[3]), argc > 4 ? strtoul(argv[4], NULL, 10) : 45);
  }
  if (argc == 2 && strcmp(argv[1], "hostile") == 0) return hostile();
  if (argc == 2 && strcmp(argv[1], "overread") == 0) return overread();
  return 2;
}
