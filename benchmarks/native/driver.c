/*
 * Timing loops in C, for a call through ctypes costs more than the fastest kernel. A pool holds copies of one module;
 * "hot" calls the first one again and again, "cold" all of them in a shuffled order, which no prefetcher can follow.
 */
#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "dense_lora.h"
#include "lordba_kernels.h"
#include "team.h"

enum { MAX_THREADS = 2, PAGE = 4096 };

typedef enum { SIGNS = 0, DENSE_FP32 = 1, DENSE_FP16 = 2 } kind;

typedef struct {
  kind kind;
  size_t modules, tokens, d_in, d_out, r;
  char* memory;    /* all that the modules read */
  uint32_t* order; /* shuffled */
  size_t next;     /* where in `order` the next cold call starts */
  const float* x;  /* fp32, or of call.dtype */
  float* y;
  size_t stride; /* dense: bytes of a module; a, then b */
  float u[DENSE_LORA_MAX_RANK];
  const lordba_kernels* kernels;
  lordba_module* signs;
  lordba_call call;
  lordba_plan plan;
  char* workspace;
  size_t workspace_size;
} pool;

typedef struct {
  pool* pool;
  size_t calls;
  bool cold;
} run;

static size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

bool has_isa(const char* isa) { return lordba_select(isa) != NULL; }

void pool_free(pool* pool) {
  if (!pool) return;
  free(pool->memory), free(pool->order), free(pool->signs), free(pool->workspace), free(pool);
}

static pool* pool_new(kind kind, size_t modules, size_t bytes) {
  pool* new = calloc(1, sizeof *new);
  if (!new) return NULL;
  new->kind = kind;
  new->modules = modules;
  new->memory = aligned_alloc(PAGE, round_up(bytes, PAGE));
  new->order = malloc(modules * sizeof *new->order);
  if (!new->memory || !new->order) return pool_free(new), NULL;
  uint64_t random = 1;
  for (size_t i = 0; i < modules; ++i) {
    random = random * 6364136223846793005u + 1442695040888963407u;
    const size_t j = (random >> 33) % (i + 1);
    new->order[i] = new->order[j];
    new->order[j] = (uint32_t)i;
  }
  return new;
}

/* A pool of the blob's module 0, as stored or prepared; NULL if the CPU lacks `isa`, the blob is bad or memory short.
 */
pool* pool_of_signs(const char* isa, const void* blob, size_t size, bool prepared, size_t modules) {
  const lordba_kernels* kernels = lordba_select(isa);
  lordba_module module;
  if (!kernels || lordba_blob_module(blob, size, 0, &module) != LORDBA_OK) return NULL;
  const size_t room = prepared ? lordba_prepared_size(&module, false) : 0;
  const size_t start = round_up(size, LORDBA_ALIGNMENT), stride = start + round_up(room, LORDBA_ALIGNMENT);
  pool* new = pool_new(SIGNS, modules, modules * stride);
  if (!new) return NULL;
  new->kernels = kernels;
  new->signs = calloc(modules, sizeof *new->signs);
  for (size_t i = 0; new->signs && i < modules; ++i) {
    char* copy = memcpy(new->memory + i * stride, blob, size);
    lordba_status status = lordba_blob_module(copy, size, 0, &new->signs[i]);
    if (status == LORDBA_OK && prepared) {
      module = new->signs[i];
      status = lordba_prepare(kernels, &module, false, copy + start, room, &new->signs[i]);
    }
    if (status != LORDBA_OK) return pool_free(new), NULL;
  }
  if (!new->signs) return pool_free(new), NULL;
  return new;
}

/* A pool of the dense a_t [d_in][r] and b_t [r][d_out], fp32 or, if `half`, fp16; NULL if memory is short. */
pool* pool_of_dense(bool half, const void* a_t, const void* b_t, size_t d_in, size_t d_out, size_t r, size_t modules) {
  const size_t width = half ? 2 : 4, stride = (d_in + d_out) * r * width;
  pool* new = pool_new(half ? DENSE_FP16 : DENSE_FP32, modules, modules * stride);
  if (!new) return NULL;
  new->d_in = d_in, new->d_out = d_out, new->r = r, new->stride = stride;
  char *a = new->memory, *b = a + d_in * r * width;
  if (half) {
    dense_lora_pack_fp16(a_t, b_t, d_in, d_out, r, (uint16_t*)a, (uint16_t*)b);
  } else {
    dense_lora_pack_fp32(a_t, b_t, d_in, d_out, r, (float*)a, (float*)b);
  }
  for (size_t i = 1; i < modules; ++i) memcpy(new->memory + i * stride, new->memory, stride);
  return new;
}

