/* Calls: their checks, how they are cut into stages and tiles, and one tile of each kind. A tile needs up to 48 KiB of
 * stack and writes nothing but its part of y and of the workspace. */
#include "prefetch.h"
#include "stages.h"

enum {
  OUTPUTS_PIECE = 256, /* outputs of the smallest tile of stage 1, a multiple of what the stages ask for */
  TOKENS_PIECE = 16,   /* tokens of the smallest tile */
};
static const double WAKE_US = 20; /* a call of less work than this stays on one thread */

static size_t at_least(size_t value, size_t limit) { return value > limit ? value : limit; }

static const lordba_stages* stages_of(const lordba_plan* plan) {
  return plan->token_lanes ? &lordba_token_lanes : &lordba_rank_lanes;
}

static size_t chunks_of(const lordba_call* call) { return lordba_ceil_div(call->modules->d_in, LORDBA_CHUNK); }

/* Over the modules of a call: floats of the sums of one chunk, in all and of the largest, and pieces of outputs. */
typedef struct {
  size_t all, largest, pieces;
} totals;

static totals totals_of(const lordba_call* call, const lordba_plan* plan) {
  totals sizes = {0};
  for (size_t i = 0; i < call->count; ++i) {
    const size_t floats = stages_of(plan)->sum_floats(&call->modules[i], plan->tile_tokens);
    sizes.all += floats;
    sizes.largest = at_least(floats, sizes.largest);
    sizes.pieces += lordba_ceil_div(call->modules[i].d_out, OUTPUTS_PIECE);
  }
  return sizes;
}

bool lordba_is_zero(const lordba_module* module) {
  if (module->r == 0) return true;
  /* In every scale code, only bytes of zero mean a scale of zero. */
  const uint8_t* const values = module->s_out.values;
  const size_t bytes = lordba_value_bytes(module->s_out.code, module->d_out);
  size_t i = 0;
  for (; i + 4 <= bytes; i += 4) {
    if (lordba_load_u32(values + i) != 0) return false;
  }
  for (; i < bytes; ++i) {
    if (values[i] != 0) return false;
  }
  return true;
}

static lordba_status check(const lordba_call* call) {
  if (call->modules == NULL) return LORDBA_BAD_POINTER;
  if (call->count == 0) return LORDBA_BAD_SIZE;
  if ((unsigned)call->dtype > LORDBA_BF16) return LORDBA_BAD_DTYPE;
  size_t width = 0;
  for (size_t i = 0; i < call->count; ++i) {
    const lordba_module* module = &call->modules[i];
    if (module->d_in == 0 || module->d_out == 0 || module->d_in != call->modules->d_in) return LORDBA_BAD_SIZE;
    width += module->d_out;
  }
  if (call->tokens == 0) return LORDBA_OK;
  if (call->x == NULL || call->y == NULL) return LORDBA_BAD_POINTER;
  if (call->x_stride < call->modules->d_in || call->y_stride < width) return LORDBA_BAD_SIZE;
  if (call->base != NULL && call->base_stride < width) return LORDBA_BAD_SIZE;
  return LORDBA_OK;
}

/* Microseconds that the call takes on one thread. */
static double cost_of(const lordba_kernels* kernels, const lordba_call* call) {
  double signs = 0;
  for (size_t i = 0; i < call->count; ++i) {
    const lordba_module* module = &call->modules[i];
    if (!lordba_is_zero(module)) signs += (double)lordba_padded_rank(module) * ((double)module->d_in + module->d_out);
  }
  return signs * (double)call->tokens / (double)(call->tokens > 1 ? kernels->rate_prefill : kernels->rate_decode);
}

