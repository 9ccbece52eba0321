/*
 * ai.lordba::SignAdapter for ONNX Runtime: y = base + s_out * (B (s_mid * (A (s_in * x)))), over backends/kernels.
 *
 * Inputs: x [..., d_in], base [..., d_out], adapter [n], a blob (docs/format.md) of which a node reads the module that
 * its attribute names. The blob is checked at every call, for it is another input each time. A call keeps no state, so
 * that one session may run on several threads.
 */
#include "sign_adapter.h"

#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { X, BASE, ADAPTER, INPUTS };
enum { MOST_DIMENSIONS = 8, STACK_BYTES = 16384, MOST_THREADS = 64, MESSAGE_BYTES = 192 };

typedef struct {
  const OrtApi* api;
  lordba_dtype dtype;
  bool tells_sizes;
  uint64_t module;
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

/* Finds the node's module in the adapter; sizes that do not belong together are refused. */
static OrtStatus* find_module(const Kernel* kernel, const Tensor* in, size_t tokens, lordba_module* module) {
  const size_t d_in = in[X].elements / tokens, d_out = in[BASE].elements / tokens;
  if (d_in * tokens != in[X].elements) {
    return invalid(kernel->api, "SignAdapter: x and base must agree in all dimensions but the last");
  }
  char message[MESSAGE_BYTES];
  const lordba_status fault = lordba_blob_module(in[ADAPTER].data, in[ADAPTER].elements, kernel->module, module);
  if (fault != LORDBA_OK) {
    snprintf(message, sizeof message, "SignAdapter: adapter: %s", lordba_status_text(fault));
    return invalid(kernel->api, message);
  }
  if (module->r != 0 && (module->d_in != d_in || module->d_out != d_out)) {
    snprintf(
        message, sizeof message,
        "SignAdapter: module %llu of the adapter maps %u to %u channels, the node %zu to %zu; this adapter belongs "
        "to another program",
        (unsigned long long)kernel->module, module->d_in, module->d_out, d_in, d_out);
    return invalid(kernel->api, message);
  }
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

static OrtStatus* ORT_CALL compute(void* state, OrtKernelContext* context) {
  const Kernel* kernel = state;
  const OrtApi* api = kernel->api;
  atomic_fetch_add_explicit(&calls, 1, memory_order_relaxed);
  const size_t float_bytes = kernel->dtype == LORDBA_F32 ? 4 : 2;
  Tensor in[INPUTS];
  Shape shape;
  OrtStatus* status = look_at(kernel, context, X, float_bytes, &in[X], NULL);
  if (!status) status = look_at(kernel, context, BASE, float_bytes, &in[BASE], &shape);
  if (!status) status = look_at(kernel, context, ADAPTER, 1, &in[ADAPTER], NULL);
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
  status = find_module(kernel, in, tokens, &module);
  if (status) return status;
  if (lordba_is_zero(&module)) {
    if (y != in[BASE].data) memcpy(y, in[BASE].data, in[BASE].elements * float_bytes);
    return NULL;
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
  int64_t module = 0;
  OrtStatus* status = ORT_CALLABLE(api, OrtAttributeInteger, ORT_ATTRIBUTE_INTEGER)(info, "module", &module);
  if (status) return status;
  if (module < 0) return invalid(api, "SignAdapter: module must not be negative");
  Kernel* kernel = malloc(sizeof *kernel);
  if (kernel == NULL) return failure(api, ORT_FAIL, "SignAdapter: out of memory");
  *kernel = (Kernel){api, self->dtype, self->tells_sizes, (uint64_t)module};
  *state = kernel;
  return NULL;
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
static int ORT_CALL version(const OrtCustomOp* op) { return (void)op, 2; }
static int ORT_CALL input_memory(const OrtCustomOp* op, size_t i) { return (void)op, (void)i, 0; }

static OrtElementType float_type(const OrtCustomOp* op) {
  static const OrtElementType types[] = {
      [LORDBA_F32] = ORT_FLOAT, [LORDBA_F16] = ORT_FLOAT16, [LORDBA_BF16] = ORT_BFLOAT16};
  return types[((const SignAdapterOp*)op)->dtype];
}

static OrtElementType ORT_CALL input_type(const OrtCustomOp* op, size_t i) {
  return i == ADAPTER ? ORT_UINT8 : float_type(op);
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

SignAdapterOp lordba_onnxruntime_op(const OrtApi* api, int minor, lordba_dtype dtype) {
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
             .start_version = version,
             .end_version = version,
             .may_inplace = may_inplace,
             .release_may_inplace = release_may_inplace},
      .api = api,
      .tells_sizes = minor >= ORT_TENSOR_BYTES_SINCE,
      .dtype = dtype,
  };
}
