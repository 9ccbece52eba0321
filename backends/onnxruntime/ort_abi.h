/*
 * The part of ONNX Runtime's C ABI that a custom operator needs, as of API version 17 (ONNX Runtime 1.17).
 *
 * ONNX Runtime publishes its functions as a table of pointers that only ever grows at its end, so that the places below
 * are the same in every later version. We declare what we call and nothing else: no header of a certain version is
 * needed to build, and one library runs with all of them.
 */
#ifndef LORDBA_ORT_ABI_H
#define LORDBA_ORT_ABI_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define ORT_CALL __stdcall
#else
#define ORT_CALL
#endif

enum { ORT_API_VERSION = 17 }; /* the first with KernelContext_ParallelFor and shape inference of custom operators */

typedef struct OrtStatus OrtStatus; /* NULL is success */
typedef struct OrtValue OrtValue;
typedef struct OrtShape OrtShape; /* OrtTensorTypeAndShapeInfo */
typedef struct OrtKernelInfo OrtKernelInfo;
typedef struct OrtKernelContext OrtKernelContext;
typedef struct OrtShapeContext OrtShapeContext; /* OrtShapeInferContext */
typedef struct OrtDomain OrtDomain;             /* OrtCustomOpDomain */
typedef struct OrtSessionOptions OrtSessionOptions;

typedef enum { ORT_FAIL = 1, ORT_INVALID_ARGUMENT = 2 } OrtErrorCode;

typedef enum { ORT_FLOAT = 1, ORT_UINT8 = 2, ORT_FLOAT16 = 10, ORT_BFLOAT16 = 16 } OrtElementType;

typedef enum { ORT_REQUIRED = 0 } OrtCharacteristic;

/* The table's places, by number. */
enum {
  ORT_CREATE_STATUS = 0,
  ORT_CREATE_DOMAIN = 26,
  ORT_DOMAIN_ADD = 27,
  ORT_ADD_DOMAIN = 28,
  ORT_TENSOR_DATA = 51,
  ORT_DIMENSIONS_COUNT = 61,
  ORT_DIMENSIONS = 62,
  ORT_SYMBOLIC_DIMENSIONS = 63,
  ORT_ELEMENT_COUNT = 64,
  ORT_TENSOR_SHAPE = 65,
  ORT_ATTRIBUTE_INTEGER = 86,
  ORT_INPUT = 90,
  ORT_OUTPUT = 91,
  ORT_RELEASE_SHAPE = 99,
  ORT_INFERENCE_INPUT = 268,
  ORT_INFERENCE_OUTPUT = 270,
  ORT_PARALLEL_FOR = 274,
  ORT_TENSOR_BYTES = 318, /* only in 1.23 and later */
};
enum { ORT_INPLACE_SINCE = 18, ORT_TENSOR_BYTES_SINCE = 23 };

typedef void (*OrtFunction)(void);
typedef struct {
  OrtFunction functions[ORT_TENSOR_BYTES + 1]; /* as many as the runtime's version has */
} OrtApi;

typedef struct {
  const OrtApi*(ORT_CALL* GetApi)(uint32_t version); /* NULL if the runtime is older */
  const char*(ORT_CALL* GetVersionString)(void);
} OrtApiBase;

