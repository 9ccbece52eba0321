// What the ops' loops share: one clone per x86 vector width, and an exponential that vectorizes.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define LORDBA_WIDE __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define LORDBA_WIDE
#endif
// What a function marked so calls must be compiled again in every clone.
#define LORDBA_INLINE inline __attribute__((always_inline))

namespace lordba {

// e^x for x in [-87, 87] to 2e-7 relative: 2^k * e^f with |f| <= ln(2)/2 by a polynomial. The compiler vectorizes it.
inline float exponential(float x) {
  const float scaled = x * 1.44269504f;
  const float rounding = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low mantissa bits
  const float shifted = scaled + rounding;
  const float k = shifted - rounding;
  const float f = (x - k * 0.693145752f) - k * 1.42860677e-6f;
  float p = 1.3888889e-3f;
  p = p * f + 8.3333333e-3f;
  p = p * f + 4.1666667e-2f;
  p = p * f + 0.16666667f;
  p = p * f + 0.5f;
  p = p * f + 1.0f;
  p = p * f + 1.0f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof(power));
  return p * power;
}

}  // namespace lordba