lordba_status lordba_plan_call(const lordba_kernels* kernels, const lordba_call* call, size_t threads,
                               lordba_plan* plan) {
  *plan = (lordba_plan){0};
  const lordba_status status = check(call);
  if (status != LORDBA_OK || call->tokens == 0) return status;
  for (size_t i = 0; i < call->count; ++i) {
    if (call->modules[i].r != 0) lordba_prefetch_heads(&call->modules[i]);
  }

  plan->token_lanes = call->tokens > kernels->rank_lanes_up_to;
  if (threads < 1 || cost_of(kernels, call) < WAKE_US) threads = 1;
  plan->threads = threads;
  const bool enough = threads <= 1 || lordba_ceil_div(call->tokens, LORDBA_TOKENS) >= 2 * threads;
  plan->tile_tokens = lordba_at_most(call->tokens, enough ? LORDBA_TOKENS : TOKENS_PIECE);
  plan->token_tiles = lordba_ceil_div(call->tokens, plan->tile_tokens);
  plan->stages = plan->token_tiles < threads ? 2 : 1;

  const totals sizes = totals_of(call, plan);
  if (plan->stages == 1) {
    plan->tiles[0] = plan->token_tiles;
    plan->workspace = plan->token_tiles * 2 * sizes.largest * sizeof(float);
    return LORDBA_OK;
  }
  const size_t share = lordba_ceil_div(2 * threads, plan->token_tiles);
  plan->tiles[0] = plan->token_tiles * lordba_at_most(chunks_of(call), share);
  plan->tiles[1] = plan->token_tiles * lordba_at_most(sizes.pieces, share);
  plan->workspace = (plan->token_tiles * chunks_of(call) * sizes.all + plan->tiles[1] * sizes.largest) * sizeof(float);
  return LORDBA_OK;
}

/* The call for the tokens of one tile only. */
static lordba_call tile_of(const lordba_call* call, const lordba_plan* plan, size_t token_tile) {
  const size_t first = token_tile * plan->tile_tokens;
  lordba_call tile = *call;
  tile.tokens = lordba_at_most(call->tokens - first, plan->tile_tokens);
  tile.x = lordba_element(call->x, first * call->x_stride, call->dtype);
  tile.base = call->base ? lordba_element(call->base, first * call->base_stride, call->dtype) : NULL;
  tile.y = lordba_element(call->y, first * call->y_stride, call->dtype);
  return tile;
}

/* y = base, or zero, where a module adds nothing. */
static void copy_base(const lordba_call* tile, size_t column, size_t begin, size_t end) {
  if (tile->base == tile->y && tile->base_stride == tile->y_stride) return;
  const size_t halves = tile->dtype == LORDBA_F32 ? 2 : 1;
  for (size_t t = 0; t < tile->tokens; ++t) {
    uint16_t* y = lordba_element(tile->y, t * tile->y_stride + column, tile->dtype);
    const uint16_t* base = tile->base ? lordba_element(tile->base, t * tile->base_stride + column, tile->dtype) : NULL;
    for (size_t i = begin * halves; i < end * halves; ++i) y[i] = base ? base[i] : 0;
  }
}

static void add(const float* from, size_t n, float* to) {
  for (size_t i = 0; i < n; ++i) to[i] += from[i];
}

/* Both stages for the tokens of one tile. */
static void run_tokens(const lordba_kernels* kernels, const lordba_call* tile, const lordba_plan* plan, float* sums) {
  const lordba_stages* stages = stages_of(plan);
  size_t column = 0;
  for (size_t i = 0; i < tile->count; column += tile->modules[i].d_out, ++i) {
    const lordba_module* module = &tile->modules[i];
    if (lordba_is_zero(module)) {
      copy_base(tile, column, 0, module->d_out);
      continue;
    }
    const size_t floats = stages->sum_floats(module, plan->tile_tokens);
    stages->sum_chunk(kernels, tile, module, 0, sums);
    for (size_t chunk = 1; chunk < chunks_of(tile); ++chunk) {
      stages->sum_chunk(kernels, tile, module, chunk, sums + floats);
      add(sums + floats, floats, sums);
    }
    stages->scale_ranks(kernels, module, tile->tokens, sums, sums);
    stages->sum_outputs(kernels, tile, module, column, 0, module->d_out, sums);
  }
}

