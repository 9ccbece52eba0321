/*
 * The sign adapter on packed bits (LoRDBA, arXiv 2605.24058), for linear layers ("modules") that share an input:
 *
 *     y = base + s_out * (B (s_mid * (A (s_in * x))))     A in {-1,+1}^(r x d_in), B in {-1,+1}^(d_out x r)
 *
 * Signs are row-major, least significant bit first, bit 1 = -1; scales are read as stored (fp32, fp16, int8, log4);
 * x, base and y are fp32, fp16 or bf16, the arithmetic is fp32. Nothing here allocates or keeps state.
 *
 * One thread: lordba_plan, then lordba_apply. A thread pool: lordba_plan, then every tile of stage 0 by
 * lordba_run_tile in any order and on any threads, then, if the plan has two stages, every tile of stage 1.
 * However a call is cut, its result is bitwise the same.
 */
#ifndef LORDBA_KERNELS_H
#define LORDBA_KERNELS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
  LORDBA_OK = 0,
  LORDBA_NOT_A_BLOB,      /* wrong magic, wrong version, or shorter than a header */
  LORDBA_TRUNCATED,       /* fewer bytes than the header or a record says */
  LORDBA_NO_SUCH_MODULE,  /* the blob holds fewer modules */
  LORDBA_BAD_RECORD,      /* unknown scale code, or a record whose sizes or offsets cannot be */
  LORDBA_BAD_SIZE,        /* modules that do not share d_in, a stride shorter than its row, or a count of zero */
  LORDBA_BAD_POINTER,     /* x, y, modules or memory is missing, or memory is not aligned to LORDBA_ALIGNMENT */
  LORDBA_BAD_DTYPE,       /* not one of lordba_dtype */
  LORDBA_SMALL_WORKSPACE, /* memory of fewer bytes than asked for */
} lordba_status;

typedef enum { LORDBA_FP32 = 0, LORDBA_FP16 = 1, LORDBA_INT8 = 2, LORDBA_LOG4 = 3 } lordba_scale_code;

typedef enum { LORDBA_F32 = 0, LORDBA_F16 = 1, LORDBA_BF16 = 2 } lordba_dtype;

enum { LORDBA_ALIGNMENT = 64 }; /* of workspaces and of the memory of a prepared module, in bytes */

/* A scale vector as stored, of any alignment. `meaning`: log4: what the 16 codes mean, float[16]; int8: float[2] =
 * (lo, step), code c > 0 is lo + step * (c - 1); else unused. Code 0 is exactly 0. */
typedef struct {
  lordba_scale_code code;
  const uint8_t* meaning;
  const uint8_t* values;
} lordba_scales;

/* One module's adapter, pointing into bytes that the caller keeps. r = 0: no adapter, y = base. */
typedef struct {
  uint32_t r, d_in, d_out;
  const uint8_t* a_signs;  /* [r][ceil(d_in/8)] */
  const uint8_t* b_signs;  /* [d_out][ceil(r/8)] */
  const uint32_t* a_words; /* the A of lordba_prepare in the order of the instruction set, or NULL: pack as we go */
  lordba_scales s_in, s_mid, s_out;
} lordba_module;

/* The kernels of one instruction set. */
typedef struct lordba_kernels lordba_kernels;

/* One call. Outputs of the modules lie side by side in the rows of base and y. Strides count elements. */
typedef struct {
  const lordba_module* modules;
  size_t count;
  lordba_dtype dtype; /* of x, base and y */
  size_t tokens;
  const void* x; /* [tokens][d_in] */
  size_t x_stride;
  const void* base; /* [tokens][sum of d_out]; NULL: y = adapter; y itself: y += adapter; else not overlapping y */
  size_t base_stride;
  void* y; /* [tokens][sum of d_out] */
  size_t y_stride;
} lordba_call;

/* How a call is cut. */
typedef struct {
  size_t threads;                  /* that are worth waking: 1 or what was asked for */
  size_t stages;                   /* 0: nothing to do, 1, or 2 */
  size_t tiles[2];                 /* tiles of each stage */
  size_t workspace;                /* bytes that the tiles share, aligned to LORDBA_ALIGNMENT; need not be cleared */
  size_t token_tiles, tile_tokens; /* how the tiles are numbered: for lordba_run_tile */
  bool token_lanes;                /* which form of the stages; depends on the instruction set and on `tokens` alone */
} lordba_plan;

/* What went wrong, in words. */
const char* lordba_status_text(lordba_status status);

/* Finds module `index` of an adapter blob (docs/format.md); every offset and size is checked against `size`. */
lordba_status lordba_blob_module(const void* blob, size_t size, uint64_t index, lordba_module* module);

/* Bytes of n scales as stored, the meaning of their codes included. */
uint64_t lordba_scale_bytes(lordba_scale_code code, uint64_t n);

/* What the codes of an int8 or log4 vector mean, as lordba_scales wants it, from its stored range: lo and hi in fp16.
 * False unless 0 < lo <= hi and both are finite. */
bool lordba_scale_meaning(lordba_scale_code code, const uint8_t range[4], float meaning[16]);

/* The fastest kernels for this CPU, or those named ("scalar", "avx2", "avx512", "neon", "i8mm"); NULL if this CPU
 * lacks them. Callers pass the value of the environment variable LORDBA_ISA. */
const lordba_kernels* lordba_select(const char* isa);
const char* lordba_isa(const lordba_kernels* kernels);

/* True if the module adds nothing, whatever x holds: r = 0 or all of s_out zero. */
bool lordba_is_zero(const lordba_module* module);

/* Checks a call and cuts it for up to `threads` threads; one tile where waking threads would cost more than it saves.
 */
lordba_status lordba_plan_call(const lordba_kernels* kernels, const lordba_call* call, size_t threads,
                               lordba_plan* plan);

/* Tile `tile` of plan->tiles[stage]. `call` and `plan` are those of a lordba_plan_call that returned LORDBA_OK. */
void lordba_run_tile(const lordba_kernels* kernels, const lordba_call* call, const lordba_plan* plan, void* workspace,
                     size_t stage, size_t tile);

/* All of a call on this thread. */
lordba_status lordba_apply(const lordba_kernels* kernels, const lordba_call* call, void* workspace, size_t size);

/* Repacks a module once, so that calls with few tokens need not: A in the order of the instruction set, or, if
 * `transposed`, the module whose call gives dX = s_in * (A^T (s_mid * (B^T (s_out * dY)))). `memory` of
 * lordba_prepared_size bytes and the original's bytes must outlive `prepared`. */
size_t lordba_prepared_size(const lordba_module* module, bool transposed);
lordba_status lordba_prepare(const lordba_kernels* kernels, const lordba_module* module, bool transposed, void* memory,
                             size_t size, lordba_module* prepared);

#ifdef __cplusplus
}
#endif

#endif