typedef OrtStatus*(ORT_CALL* OrtCreateStatus)(OrtErrorCode, const char* message);
typedef OrtStatus*(ORT_CALL* OrtCreateDomain)(const char* name, OrtDomain**);
typedef OrtStatus*(ORT_CALL* OrtAddDomain)(OrtSessionOptions*, OrtDomain*);
typedef OrtStatus*(ORT_CALL* OrtTensorData)(OrtValue*, void**);
typedef OrtStatus*(ORT_CALL* OrtDimensionsCount)(const OrtShape*, size_t*);
typedef OrtStatus*(ORT_CALL* OrtDimensions)(const OrtShape*, int64_t*, size_t);
typedef OrtStatus*(ORT_CALL* OrtSymbolicDimensions)(const OrtShape*, const char**, size_t);
typedef OrtStatus*(ORT_CALL* OrtElementCount)(const OrtShape*, size_t*);
typedef OrtStatus*(ORT_CALL* OrtTensorBytes)(const OrtValue*, size_t*);
typedef OrtStatus*(ORT_CALL* OrtTensorShape)(const OrtValue*, OrtShape**);
typedef void(ORT_CALL* OrtReleaseShape)(OrtShape*);
typedef OrtStatus*(ORT_CALL* OrtAttributeInteger)(const OrtKernelInfo*, const char* name, int64_t*);
typedef OrtStatus*(ORT_CALL* OrtInput)(const OrtKernelContext*, size_t, const OrtValue**);
typedef OrtStatus*(ORT_CALL* OrtOutput)(OrtKernelContext*, size_t, const int64_t*, size_t, OrtValue**);
typedef OrtStatus*(ORT_CALL* OrtInferenceInput)(const OrtShapeContext*, size_t, OrtShape**);
typedef OrtStatus*(ORT_CALL* OrtInferenceOutput)(const OrtShapeContext*, size_t, const OrtShape*);
typedef OrtStatus*(ORT_CALL* OrtParallelFor)(const OrtKernelContext*, void (*)(void*, size_t), size_t total,
                                             size_t batches, void*);

/* The function at a place of the table, as what it is. */
#define ORT_CALLABLE(api, type, place) ((type)(api)->functions[place])

/* A custom operator: what ONNX Runtime asks of it and calls. Older forms of a callback stay NULL. */
typedef struct OrtCustomOp {
  uint32_t version;
  void* create_kernel_v1;
  const char*(ORT_CALL* name)(const struct OrtCustomOp*);
  const char*(ORT_CALL* execution_provider)(const struct OrtCustomOp*);
  OrtElementType(ORT_CALL* input_type)(const struct OrtCustomOp*, size_t);
  size_t(ORT_CALL* input_count)(const struct OrtCustomOp*);
  OrtElementType(ORT_CALL* output_type)(const struct OrtCustomOp*, size_t);
  size_t(ORT_CALL* output_count)(const struct OrtCustomOp*);
  void* compute_v1;
  void(ORT_CALL* destroy_kernel)(void*);
  OrtCharacteristic(ORT_CALL* input_characteristic)(const struct OrtCustomOp*, size_t);
  OrtCharacteristic(ORT_CALL* output_characteristic)(const struct OrtCustomOp*, size_t);
  int(ORT_CALL* input_memory)(const struct OrtCustomOp*, size_t);
  int(ORT_CALL* variadic_input_least)(const struct OrtCustomOp*);
  int(ORT_CALL* variadic_input_same)(const struct OrtCustomOp*);
  int(ORT_CALL* variadic_output_least)(const struct OrtCustomOp*);
  int(ORT_CALL* variadic_output_same)(const struct OrtCustomOp*);
  OrtStatus*(ORT_CALL* create_kernel)(const struct OrtCustomOp*, const OrtApi*, const OrtKernelInfo*, void**);
  OrtStatus*(ORT_CALL* compute)(void*, OrtKernelContext*);
  OrtStatus*(ORT_CALL* infer)(const struct OrtCustomOp*, OrtShapeContext*);
  int(ORT_CALL* start_version)(const struct OrtCustomOp*);
  int(ORT_CALL* end_version)(const struct OrtCustomOp*);
  size_t(ORT_CALL* may_inplace)(int** inputs, int** outputs); /* from here on only read in 1.18 and later */
  void(ORT_CALL* release_may_inplace)(int* inputs, int* outputs);
  void* aliases[2]; /* not used */
} OrtCustomOp;

typedef OrtStatus*(ORT_CALL* OrtDomainAdd)(OrtDomain*, const OrtCustomOp*);

#endif