/* Stage 0 of two: a range of chunks. Each module's sums lie in `partials` chunk after chunk. */
static void run_chunks(const lordba_kernels* kernels, const lordba_call* tile, const lordba_plan* plan, size_t begin,
                       size_t end, float* partials) {
  const lordba_stages* stages = stages_of(plan);
  for (size_t i = 0; i < tile->count; ++i) {
    const lordba_module* module = &tile->modules[i];
    const size_t floats = stages->sum_floats(module, plan->tile_tokens);
    const size_t last = lordba_is_zero(module) ? begin : end;
    for (size_t chunk = begin; chunk < last; ++chunk) {
      stages->sum_chunk(kernels, tile, module, chunk, partials + chunk * floats);
    }
    partials += chunks_of(tile) * floats;
  }
}

/* Stage 1 of two: a range of the pieces of OUTPUTS_PIECE outputs, counted through all modules. */
static void run_outputs(const lordba_kernels* kernels, const lordba_call* tile, const lordba_plan* plan, size_t begin,
                        size_t end, const float* partials, float* h) {
  const lordba_stages* stages = stages_of(plan);
  size_t column = 0, piece = 0; /* of the module's first output */
  for (size_t i = 0; i < tile->count; ++i) {
    const lordba_module* module = &tile->modules[i];
    const size_t floats = stages->sum_floats(module, plan->tile_tokens);
    const size_t pieces = lordba_ceil_div(module->d_out, OUTPUTS_PIECE);
    const size_t from = at_least(begin, piece) - piece,
                 to = at_least(lordba_at_most(end, piece + pieces), piece) - piece;
    if (from < to) {
      const size_t first = from * OUTPUTS_PIECE, last = lordba_at_most(to * OUTPUTS_PIECE, module->d_out);
      if (lordba_is_zero(module)) {
        copy_base(tile, column, first, last);
      } else {
        for (size_t k = 0; k < floats; ++k) h[k] = partials[k];
        for (size_t chunk = 1; chunk < chunks_of(tile); ++chunk) add(partials + chunk * floats, floats, h);
        stages->scale_ranks(kernels, module, tile->tokens, h, h);
        stages->sum_outputs(kernels, tile, module, column, first, last, h);
      }
    }
    column += module->d_out;
    piece += pieces;
    partials += chunks_of(tile) * floats;
  }
}

void lordba_run_tile(const lordba_kernels* kernels, const lordba_call* call, const lordba_plan* plan, void* workspace,
                     size_t stage, size_t tile) {
  float* floats = workspace;
  if (plan->stages == 1) {
    const lordba_call part = tile_of(call, plan, tile);
    run_tokens(kernels, &part, plan, floats + plan->workspace / sizeof(float) / plan->token_tiles * tile);
    return;
  }
  const totals sizes = totals_of(call, plan);
  const size_t chunks = chunks_of(call), share = plan->tiles[stage] / plan->token_tiles;
  const lordba_call part = tile_of(call, plan, tile / share);
  float* partials = floats + tile / share * chunks * sizes.all;
  const size_t index = tile % share;
  if (stage == 0) {
    run_chunks(kernels, &part, plan, index * chunks / share, (index + 1) * chunks / share, partials);
  } else {
    float* h = floats + plan->token_tiles * chunks * sizes.all + tile * sizes.largest;
    run_outputs(kernels, &part, plan, index * sizes.pieces / share, (index + 1) * sizes.pieces / share, partials, h);
  }
}

lordba_status lordba_apply(const lordba_kernels* kernels, const lordba_call* call, void* workspace, size_t size) {
  lordba_plan plan;
  const lordba_status status = lordba_plan_call(kernels, call, 1, &plan);
  if (status != LORDBA_OK) return status;
  if (size < plan.workspace) return LORDBA_SMALL_WORKSPACE;
  if (plan.workspace != 0 && (workspace == NULL || (uintptr_t)workspace % LORDBA_ALIGNMENT != 0)) {
    return LORDBA_BAD_POINTER;
  }
  for (size_t tile = 0; tile < plan.tiles[0]; ++tile) lordba_run_tile(kernels, call, &plan, workspace, 0, tile);
  return LORDBA_OK;
}
