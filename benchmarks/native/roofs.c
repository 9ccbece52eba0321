/* What the machine can do at best: multiply-adds, bytes read, cycles; measured beside the kernels. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "team.h"

#if defined(__AVX512F__)
enum { BYTES = 64, SUMS = 24 };
#elif defined(__AVX__)
enum { BYTES = 32, SUMS = 12 };
#else
enum { BYTES = 16, SUMS = 24 };
#endif
enum { LANES = BYTES / sizeof(float), AHEAD = 4096 };

typedef float vector __attribute__((vector_size(BYTES)));

typedef struct {
  const char* memory;
  size_t bytes; /* of each thread */
  size_t repeats;
} job;

static vector all(float value) {
  vector v;
  for (int i = 0; i < LANES; ++i) v[i] = value;
  return v;
}

/* Keeps a result that nobody reads. */
static void keep(vector v) {
  volatile float sink = v[0];
  (void)sink;
}

static void multiply_add(void* context, team* team, size_t thread) {
  (void)team, (void)thread;
  volatile float factor = 0.999f;
  const vector a = all(factor), b = all(1.0f - factor);
  vector sums[SUMS];
  for (int i = 0; i < SUMS; ++i) sums[i] = all((float)i);
  for (size_t k = 0; k < ((job*)context)->repeats; ++k)
#pragma GCC unroll 24
    for (int i = 0; i < SUMS; ++i) sums[i] = sums[i] * a + b;
  vector total = all(0.0f);
  for (int i = 0; i < SUMS; ++i) total += sums[i];
  keep(total);
}

/* With prefetches for memory, without for caches, where they only take the place of loads. */
static inline __attribute__((always_inline)) void read_all(const job* job, size_t thread, int prefetch) {
  const char *begin = job->memory + thread * job->bytes, *end = begin + job->bytes;
  vector sums[8];
  for (int i = 0; i < 8; ++i) sums[i] = all(0.0f);
  for (size_t k = 0; k < job->repeats; ++k)
    for (const char* p = begin; p < end; p += sizeof sums)
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        if (prefetch) __builtin_prefetch(p + i * BYTES + AHEAD);
        sums[i] += *(const vector*)(p + i * BYTES);
      }
  vector total = all(0.0f);
  for (int i = 0; i < 8; ++i) total += sums[i];
  keep(total);
}

static void read_memory(void* context, team* team, size_t thread) {
  (void)team;
  read_all(context, thread, 1);
}

static void read_cache(void* context, team* team, size_t thread) {
  (void)team;
  read_all(context, thread, 0);
}

static void multiply_chain(void* context, team* team, size_t thread) {
  (void)team, (void)thread;
  uint64_t value = 0x9e3779b97f4a7c15u;
  for (size_t k = 0; k < ((job*)context)->repeats; ++k) {
    value *= 0x9e3779b97f4a7c15u;
    __asm__ volatile("" : "+r"(value)); /* one after the other, not as a power */
  }
}

/* fp32 multiply-adds per second of `threads` threads together. */
double roof_multiply_adds(size_t threads) {
  job job = {.repeats = 200000};
  return (double)(threads * job.repeats * SUMS * LANES) / team_run(threads, multiply_add, &job);
}

/* Bytes per second that `threads` threads together read from `bytes` of memory each; NaN without that memory. */
double roof_read(size_t threads, size_t bytes) {
  bytes = (bytes + 4095) / 4096 * 4096;
  char* memory = aligned_alloc(4096, threads * bytes);
  if (!memory) return NAN;
  memset(memory, 0, threads * bytes); /* 0.0f, and every page is there */
  job job = {memory, bytes, 1};
  team_run(threads, read_memory, &job);
  job.repeats = 1 + ((size_t)1 << 27) / bytes;
  const double seconds = fmin(team_run(threads, read_memory, &job), team_run(threads, read_cache, &job));
  free(memory);
  return (double)(threads * bytes * job.repeats) / seconds;
}

/* Cycles per second under this load, taking a 64-bit multiplication for 3 cycles. */
double roof_cycles(void) {
  job job = {.repeats = 1000000};
  return 3.0 * (double)job.repeats / team_run(1, multiply_chain, &job);
}
