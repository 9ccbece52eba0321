/* One contestant, called a number of times: what scripts/arm64_instructions.py counts the instructions of.
 *   arm64_calls CONTESTANT D R TOKENS CALLS    CONTESTANT: an instruction set of ours (prepared or, with ":stored"
 *                                              after it, packing in every call), "dense-fp32" or "dense-fp16"
 * Square modules, fp32 x and y, y += adapter(x), log4 scales. Prints the relative error of ours against float64. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "dense_lora.h"
#include "lordba_kernels.h"

static uint32_t state = 1;

static uint32_t draw(void) { return (state = state * 1664525u + 1013904223u) >> 8; }

static float draw_float(void) {
  float sum = -6.0f; /* close to normal */
  for (int i = 0; i < 12; ++i) sum += (float)draw() / 16777216.0f;
  return sum;
}

static void* aligned(size_t bytes) { return aligned_alloc(64, (bytes / 64 + 1) * 64); }

static void* random_bytes(size_t n) {
  uint8_t* bytes = aligned(n);
  for (size_t i = 0; i < n; ++i) bytes[i] = (uint8_t)draw();
  return bytes;
}

static float* random_floats(size_t n) {
  float* values = aligned(n * sizeof(float));
  for (size_t i = 0; i < n; ++i) values[i] = draw_float();
  return values;
}

static uint16_t* random_halves(size_t n) {
  uint16_t* values = aligned(n * sizeof(uint16_t));
  for (size_t i = 0; i < n; ++i) values[i] = (uint16_t)(0x3000 + draw() % 0x800);
  return values;
}

static float meaning[16];

static lordba_scales random_scales(size_t n) {
  return (lordba_scales){LORDBA_LOG4, (const uint8_t*)meaning, random_bytes((n + 1) / 2)};
}

static double sign(const uint8_t* row, size_t i) { return row[i / 8] >> i % 8 & 1 ? -1.0 : 1.0; }
static double scale(const lordba_scales* scales, size_t i) {
  return meaning[scales->values[i / 2] >> 4 * (i % 2) & 15];
}

static double error_of(const lordba_module* m, const float* x, size_t tokens, const float* y) {
  double worst = 0, largest = 0;
  double* h = malloc(m->r * sizeof(double));
  for (size_t t = 0; t < tokens; ++t, x += m->d_in, y += m->d_out) {
    for (size_t j = 0; j < m->r; ++j) {
      h[j] = 0;
      for (size_t i = 0; i < m->d_in; ++i) {
        h[j] += sign(m->a_signs + j * ((m->d_in + 7) / 8), i) * scale(&m->s_in, i) * x[i];
      }
      h[j] *= scale(&m->s_mid, j);
    }
    for (size_t o = 0; o < m->d_out; ++o) {
      double sum = 0;
      for (size_t j = 0; j < m->r; ++j) sum += sign(m->b_signs + o * ((m->r + 7) / 8), j) * h[j];
      sum *= scale(&m->s_out, o);
      worst = fmax(worst, fabs(sum - y[o]));
      largest = fmax(largest, fabs(sum));
    }
  }
  return worst / largest;
}

static int dense(size_t d, size_t r, size_t tokens, size_t calls, int half) {
  float *x = random_floats(tokens * d), *y = random_floats(tokens * d);
  if (half) {
    uint16_t *a = random_halves(d * r), *b = random_halves(d * r);
    for (size_t i = 0; i < calls; ++i) dense_lora_fp16(x, tokens, d, d, r, a, b, y);
  } else {
    float *a = random_floats(d * r), *b = random_floats(d * r);
    for (size_t i = 0; i < calls; ++i) dense_lora_fp32(x, tokens, d, d, r, a, b, y);
  }
  return 0;
}

int main(int argc, char** argv) {
  if (argc != 6) return 2;
  const size_t d = strtoul(argv[2], NULL, 10), r = strtoul(argv[3], NULL, 10), tokens = strtoul(argv[4], NULL, 10),
               calls = strtoul(argv[5], NULL, 10);
  if (strncmp(argv[1], "dense", 5) == 0) return dense(d, r, tokens, calls, strcmp(argv[1], "dense-fp16") == 0);
  char* stored = strchr(argv[1], ':');
  if (stored) *stored = 0;
  const lordba_kernels* kernels = lordba_select(argv[1]);
  if (!kernels) return 3;
  for (int c = 1; c < 16; ++c) meaning[c] = 0.1f * powf(1.2f, (float)c);
  lordba_module module = {.r = (uint32_t)r, .d_in = (uint32_t)d, .d_out = (uint32_t)d};
  module.a_signs = random_bytes(r * ((d + 7) / 8));
  module.b_signs = random_bytes(d * ((r + 7) / 8));
  module.s_in = random_scales(d), module.s_mid = random_scales(r), module.s_out = random_scales(d);
  const size_t bytes = lordba_prepared_size(&module, false);
  lordba_module prepared = module;
  if (!stored && lordba_prepare(kernels, &module, false, aligned(bytes), bytes, &prepared) != LORDBA_OK) return 1;
  float *x = random_floats(tokens * d), *y = random_floats(tokens * d);
  memset(y, 0, tokens * d * sizeof(float));
  const lordba_call call = {.modules = &prepared,
                            .count = 1,
                            .dtype = LORDBA_F32,
                            .tokens = tokens,
                            .x = x,
                            .x_stride = d,
                            .base = y,
                            .base_stride = d,
                            .y = y,
                            .y_stride = d};
  lordba_plan plan;
  if (lordba_plan_call(kernels, &call, 1, &plan) != LORDBA_OK) return 1;
  void* workspace = aligned(plan.workspace);
  for (size_t i = 0; i < calls; ++i) {
    if (lordba_apply(kernels, &call, workspace, plan.workspace) != LORDBA_OK) return 1;
    if (i == 0)
      printf("%s %zu %zu %zu error %.3g\n", lordba_isa(kernels), d, r, tokens, error_of(&module, x, tokens, y));
  }
  return 0;
}
