/*
 * ai.lordba::SignAdapter for ONNX Runtime: y = base + s_out * (B (s_mid * (A (s_in * x)))), over backends/kernels.
 *
 * Inputs: x [..., d_in], base [..., d_out], signs [n]: A [r, ceil(d_in/8)] and B [d_out, ceil(r/8)]; scales [n]: s_in,
 * s_mid and s_out as stored, and before codes (int8, log4) their ranges, lo and hi of each vector in fp16. The rank
 * follows from the length of the scales; log4 tells even ranks only. Sizes are checked at every call, for an adapter is
 * another input each time. A call keeps no state, so that one session may run on several threads.
 */
#include "sign_adapter.h"

#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

enum { X, BASE, SIGNS, SCALES, INPUTS };
enum { MOST_DIMENSIONS = 8, STACK_BYTES = 16384, LOG4_CODES = 16, RANGE_BYTES = 12, MOST_THREADS = 64 };

typedef struct {
  const OrtApi* api;
  lordba_dtype dtype;
  lordba_scale_code code;
  bool tells_sizes;
} Kernel;

typedef struct {
  int64_t dims[MOST_DIMENSIONS];
  size_t rank;
} Shape;

/* An input: where it lies, and how many elements it has. */
typedef struct {
  void* data;
  size_t elements;
} Tensor;

static atomic_uint_fast64_t calls;

uint64_t lordba_onnxruntime_calls(void) { return atomic_load(&calls); }

const lordba_kernels* lordba_onnxruntime_kernels(void) {
  static _Atomic(const lordba_kernels*) selected;
  const lordba_kernels* kernels = atomic_load(&selected);
  if (kernels == NULL) {
    kernels = lordba_select(getenv("LORDBA_ISA"));
    atomic_store(&selected, kernels);
  }
  return kernels;
}

static OrtStatus* failure(const OrtApi* api, OrtErrorCode code, const char* message) {
  return ORT_CALLABLE(api, OrtCreateStatus, ORT_CREATE_STATUS)(code, message);
}

static OrtStatus* invalid(const OrtApi* api, const char* message) {
  return failure(api, ORT_INVALID_ARGUMENT, message);
}

/* A value's shape, or only the number of its elements where `shape` is NULL. */
static OrtStatus* look_at_shape(const OrtApi* api, const OrtValue* value, Shape* shape, size_t* elements) {
  OrtShape* info = NULL;
  OrtStatus* status = ORT_CALLABLE(api, OrtTensorShape, ORT_TENSOR_SHAPE)(value, &info);
  if (status) return status;
  status = ORT_CALLABLE(api, OrtElementCount, ORT_ELEMENT_COUNT)(info, elements);
  if (!status && shape) status = ORT_CALLABLE(api, OrtDimensionsCount, ORT_DIMENSIONS_COUNT)(info, &shape->rank);
  if (!status && shape && shape->rank > MOST_DIMENSIONS) status = invalid(api, "SignAdapter: more than 8 dimensions");
  if (!status && shape) status = ORT_CALLABLE(api, OrtDimensions, ORT_DIMENSIONS)(info, shape->dims, shape->rank);
  ORT_CALLABLE(api, OrtReleaseShape, ORT_RELEASE_SHAPE)(info);
  return status;
}

/* Looks at input `index`; the shape only where it is wanted, for ONNX Runtime allocates it anew each time. */
static OrtStatus* look_at(const Kernel* kernel, const OrtKernelContext* context, size_t index, size_t element_bytes,
                          Tensor* tensor, Shape* shape) {
  const OrtApi* api = kernel->api;
  const OrtValue* value = NULL;
  OrtStatus* status = ORT_CALLABLE(api, OrtInput, ORT_INPUT)(context, index, &value);
  if (!status && (shape || !kernel->tells_sizes)) {
    status = look_at_shape(api, value, shape, &tensor->elements);
  } else if (!status) {
    status = ORT_CALLABLE(api, OrtTensorBytes, ORT_TENSOR_BYTES)(value, &tensor->elements);
    tensor->elements /= element_bytes;
  }
  if (status) return status;
  return ORT_CALLABLE(api, OrtTensorData, ORT_TENSOR_DATA)((OrtValue*)value, &tensor->data);
}

static bool is_coded(lordba_scale_code code) { return code == LORDBA_INT8 || code == LORDBA_LOG4; }

