/*
 * The sign adapter on packed bits (LoRDBA, arXiv 2605.24058), for one linear layer ("module"):
 *
 *     y = base + s_out * (B (s_mid * (A (s_in * x))))     A in {-1,+1}^(r x d_in), B in {-1,+1}^(d_out x r)
 *
 * Signs are row-major, least significant bit first, bit 1 = -1; scales are read as stored (fp32, fp16, int8, log4).
 * Nothing here allocates or keeps state. The two stages are separate calls over ranges, so that any thread pool can
 * split them; every split gives bitwise the same result. Order: lordba_sum_inputs, lordba_scale_ranks,
 * lordba_sum_ranks.
 */
#ifndef LORDBA_KERNELS_H
#define LORDBA_KERNELS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Stage 1 sums the inputs in chunks of this many; a partial sum belongs to one chunk. */
enum { LORDBA_CHUNK = 512 };
/* Ranks are padded to a multiple of this. */
enum { LORDBA_LANES = 16 };

typedef enum {
  LORDBA_OK = 0,
  LORDBA_NOT_A_BLOB,     /* wrong magic, wrong version, or shorter than a header */
  LORDBA_TRUNCATED,      /* fewer bytes than the header or a record says */
  LORDBA_NO_SUCH_MODULE, /* the blob holds fewer modules */
  LORDBA_BAD_RECORD,     /* unknown scale code, or a record whose sizes or offsets cannot be */
} lordba_status;

typedef enum { LORDBA_FP32 = 0, LORDBA_FP16 = 1, LORDBA_INT8 = 2, LORDBA_LOG4 = 3 } lordba_scale_code;

/* A scale vector as stored, of any alignment. `meaning`: log4: what the 16 codes mean, float[16]; int8: float[2] =
 * (lo, step), code c > 0 is lo + step * (c - 1); else unused. Code 0 is exactly 0. */
typedef struct {
  lordba_scale_code code;
  const uint8_t* meaning;
  const uint8_t* values;
} lordba_scales;

/* One module's adapter, pointing into bytes that the caller keeps. r = 0: no adapter. */
typedef struct {
  uint32_t r, d_in, d_out;
  const uint8_t* a_signs; /* [r][ceil(d_in/8)] */
  const uint8_t* b_signs; /* [d_out][ceil(r/8)] */
  lordba_scales s_in, s_mid, s_out;
} lordba_module;

/* The kernels of one instruction set. */
typedef struct lordba_kernels lordba_kernels;

/* What went wrong, in words. */
const char* lordba_status_text(lordba_status status);

/* Finds module `index` of an adapter blob (docs/format.md); every offset and size is checked against `size`. */
lordba_status lordba_blob_module(const void* blob, size_t size, uint64_t index, lordba_module* module);

/* Bytes of n scales as stored, the meaning of their codes included. */
uint64_t lordba_scale_bytes(lordba_scale_code code, uint64_t n);

/* The fastest kernels for this CPU, or those named ("scalar", "avx2", "avx512"); NULL if this CPU lacks them. */
const lordba_kernels* lordba_select(const char* isa);
const char* lordba_isa(const lordba_kernels* kernels);

/* What both stages take on one thread, in microseconds, to judge whether threads are worth waking. */
double lordba_cost(const lordba_kernels* kernels, const lordba_module* module, size_t tokens);

/* r rounded up to LORDBA_LANES: the row length of `sums`. */
size_t lordba_padded_rank(const lordba_module* module);
/* Number of chunks of d_in. */
size_t lordba_chunks(const lordba_module* module);

/* True if the module adds nothing, whatever x holds: r = 0 or all of s_out zero. */
bool lordba_is_zero(const lordba_kernels* kernels, const lordba_module* module);

/* Stage 1: sums[t][j] += sum over the inputs i of chunks [begin, end) of A[j][i] * s_in[i] * x[t][i].
 * Strides are in floats; sums rows are lordba_padded_rank long, and their padding is overwritten. */
void lordba_sum_inputs(const lordba_kernels* kernels, const lordba_module* module, const float* x, size_t x_stride,
                       size_t tokens, size_t begin, size_t end, float* sums);

/* Between the stages: h[t][j] = s_mid[j] * (partials[0][t][j] + partials[1][t][j] + ...), in place in partials[0],
 * padding set to zero. `partials` counts the [tokens][padded rank] blocks that lie one after the other. */
void lordba_scale_ranks(const lordba_kernels* kernels, const lordba_module* module, size_t tokens, size_t partials,
                        float* sums);

/* Stage 2: y[t][o] = base[t][o] + s_out[o] * sum over j of B[o][j] * h[t][j] for o in [begin, end); base may be NULL.
 * `begin` is a multiple of LORDBA_LANES. base and y point at output 0 and do not overlap. */
void lordba_sum_ranks(const lordba_kernels* kernels, const lordba_module* module, const float* h, size_t tokens,
                      size_t begin, size_t end, const float* base, size_t base_stride, float* y, size_t y_stride);

#ifdef __cplusplus
}
#endif

#endif
