/* Which kernels this CPU can run, best first. */
#include "tiles.h"

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#if defined(__aarch64__)
/* FEAT_I8MM, as the system tells it. */
static bool has_i8mm(void) {
#if defined(__linux__)
  return getauxval(AT_HWCAP2) >> 13 & 1; /* HWCAP2_I8MM, which old headers lack */
#elif defined(__APPLE__)
  int has = 0;
  size_t size = sizeof has;
  return sysctlbyname("hw.optional.arm.FEAT_I8MM", &has, &size, NULL, 0) == 0 && has != 0;
#else
  return false;
#endif
}
#endif

static bool same(const char* a, const char* b) {
  while (*a && *a == *b) ++a, ++b;
  return *a == *b;
}

static bool runs_here(const lordba_kernels* kernels) {
#if defined(LORDBA_X86)
  __builtin_cpu_init();
  if (kernels == &lordba_kernels_avx512) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  }
  if (kernels == &lordba_kernels_avx2) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  }
#elif defined(__aarch64__)
  if (kernels == &lordba_kernels_i8mm) return has_i8mm();
  if (kernels == &lordba_kernels_neon) return true; /* a part of the architecture */
#endif
  return kernels == &lordba_kernels_scalar;
}

const lordba_kernels* lordba_select(const char* isa) {
  static const lordba_kernels* const known[] = {
#if defined(LORDBA_X86)
      &lordba_kernels_avx512,
      &lordba_kernels_avx2,
#elif defined(__aarch64__)
      &lordba_kernels_i8mm,
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
