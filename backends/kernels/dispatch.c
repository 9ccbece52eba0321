/* Which kernels this CPU can run, best first. */
#include "tiles.h"

static bool same(const char* a, const char* b) {
  while (*a && *a == *b) ++a, ++b;
  return *a == *b;
}

static bool runs_here(const lordba_kernels* kernels) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (kernels == &lordba_kernels_avx512) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  }
  if (kernels == &lordba_kernels_avx2) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  }
#elif defined(__aarch64__)
  if (kernels == &lordba_kernels_neon) return true; /* a part of the architecture */
#endif
  return kernels == &lordba_kernels_scalar;
}

const lordba_kernels* lordba_select(const char* isa) {
  static const lordba_kernels* const known[] = {
#if defined(__x86_64__)
      &lordba_kernels_avx512,
      &lordba_kernels_avx2,
#elif defined(__aarch64__)
      &lordba_kernels_neon,
#endif
      &lordba_kernels_scalar,
  };
  for (size_t i = 0; i < sizeof known / sizeof *known; ++i) {
    if ((isa == NULL || same(isa, known[i]->name)) && runs_here(known[i])) return known[i];
  }
  return NULL;
}

const char* lordba_isa(const lordba_kernels* kernels) { return kernels->name; }
