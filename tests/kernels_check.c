/* Compiled by test_kernels.py with sanitizers: every kernel over ragged shapes, in buffers of exact size.
 *   kernels_check parity ISA   prints the worst error against a double reference; exit 3: not available here
 *   kernels_check hostile      truncated and damaged blobs: an error or a harmless result, never a bad access
 *   kernels_check overread     negative control: claims more bytes than there are, the sanitizer must stop it */
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

/* Both stages in every way they can be cut; returns the outputs [tokens][d_out]. */
static float* apply(const lordba_kernels* kernels, const lordba_module* module, const float* x, size_t tokens,
                    const float* base, bool split) {
  const size_t rank = lordba_padded_rank(module), chunks = split ? lordba_chunks(module) : 1;
  float* sums = calloc(chunks * tokens * rank + 1, sizeof(float));
  float* y = malloc(tokens * module->d_out * sizeof(float));
  if (split) {
    for (size_t c = chunks; c-- > 0;) {
      lordba_sum_inputs(kernels, module, x, module->d_in, tokens, c, c + 1, sums + c * tokens * rank);
    }
  } else {
    lordba_sum_inputs(kernels, module, x, module->d_in, tokens, 0, lordba_chunks(module), sums);
  }
  lordba_scale_ranks(kernels, module, tokens, chunks, sums);
  const size_t step = split ? 48 : module->d_out;
  for (size_t o = 0; o < module->d_out; o += step) {
    const size_t end = o + step < module->d_out ? o + step : module->d_out;
    lordba_sum_ranks(kernels, module, sums, tokens, o, end, base, module->d_out, y, module->d_out);
  }
  free(sums);
  return y;
}

static double check(const lordba_kernels* kernels, uint32_t r, uint32_t d_in, uint32_t d_out, lordba_scale_code code,
                    size_t tokens, bool with_base) {
  size_t size;
  double* scales = malloc((r + d_in + d_out) * sizeof(double));
  uint8_t* blob = make_blob(r, d_in, d_out, code, &size, scales);
  lordba_module module;
  if (lordba_blob_module(blob, size, 0, &module) != LORDBA_OK) return INFINITY;
  float *x = malloc(tokens * d_in * sizeof(float)), *base = malloc(tokens * d_out * sizeof(float));
  for (size_t i = 0; i < tokens * d_in; ++i) x[i] = random_float();
  for (size_t i = 0; i < tokens * d_out; ++i) base[i] = random_float();
  float* y = apply(kernels, &module, x, tokens, with_base ? base : NULL, false);
  float* again = apply(kernels, &module, x, tokens, with_base ? base : NULL, true);
  const bool same = memcmp(y, again, tokens * d_out * sizeof(float)) == 0;
  double worst = 0, largest = 0;
  double* h = malloc(r * sizeof(double));
  for (size_t t = 0; t < tokens; ++t) {
    for (uint32_t j = 0; j < r; ++j) {
      h[j] = 0;
      const uint8_t* row = module.a_signs + (size_t)j * ((d_in + 7) / 8);
      for (uint32_t i = 0; i < d_in; ++i) h[j] += sign(row, i) * scales[i] * x[t * d_in + i];
      h[j] *= scales[d_in + j];
    }
    for (uint32_t o = 0; o < d_out; ++o) {
      double sum = 0;
      const uint8_t* row = module.b_signs + (size_t)o * ((r + 7) / 8);
      for (uint32_t j = 0; j < r; ++j) sum += sign(row, j) * h[j];
      sum = sum * scales[d_in + r + o] + (with_base ? base[t * d_out + o] : 0.0);
      worst = fmax(worst, fabs(sum - y[t * d_out + o]));
      largest = fmax(largest, fabs(sum));
    }
  }
  free(h), free(again), free(y), free(base), free(x), free(blob), free(scales);
  if (!same) return INFINITY; /* every split gives bitwise the same result */
  return largest > 0 ? worst / largest : worst;
}

static int parity(const char* isa) {
  const lordba_kernels* kernels = lordba_select(isa);
  if (!kernels) return 3;
  const uint32_t sizes[][3] = {{1, 1, 1},       {3, 5, 7},     {8, 8, 8},      {12, 31, 33},   {16, 512, 1024},
                               {16, 513, 1025}, {17, 576, 9},  {24, 100, 50},  {33, 1537, 40}, {40, 520, 1100},
                               {64, 600, 200},  {130, 77, 61}, {16, 11008, 20}};
  const size_t tokens[] = {1, 2, 5};
  double worst = 0;
  for (size_t s = 0; s < sizeof sizes / sizeof *sizes; ++s) {
    for (int code = 0; code < 4; ++code) {
      for (size_t t = 0; t < 3; ++t) {
        const double error = check(kernels, sizes[s][0], sizes[s][1], sizes[s][2], (lordba_scale_code)code, tokens[t],
                                   (s + code + t) % 2);
        if (!(error < 1e-6)) {
          printf("r=%u d_in=%u d_out=%u code=%d tokens=%zu: error %g\n", sizes[s][0], sizes[s][1], sizes[s][2], code,
                 tokens[t], error);
        }
        worst = fmax(worst, error);
      }
    }
  }
  printf("worst %g\n", worst);
  return worst < 1e-6 ? 0 : 1;
}

/* Runs what a damaged blob still describes, if its d_in and d_out are those the program would insist on. */
static bool survives(const uint8_t* bytes, size_t size, const float* x) {
  uint8_t* blob = copy_of(bytes, size);
  lordba_module module;
  const bool valid = lordba_blob_module(blob, size, 0, &module) == LORDBA_OK;
  if (valid && module.r != 0 && module.d_in == 45 && module.d_out == 35) {
    free(apply(lordba_select(NULL), &module, x, 2, NULL, false));
    lordba_is_zero(lordba_select(NULL), &module);
  }
  free(blob);
  return valid;
}

static int hostile(void) {
  float* x = calloc(2 * 45, sizeof(float));
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
  float* x = calloc(45, sizeof(float));
  uint8_t* blob = make_blob(19, 45, 35, LORDBA_FP32, &size, scales);
  uint8_t* truncated = copy_of(blob, size - 4);
  lordba_module module;
  if (lordba_blob_module(truncated, size, 0, &module) != LORDBA_OK) return 1;
  free(apply(lordba_select("scalar"), &module, x, 1, NULL, false));
  return 0;
}

int main(int argc, char** argv) {
  if (argc == 3 && strcmp(argv[1], "parity") == 0) return parity(argv[2]);
  if (argc == 2 && strcmp(argv[1], "hostile") == 0) return hostile();
  if (argc == 2 && strcmp(argv[1], "overread") == 0) return overread();
  return 2;
}
