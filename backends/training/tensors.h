// Checks and shapes that the ops of training share: activations are float32 rows [1, T, width].
#pragma once

#include <executorch/runtime/kernel/kernel_includes.h>

#include <initializer_list>

namespace lordba {

using executorch::aten::ScalarType;
using executorch::aten::SizesType;
using executorch::aten::Tensor;
using executorch::runtime::Error;
using executorch::runtime::EValue;
using executorch::runtime::KernelRuntimeContext;
using executorch::runtime::Span;

inline bool is_float(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Float && executorch::runtime::tensor_is_default_dim_order(tensor);
}

inline bool is_rows(const Tensor& tensor, int64_t width) {
  return is_float(tensor) && tensor.dim() == 3 && tensor.size(0) == 1 && tensor.size(2) == width;
}

inline bool is_vector(const Tensor& tensor, int64_t length) {
  return is_float(tensor) && tensor.dim() == 1 && tensor.size(0) == length;
}

inline bool resize(Tensor& out, std::initializer_list<int64_t> shape) {
  SizesType sizes[executorch::runtime::kTensorDimensionLimit];
  size_t dims = 0;
  for (const int64_t size : shape) sizes[dims++] = static_cast<SizesType>(size);
  return is_float(out) && executorch::runtime::resize_tensor(out, {sizes, dims}) == Error::Ok;
}

}  // namespace lordba
