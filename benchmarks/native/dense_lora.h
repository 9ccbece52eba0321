/*
 * A dense LoRA, y += (x A^T) B^T, as fast as we can write it: what the sign kernels are measured against.
 *
 * fp32 arithmetic, y and x [tokens][d], weights fp32 or fp16. The weights of all functions are in the order of
 * dense_lora_pack_*, which is not timed. d_in and d_out are multiples of 64, r is a multiple of 4 and at most
 * DENSE_LORA_MAX_RANK. One source per architecture; the compiler's flags choose the width of its vectors.
 */
#ifndef LORDBA_DENSE_LORA_H
#define LORDBA_DENSE_LORA_H

#include <stddef.h>
#include <stdint.h>

enum { DENSE_LORA_MAX_RANK = 256 };

/* a_t [d_in][r] and b_t [r][d_out] -> a and b, as many elements, in the order that the kernels read. */
void dense_lora_pack_fp32(const float* a_t, const float* b_t, size_t d_in, size_t d_out, size_t r, float* a, float* b);
void dense_lora_pack_fp16(const uint16_t* a_t, const uint16_t* b_t, size_t d_in, size_t d_out, size_t r, uint16_t* a,
                          uint16_t* b);

void dense_lora_fp32(const float* x, size_t tokens, size_t d_in, size_t d_out, size_t r, const float* a, const float* b,
                     float* y);
void dense_lora_fp16(const float* x, size_t tokens, size_t d_in, size_t d_out, size_t r, const uint16_t* a,
                     const uint16_t* b, float* y);

/* The two stages by themselves, for one token and two threads: u[j] = A[j] x for ranks [begin, end), multiples of 4;
 * then y[o] += B[o] u for outputs [begin, end), multiples of 64. */
void dense_lora_ranks_fp32(const float* x, size_t d_in, const float* a, size_t begin, size_t end, float* u);
void dense_lora_ranks_fp16(const float* x, size_t d_in, const uint16_t* a, size_t begin, size_t end, float* u);
void dense_lora_outputs_fp32(const float* u, size_t r, const float* b, size_t begin, size_t end, float* y);
void dense_lora_outputs_fp16(const float* u, size_t r, const uint16_t* b, size_t begin, size_t end, float* y);

#endif
