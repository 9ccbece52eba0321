/*
 * Latents to signs and scales without PyTorch, in the direct form of lordba/training/latents.py (`to_stored`): byte for
 * byte.
 *
 * A latent M [n][k] stands for sign(M) * p q^T with p the row means of |M| and q its column means over the mean
 * (lordba/training/ste.py). Sums run in double precision in the order of their indices, so that every language can
 * repeat them.
 */
#ifndef LORDBA_PACK_H
#define LORDBA_PACK_H

#include <stddef.h>
#include <stdint.h>

#include "lordba_kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
  LORDBA_PACK_OK = 0,
  LORDBA_PACK_NOT_FINITE, /* a latent is NaN or infinite: the training diverged */
  LORDBA_PACK_TOO_LARGE,  /* a scale exceeds fp16, which fp16, int8 and log4 need */
} lordba_pack_status;

/* p [n] and q [k] of m [n][k]; a latent of zeros has q = 0. `sums` is room for k doubles. */
void lordba_envelope(const float* m, size_t n, size_t k, float* p, float* q, double* sums);

/* Signs of m [n][k] as bits, [n][ceil(k/8)]: least significant bit first, 1 is negative. */
void lordba_pack_signs(const float* m, size_t n, size_t k, uint8_t* bits);

/* Scales [n] in a code: values as an adapter folder stores them; for int8 and log4 also range, fp16 (lo, hi). */
lordba_pack_status lordba_encode_scales(const float* scales, size_t n, lordba_scale_code code, uint8_t* values,
                                        uint16_t range[2]);

/* What the codes of a range mean, [16] for log4, [256] for int8. */
void lordba_scale_levels(lordba_scale_code code, const uint16_t range[2], float* levels);

/* Bytes of n scales as an adapter folder stores them, without their range. */
size_t lordba_stored_bytes(lordba_scale_code code, size_t n);

/* One module's adapter as an adapter folder stores it; the caller owns the memory. */
typedef struct {
  uint8_t *a_signs, *b_signs; /* [r][ceil(d_in/8)], [d_out][ceil(r/8)] */
  uint8_t* scales[3];         /* s_in, s_mid, s_out: lordba_stored_bytes of d_in, r and d_out */
  uint16_t ranges[3][2];
} lordba_packed;

/* Latents A [r][d_in] and B [d_out][r], y += B A x, as signs and scales. */
lordba_pack_status lordba_pack_module(const float* a, const float* b, size_t r, size_t d_in, size_t d_out,
                                      lordba_scale_code code, lordba_packed* packed);

#ifdef __cplusplus
}
#endif

#endif
