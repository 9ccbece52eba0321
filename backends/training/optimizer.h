/* Optimizers over flat float arrays: SGD with momentum, AdamW (arXiv 1711.05101), AdamW with one byte per moment. */
#ifndef LORDBA_OPTIMIZER_H
#define LORDBA_OPTIMIZER_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum { LORDBA_SGD = 0, LORDBA_ADAMW = 1, LORDBA_ADAMW8 = 2 } lordba_optimizer_kind;

enum { LORDBA_BLOCK = 256 }; /* elements that share the scales of 8-bit moments */

typedef struct {
  lordba_optimizer_kind kind;
  float beta1, beta2; /* SGD: beta1 is the momentum */
  float epsilon;
  float decay; /* weight decay, apart from the gradient; per step and unit of the rate */
} lordba_optimizer;

/* Bytes of the state of n weights; all zero at the start. */
size_t lordba_optimizer_bytes(lordba_optimizer_kind kind, size_t n);

/*
 * One step of weights [first, first + count) of n: w moves against factor * g. `step` counts from 1 and decides
 * the random numbers of 8-bit moments, which are rounded stochastically. first is a multiple of LORDBA_BLOCK.
 */
void lordba_optimizer_step(const lordba_optimizer* optimizer, uint64_t step, float rate, float factor, float* w,
                           const float* g, size_t first, size_t count, size_t n, void* state);

#ifdef __cplusplus
}
#endif

#endif
