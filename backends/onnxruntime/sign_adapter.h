/* ai.lordba::SignAdapter as ONNX Runtime asks for it. */
#ifndef LORDBA_SIGN_ADAPTER_H
#define LORDBA_SIGN_ADAPTER_H

#include <stdbool.h>

#include "lordba_kernels.h"
#include "ort_abi.h"

enum { LORDBA_MOST_MODULES = 3 }; /* of one node */

/* The operator for so many modules, one type of x and one of stored scales; ONNX Runtime picks by a node's types. */
typedef struct {
  OrtCustomOp op; /* first: ONNX Runtime hands back its address */
  const OrtApi* api;
  bool tells_sizes; /* the runtime has ORT_TENSOR_BYTES */
  size_t modules;
  lordba_dtype dtype;
  OrtElementType scales;
} SignAdapterOp;

/* `minor` is the y of the runtime's version 1.y. */
SignAdapterOp lordba_onnxruntime_op(const OrtApi* api, int minor, size_t modules, lordba_dtype dtype,
                                    OrtElementType scales);

/* The kernels for this CPU, or those that the environment variable LORDBA_ISA names; NULL if there are none such. */
const lordba_kernels* lordba_onnxruntime_kernels(void);

/* How many modules the kernel has computed in this process. */
uint64_t lordba_onnxruntime_calls(void);

#endif
