#include "optimizer.h"

#include <math.h>

static size_t blocks_of(size_t n) { return (n + LORDBA_BLOCK - 1) / LORDBA_BLOCK; }

size_t lordba_optimizer_bytes(lordba_optimizer_kind kind, size_t n) {
  switch (kind) {
    case LORDBA_SGD:
      return n * sizeof(float);
    case LORDBA_ADAMW:
      return 2 * n * sizeof(float);
    case LORDBA_ADAMW8:
      return blocks_of(n) * (2 * LORDBA_BLOCK + 2 * sizeof(float));
  }
  return 0;
}

static void sgd(const lordba_optimizer* o, float rate, float factor, float* restrict w, const float* restrict g,
                float* restrict m, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    m[i] = o->beta1 * m[i] + factor * g[i];
    w[i] -= rate * (m[i] + o->decay * w[i]);
  }
}

/* What is the same for all weights of a step: the bias corrections, folded into rate and epsilon. */
typedef struct {
  float rate, epsilon, shrink, factor;
} adam_step;

static adam_step adam_of(const lordba_optimizer* o, uint64_t step, float rate, float factor) {
  const double c1 = 1 - pow(o->beta1, (double)step), c2 = sqrt(1 - pow(o->beta2, (double)step));
  return (adam_step){(float)(rate * c2 / c1), (float)(o->epsilon * c2), 1 - rate * o->decay, factor};
}

static void adamw(const lordba_optimizer* o, adam_step s, float* restrict w, const float* restrict g, float* restrict m,
                  float* restrict v, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    const float gradient = s.factor * g[i];
    m[i] = o->beta1 * m[i] + (1 - o->beta1) * gradient;
    v[i] = o->beta2 * v[i] + (1 - o->beta2) * gradient * gradient;
    w[i] = s.shrink * w[i] - s.rate * m[i] / (sqrtf(v[i]) + s.epsilon);
  }
}

/* A number in [0, 1) from an index and a seed. */
static inline float random_of(uint32_t index, uint32_t seed) {
  uint32_t x = index * 0x9e3779b1u ^ seed;
  x = (x ^ x >> 16) * 0x85ebca6bu;
  x = (x ^ x >> 13) * 0xc2b2ae35u;
  return (float)((x ^ x >> 16) >> 8) * 0x1p-24f;
}

/* A block of weights whose moments are bytes: m = scale * code; the root of v = scale * code, and never 0 again once
 * it was more, or a weight without gradient would move by m / epsilon. */
static void adamw8(const lordba_optimizer* o, adam_step s, uint32_t seed, float* restrict w, const float* restrict g,
                   int8_t* restrict m_codes, uint8_t* restrict v_codes, float* scales, size_t count) {
  float m[LORDBA_BLOCK], root[LORDBA_BLOCK], m_peak = 0.0f, v_peak = 0.0f;
  for (size_t i = 0; i < count; ++i) {
    const float gradient = s.factor * g[i], before = scales[1] * v_codes[i];
    m[i] = o->beta1 * scales[0] * m_codes[i] + (1 - o->beta1) * gradient;
    root[i] = sqrtf(o->beta2 * before * before + (1 - o->beta2) * gradient * gradient);
    w[i] = s.shrink * w[i] - s.rate * m[i] / (root[i] + s.epsilon);
  }
  for (size_t i = 0; i < count; ++i) { /* not fmaxf: gcc 12 for arm64 breaks down over its reduction */
    const float size = fabsf(m[i]);
    m_peak = size > m_peak ? size : m_peak;
    v_peak = root[i] > v_peak ? root[i] : v_peak;
  }
  const float of_m = m_peak > 0 ? 127 / m_peak : 0, of_v = v_peak > 0 ? 255 / v_peak : 0;
  scales[0] = m_peak / 127;
  scales[1] = v_peak / 255;
  for (size_t i = 0; i < count; ++i) {
    const float code_m = floorf(m[i] * of_m + random_of((uint32_t)i, seed));
    const float code_v = floorf(root[i] * of_v + random_of((uint32_t)i, seed + 1));
    m_codes[i] = (int8_t)fminf(fmaxf(code_m, -127), 127);
    v_codes[i] = (uint8_t)(root[i] > 0 ? fminf(fmaxf(code_v, 1), 255) : 0);
  }
}

void lordba_optimizer_step(const lordba_optimizer* o, uint64_t step, float rate, float factor, float* w, const float* g,
                           size_t first, size_t count, size_t n, void* state) {
  if (o->kind == LORDBA_SGD) {
    sgd(o, rate, factor, w + first, g, (float*)state + first, count);
    return;
  }
  const adam_step s = adam_of(o, step, rate, factor);
  if (o->kind == LORDBA_ADAMW) {
    adamw(o, s, w + first, g, (float*)state + first, (float*)state + n + first, count);
    return;
  }
  float* scales = state; /* two of each block, then the codes of m, then those of v */
  int8_t* m_codes = (int8_t*)(scales + 2 * blocks_of(n));
  uint8_t* v_codes = (uint8_t*)m_codes + blocks_of(n) * LORDBA_BLOCK;
  for (size_t done = 0; done < count; done += LORDBA_BLOCK) {
    const size_t at = first + done, block = at / LORDBA_BLOCK;
    const uint32_t seed = (uint32_t)(2 * (step * blocks_of(n) + block)) * 0x85ebca77u;
    adamw8(o, s, seed, w + at, g + done, m_codes + at, v_codes + at, scales + 2 * block,
           count - done < LORDBA_BLOCK ? count - done : LORDBA_BLOCK);
  }
}