/* Sets what the calls compute: y += adapter(x), x [tokens][d_in] and y [tokens][d_out] of `dtype` (dense: fp32). */
int pool_set(pool* pool, size_t tokens, int dtype, const void* x, void* y) {
  pool->tokens = tokens, pool->x = x, pool->y = y;
  if (pool->kind != SIGNS) return LORDBA_OK;
  const lordba_module* module = pool->signs;
  pool->call = (lordba_call){.modules = module,
                             .count = 1,
                             .dtype = (lordba_dtype)dtype,
                             .tokens = tokens,
                             .x = x,
                             .x_stride = module->d_in,
                             .base = y,
                             .base_stride = module->d_out,
                             .y = y,
                             .y_stride = module->d_out};
  size_t size = LORDBA_ALIGNMENT;
  for (size_t threads = 1; threads <= MAX_THREADS; ++threads) {
    const lordba_status status = lordba_plan_call(pool->kernels, &pool->call, threads, &pool->plan);
    if (status != LORDBA_OK) return (int)status;
    if (pool->plan.workspace > size) size = pool->plan.workspace;
  }
  free(pool->workspace);
  pool->workspace_size = round_up(size, PAGE);
  pool->workspace = aligned_alloc(PAGE, pool->workspace_size);
  return pool->workspace ? LORDBA_OK : LORDBA_SMALL_WORKSPACE;
}

/* Bytes of weights that one call reads: signs and scales, or both matrices. */
size_t pool_bytes(const pool* pool) {
  if (pool->kind != SIGNS) return pool->stride;
  const lordba_module* module = pool->signs;
  const size_t a = module->a_words ? lordba_prepared_size(module, false) : module->r * ((module->d_in + 7) / 8);
  const lordba_scale_code code = module->s_in.code;
  return a + module->d_out * ((module->r + 7) / 8) + lordba_scale_bytes(code, module->d_in) +
         lordba_scale_bytes(code, module->r) + lordba_scale_bytes(code, module->d_out);
}

/* How many of up to `threads` threads a call uses: signs as planned, dense where it pays (measured). */
size_t pool_threads(pool* pool, size_t threads) {
  if (threads == 1) return 1;
  if (pool->kind != SIGNS) return pool->tokens * (pool->d_in + pool->d_out) * pool->r < 65536 ? 1 : threads;
  lordba_plan_call(pool->kernels, &pool->call, threads, &pool->plan);
  return pool->plan.tiles[0] > 1 || (pool->plan.stages == 2 && pool->plan.tiles[1] > 1) ? threads : 1;
}

static void call_signs(pool* pool, size_t module, team* team, size_t thread) {
  if (team->threads == 1) {
    pool->call.modules = &pool->signs[module];
    lordba_apply(pool->kernels, &pool->call, pool->workspace, pool->workspace_size);
    return;
  }
  if (thread == 0) {
    pool->call.modules = &pool->signs[module];
    lordba_plan_call(pool->kernels, &pool->call, team->threads, &pool->plan);
  }
  team_meet(team);
  for (size_t stage = 0; stage < pool->plan.stages; ++stage) {
    const size_t tiles = pool->plan.tiles[stage], end = tiles * (thread + 1) / team->threads;
    for (size_t tile = tiles * thread / team->threads; tile < end; ++tile)
      lordba_run_tile(pool->kernels, &pool->call, &pool->plan, pool->workspace, stage, tile);
    team_meet(team);
  }
}

/* One token: ranks are shared out, then outputs. More: tokens are. */
static void call_dense(pool* pool, size_t module, team* team, size_t thread) {
  const size_t d_in = pool->d_in, d_out = pool->d_out, r = pool->r, threads = team->threads;
  const bool half = pool->kind == DENSE_FP16;
  const void *a = pool->memory + module * pool->stride, *b = (const char*)a + d_in * r * (half ? 2 : 4);
  team_meet(team);
  if (pool->tokens > 1 || threads == 1) {
    const size_t begin = pool->tokens * thread / threads, n = pool->tokens * (thread + 1) / threads - begin;
    const float* x = pool->x + begin * d_in;
    float* y = pool->y + begin * d_out;
    half ? dense_lora_fp16(x, n, d_in, d_out, r, a, b, y) : dense_lora_fp32(x, n, d_in, d_out, r, a, b, y);
  } else {
    const size_t rank = r / 4 * thread / threads * 4, last_rank = r / 4 * (thread + 1) / threads * 4;
    half ? dense_lora_ranks_fp16(pool->x, d_in, a, rank, last_rank, pool->u)
         : dense_lora_ranks_fp32(pool->x, d_in, a, rank, last_rank, pool->u);
    team_meet(team);
    const size_t output = d_out / 64 * thread / threads * 64, last_output = d_out / 64 * (thread + 1) / threads * 64;
    half ? dense_lora_outputs_fp16(pool->u, r, b, output, last_output, pool->y)
         : dense_lora_outputs_fp32(pool->u, r, b, output, last_output, pool->y);
  }
  team_meet(team);
}

static void work(void* context, team* team, size_t thread) {
  const run* run = context;
  pool* pool = run->pool;
  size_t next = pool->next;
  for (size_t i = 0; i < run->calls; ++i) {
    const size_t module = run->cold ? pool->order[next] : 0;
    if (run->cold && ++next == pool->modules) next = 0;
    (pool->kind == SIGNS ? call_signs : call_dense)(pool, module, team, thread);
  }
}

/* Seconds of `calls` calls on up to `threads` threads. */
double pool_run(pool* pool, size_t threads, size_t calls, bool cold) {
  if (threads < 1 || threads > MAX_THREADS) return NAN;
  run run = {pool, calls, cold};
  const double seconds = team_run(pool_threads(pool, threads), work, &run);
  if (cold) pool->next = (pool->next + calls) % pool->modules;
  return seconds;
}
