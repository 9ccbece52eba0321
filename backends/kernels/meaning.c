/* What the codes of a scale vector mean, from the range that is stored with it. */
#include "tiles.h"

enum { LEVELS = 15 }; /* codes 1 to 15 of log4 */

static double power_of_14(double x) {
  const double x2 = x * x, x4 = x2 * x2;
  return x4 * x4 * x4 * x2;
}

/* x^(1/14) for x >= 1 to the last bits, by Newton's method: there is no libc here. */
static double root_14(double x) {
  uint64_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  const uint64_t one = (uint64_t)1023 << 52;
  bits = one + (bits - one) / 14; /* the exponent with the mantissa behind it is about a logarithm: within 6 % */
  double root;
  __builtin_memcpy(&root, &bits, sizeof root);
  for (int step = 0; step < 5; ++step) root -= (root - x * root / power_of_14(root)) / 14;
  return root;
}

bool lordba_scale_meaning(lordba_scale_code code, const uint8_t range[4], float meaning[16]) {
  const double lo = lordba_load_scalar(range, LORDBA_F16, 0), hi = lordba_load_scalar(range, LORDBA_F16, 1);
  const double largest_half = 65504;
  if (!(0 < lo && lo <= hi && hi <= largest_half)) return false;
  if (code == LORDBA_INT8) {
    meaning[0] = (float)lo;
    meaning[1] = (float)((hi - lo) / 254);
    return true;
  }
  const double growth = root_14(hi / lo);
  double level = lo;
  meaning[0] = 0.0f;
  for (int i = 1; i < LEVELS; ++i, level *= growth) meaning[i] = (float)level;
  meaning[LEVELS] = (float)hi;
  return true;
}