/* Bytes of n scales as stored. */
static size_t stored_bytes(lordba_scale_code code, size_t n) {
  if (code == LORDBA_LOG4) return (n + 1) / 2;
  return n * (code == LORDBA_FP32 ? 4 : code == LORDBA_FP16 ? 2 : 1);
}

static size_t element_bytes(lordba_scale_code code) { return code == LORDBA_FP32 ? 4 : code == LORDBA_FP16 ? 2 : 1; }

/* The rank that so many elements of scales tell, 0 if none. */
static size_t rank_of(lordba_scale_code code, size_t elements, size_t d_in, size_t d_out) {
  const size_t others = (is_coded(code) ? RANGE_BYTES : 0) + stored_bytes(code, d_in) + stored_bytes(code, d_out);
  const size_t bytes = elements * element_bytes(code);
  if (bytes <= others) return 0;
  return code == LORDBA_LOG4 ? 2 * (bytes - others) : (bytes - others) / element_bytes(code);
}

/* Why the inputs do not belong together, or NULL; fills in the module's sizes. */
static const char* mismatch(const Tensor* in, lordba_scale_code code, size_t tokens, lordba_module* module) {
  const size_t d_in = in[X].elements / tokens, d_out = in[BASE].elements / tokens;
  if (d_in * tokens != in[X].elements) return "SignAdapter: x and base must agree in all dimensions but the last";
  if (d_in > UINT32_MAX || d_out > UINT32_MAX) return "SignAdapter: more than 2^32 channels";
  const size_t r = rank_of(code, in[SCALES].elements, d_in, d_out);
  if (r < 1 || r > UINT32_MAX) {
    return "SignAdapter: scales must hold d_in, r and d_out scales in the node's scale code, and the ranges of codes";
  }
  if (in[SIGNS].elements != r * ((d_in + 7) / 8) + d_out * ((r + 7) / 8)) {
    return "SignAdapter: signs must hold r rows of ceil(d_in/8) bytes and d_out rows of ceil(r/8)";
  }
  *module = (lordba_module){.r = (uint32_t)r, .d_in = (uint32_t)d_in, .d_out = (uint32_t)d_out};
  return NULL;
}

typedef struct {
  const lordba_kernels* kernels;
  const lordba_call* call;
  const lordba_plan* plan;
  void* workspace;
  size_t stage;
} Work;

static void run_tile(void* work, size_t tile) {
  const Work* w = work;
  lordba_run_tile(w->kernels, w->call, w->plan, w->workspace, w->stage, tile);
}

/* All tiles of a planned call, on ONNX Runtime's threads where there is more than one. */
static OrtStatus* run_tiles(const OrtApi* api, const OrtKernelContext* context, Work* work) {
  for (work->stage = 0; work->stage < work->plan->stages; ++work->stage) {
    const size_t tiles = work->plan->tiles[work->stage];
    if (tiles == 1) {
      run_tile(work, 0);
      continue;
    }
    OrtStatus* status = ORT_CALLABLE(api, OrtParallelFor, ORT_PARALLEL_FOR)(context, run_tile, tiles, 0, work);
    if (status) return status;
  }
  return NULL;
}

static OrtStatus* run(const OrtApi* api, const OrtKernelContext* context, const lordba_call* call) {
  Work work = {.kernels = lordba_onnxruntime_kernels(), .call = call};
  lordba_plan plan;
  const lordba_status fault = lordba_plan_call(work.kernels, call, MOST_THREADS, &plan);
  if (fault != LORDBA_OK) return invalid(api, lordba_status_text(fault));
  work.plan = &plan;
  _Alignas(LORDBA_ALIGNMENT) unsigned char here[STACK_BYTES];
  if (plan.workspace <= sizeof here) {
    work.workspace = here;
    return run_tiles(api, context, &work);
  }
  /* Aligned by hand: Android has aligned_alloc from version 9 (API 28) on, Windows not at all. */
  void* memory = malloc(plan.workspace + LORDBA_ALIGNMENT - 1);
  if (memory == NULL) return failure(api, ORT_FAIL, "SignAdapter: out of memory");
  work.workspace = (void*)(((uintptr_t)memory + LORDBA_ALIGNMENT - 1) / LORDBA_ALIGNMENT * LORDBA_ALIGNMENT);
  OrtStatus* status = run_tiles(api, context, &work);
  free(memory);
  return status;
}

