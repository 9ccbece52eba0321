/* ai.lordba::SignAdapter as ONNX Runtime asks for it. */
#ifndef LORDBA_SIGN_ADAPTER_H
#define LORDBA_SIGN_ADAPTER_H

#include <stdbool.h>

#include "lordba_kernels.h"
#include "ort_abi.h"

/* The operator for one type of x; ONNX Runtime picks by a node's types. */
typedef struct {
  OrtCustomOp op; /* first: ONNX Runtime hands back its address */
  const OrtApi* api;
  bool tells_sizes; /* the runtime has ORT_TENSOR_BYTES */
  lordba_dtype dtype;
} SignAdapterOp;

/* `minor` is the y of the runtime's version 1.y. */
SignAdapterOp lordba_onnxruntime_op(const OrtApi* api, int minor, lordba_dtype dtype);

/* The kernels for this CPU, or those that the environment variable LORDBA_ISA names; NULL if there are none such. */
const lordba_kernels* lordba_onnxruntime_kernels(void);

/* How often the kernel ran in this process. */
uint64_t lordba_onnxruntime_calls(void);

#endif
