/*
 * Training an adapter on the device: load a training program (train.pte of a bundle), step, save, pack.
 *
 * A plain C interface for JNI, Swift, ctypes and the program lordba_trainer. One trainer is for one thread at a time;
 * it uses ExecuTorch's thread pool itself. Functions that return int return 0, or -1 and a reason by
 * lordba_trainer_error.
 */
#ifndef LORDBA_TRAINER_H
#define LORDBA_TRAINER_H

#include <stddef.h>
#include <stdint.h>

#include "optimizer.h"
#include "pack.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct lordba_trainer lordba_trainer;

/* One adapted layer, in the order of the bundle's `modules`: A [r][d_in] lies at `offset` of the latents, B [d_out][r]
 * follows. r = 0: a layer that is not adapted. */
typedef struct {
  uint32_t r, d_in, d_out;
  uint64_t offset;
} lordba_trainer_module;

/* Loads a program; latents begin as LoRA's do: A uniform in +-1/sqrt(d_in) by `seed`, B zero. NULL: see `error`. */
lordba_trainer* lordba_trainer_open(const char* program, const lordba_optimizer* optimizer, uint64_t seed, char* error,
                                    size_t error_size);
void lordba_trainer_close(lordba_trainer* trainer);
const char* lordba_trainer_error(const lordba_trainer* trainer);

uint32_t lordba_trainer_longest(const lordba_trainer* trainer); /* tokens of one sequence */
uint32_t lordba_trainer_modules(const lordba_trainer* trainer);
int lordba_trainer_module_at(lordba_trainer* trainer, uint32_t index, lordba_trainer_module* module);
uint64_t lordba_trainer_size(const lordba_trainer* trainer); /* of the latents, padding included */
float* lordba_trainer_latents(lordba_trainer* trainer);      /* [size], to read and to set */
uint64_t lordba_trainer_steps(const lordba_trainer* trainer);
uint64_t lordba_trainer_planned_bytes(const lordba_trainer* trainer); /* of activations, at the longest sequence */

/*
 * Adds one sequence to the step's gradients: the latents' gradients of weight * (sum of the cross-entropies of the
 * learned tokens). targets[i] is the token that follows tokens[i], or -100 where none is learned. A batch is several
 * calls with weight = 1 / its learned tokens. `loss` receives that weighted sum.
 */
int lordba_trainer_add(lordba_trainer* trainer, const int64_t* tokens, const int64_t* targets, size_t count,
                       float weight, double* loss);

/* The gradients that were added so far, gathered, [size]; after it and before `update` nothing may be added. */
int lordba_trainer_gradients(lordba_trainer* trainer, float* gradients);

/* One step of the optimizer with what was added; gradients whose norm exceeds `largest_norm` are scaled down to it. */
int lordba_trainer_update(lordba_trainer* trainer, float rate, float largest_norm);

/*
 * A checkpoint: latents, the optimizer's state, the number of steps, and a note of the caller's. The file appears
 * complete or not at all. `load` refuses one of another program, size or optimizer, or a damaged one; `note` then
 * receives up to note_size bytes and note_bytes says how many there are.
 */
int lordba_trainer_save(lordba_trainer* trainer, const char* file, const char* note, size_t note_bytes);
int lordba_trainer_load(lordba_trainer* trainer, const char* file, char* note, size_t note_size, size_t* note_bytes);

/* The adapter as a program's runtime reads it (docs/format.md, adapter blob), padded to the size of `template_file`'s
 * blob where one is given: a .ptd of the bundle, whose header the new file takes over. NULL: a blob as it is. */
int lordba_trainer_write_adapter(lordba_trainer* trainer, lordba_scale_code code, const char* template_file,
                                 const char* file);

/* Module `index` as an adapter folder stores it. */
int lordba_trainer_pack(lordba_trainer* trainer, uint32_t index, lordba_scale_code code, lordba_packed* packed);

#ifdef __cplusplus
}
#endif

#endif