/* Points the module into its inputs, up to what its codes mean. */
static void point(lordba_module* module, const Tensor* in, lordba_scale_code code) {
  module->a_signs = in[SIGNS].data;
  module->b_signs = module->a_signs + (size_t)module->r * ((module->d_in + 7) / 8);
  const uint8_t* stored = (const uint8_t*)in[SCALES].data + (is_coded(code) ? RANGE_BYTES : 0);
  module->s_in = (lordba_scales){code, NULL, stored};
  module->s_mid = (lordba_scales){code, NULL, stored += stored_bytes(code, module->d_in)};
  module->s_out = (lordba_scales){code, NULL, stored + stored_bytes(code, module->r)};
}

static OrtStatus* ORT_CALL compute(void* state, OrtKernelContext* context) {
  const Kernel* kernel = state;
  const OrtApi* api = kernel->api;
  atomic_fetch_add_explicit(&calls, 1, memory_order_relaxed);
  const size_t float_bytes = kernel->dtype == LORDBA_F32 ? 4 : 2;
  Tensor in[INPUTS];
  Shape shape;
  OrtStatus* status = look_at(kernel, context, X, float_bytes, &in[X], NULL);
  if (!status) status = look_at(kernel, context, BASE, float_bytes, &in[BASE], &shape);
  if (!status) status = look_at(kernel, context, SIGNS, 1, &in[SIGNS], NULL);
  if (!status) status = look_at(kernel, context, SCALES, element_bytes(kernel->code), &in[SCALES], NULL);
  if (status) return status;

  OrtValue* output = NULL;
  status = ORT_CALLABLE(api, OrtOutput, ORT_OUTPUT)(context, 0, shape.dims, shape.rank, &output);
  void* y = NULL;
  if (!status) status = ORT_CALLABLE(api, OrtTensorData, ORT_TENSOR_DATA)(output, &y);
  if (status) return status;
  if (in[BASE].elements == 0) return NULL;

  size_t tokens = 1;
  for (size_t i = 0; i + 1 < shape.rank; ++i) tokens *= (size_t)shape.dims[i];
  lordba_module module;
  const char* fault = mismatch(in, kernel->code, tokens, &module);
  if (fault) return invalid(api, fault);
  point(&module, in, kernel->code);
  if (lordba_is_zero(&module)) {
    if (y != in[BASE].data) memcpy(y, in[BASE].data, in[BASE].elements * float_bytes);
    return NULL;
  }

  float meaning[3][LOG4_CODES];
  lordba_scales* const scales[3] = {&module.s_in, &module.s_mid, &module.s_out};
  for (int i = 0; is_coded(kernel->code) && i < 3; ++i) {
    if (!lordba_scale_meaning(kernel->code, (const uint8_t*)in[SCALES].data + RANGE_BYTES / 3 * i, meaning[i])) {
      return invalid(api, "SignAdapter: the ranges in scales must be 0 < lo <= hi and finite");
    }
    scales[i]->meaning = (const uint8_t*)meaning[i];
  }
  const lordba_call call = {
      .modules = &module,
      .count = 1,
      .dtype = kernel->dtype,
      .tokens = tokens,
      .x = in[X].data,
      .x_stride = module.d_in,
      .base = in[BASE].data,
      .base_stride = module.d_out,
      .y = y,
      .y_stride = module.d_out,
  };
  return run(api, context, &call);
}

static OrtStatus* ORT_CALL create_kernel(const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info,
                                         void** state) {
  const SignAdapterOp* self = (const SignAdapterOp*)op;
  char name[8] = "";
  size_t size = sizeof name;
  OrtStatus* status = ORT_CALLABLE(api, OrtAttributeString, ORT_ATTRIBUTE_STRING)(info, "scale_code", name, &size);
  if (status) return status;
  static const char* const names[] = {"fp32", "fp16", "int8", "log4"};
  static const OrtElementType types[] = {ORT_FLOAT, ORT_FLOAT16, ORT_UINT8, ORT_UINT8};
  for (int code = 0; code < 4; ++code) {
    if (strcmp(name, names[code]) != 0) continue;
    if (types[code] != self->scales) return invalid(api, "SignAdapter: the scales' type does not fit scale_code");
    Kernel* kernel = malloc(sizeof *kernel);
    if (kernel == NULL) return failure(api, ORT_FAIL, "SignAdapter: out of memory");
    *kernel = (Kernel){api, self->dtype, (lordba_scale_code)code, self->tells_sizes};
    *state = kernel;
    return NULL;
  }
  return invalid(api, "SignAdapter: scale_code must be fp32, fp16, int8 or log4");
}

static void ORT_CALL destroy_kernel(void* kernel) { free(kernel); }

/* y has base's type and shape. */
static OrtStatus* ORT_CALL infer(const OrtCustomOp* op, OrtShapeContext* context) {
  const OrtApi* api = ((const SignAdapterOp*)op)->api;
  OrtShape* shape = NULL;
  size_t rank = 0;
  OrtStatus* status = ORT_CALLABLE(api, OrtInferenceInput, ORT_INFERENCE_INPUT)(context, BASE, &shape);
  if (!status) status = ORT_CALLABLE(api, OrtDimensionsCount, ORT_DIMENSIONS_COUNT)(shape, &rank);
  int64_t dims[MOST_DIMENSIONS];
  const char* names[MOST_DIMENSIONS];
  if (status || rank == 0 || rank > MOST_DIMENSIONS) return status; /* not known yet, or for compute to refuse */
  status = ORT_CALLABLE(api, OrtDimensions, ORT_DIMENSIONS)(shape, dims, rank);
  if (!status) status = ORT_CALLABLE(api, OrtSymbolicDimensions, ORT_SYMBOLIC_DIMENSIONS)(shape, names, rank);
  for (size_t i = 0; !status && i < rank; ++i) {
    if (dims[i] < 0 && names[i][0] == 0) return NULL; /* a size without a name: ONNX Runtime would take -1 for it */
  }
  if (status) return status;
  return ORT_CALLABLE(api, OrtInferenceOutput, ORT_INFERENCE_OUTPUT)(context, 0, shape);
}

static const char* ORT_CALL name(const OrtCustomOp* op) { return (void)op, "SignAdapter"; }
static const char* ORT_CALL execution_provider(const OrtCustomOp* op) { return (void)op, NULL; /* the CPU */ }
static size_t ORT_CALL input_count(const OrtCustomOp* op) { return (void)op, INPUTS; }
static size_t ORT_CALL output_count(const OrtCustomOp* op) { return (void)op, 1; }
static int ORT_CALL zero(const OrtCustomOp* op) { return (void)op, 0; }
static int ORT_CALL one(const OrtCustomOp* op) { return (void)op, 1; }
static int ORT_CALL input_memory(const OrtCustomOp* op, size_t i) { return (void)op, (void)i, 0; }

static OrtElementType float_type(const OrtCustomOp* op) {
  static const OrtElementType types[] = {
      [LORDBA_F32] = ORT_FLOAT, [LORDBA_F16] = ORT_FLOAT16, [LORDBA_BF16] = ORT_BFLOAT16};
  return types[((const SignAdapterOp*)op)->dtype];
}

static OrtElementType ORT_CALL input_type(const OrtCustomOp* op, size_t i) {
  if (i == X || i == BASE) return float_type(op);
  if (i == SIGNS) return ORT_UINT8;
  return ((const SignAdapterOp*)op)->scales;
}

static OrtElementType ORT_CALL output_type(const OrtCustomOp* op, size_t i) { return (void)i, float_type(op); }

/* y may lie where base lies, if nothing else reads base. */
static size_t ORT_CALL may_inplace(int** inputs, int** outputs) {
  static int base = BASE, y = 0;
  *inputs = &base;
  *outputs = &y;
  return 1;
}
static void ORT_CALL release_may_inplace(int* inputs, int* outputs) { (void)inputs, (void)outputs; }

static OrtCharacteristic ORT_CALL required(const OrtCustomOp* op, size_t i) { return (void)op, (void)i, ORT_REQUIRED; }

SignAdapterOp lordba_onnxruntime_op(const OrtApi* api, int minor, lordba_dtype dtype, OrtElementType scales) {
  return (SignAdapterOp){
      .op = {.version = minor >= ORT_INPLACE_SINCE ? ORT_INPLACE_SINCE : ORT_API_VERSION,
             .name = name,
             .execution_provider = execution_provider,
             .input_type = input_type,
             .input_count = input_count,
             .output_type = output_type,
             .output_count = output_count,
             .destroy_kernel = destroy_kernel,
             .input_characteristic = required,
             .output_characteristic = required,
             .input_memory = input_memory,
             .variadic_input_least = one,
             .variadic_input_same = zero,
             .variadic_output_least = one,
             .variadic_output_same = zero,
             .create_kernel = create_kernel,
             .compute = compute,
             .infer = infer,
             .start_version = one,
             .end_version = one,
             .may_inplace = may_inplace,
             .release_may_inplace = release_may_inplace},
      .api = api,
      .tells_sizes = minor >= ORT_TENSOR_BYTES_SINCE,
      .dtype = dtype,
      .scales = scales,
  };
}
