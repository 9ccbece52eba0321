// lordba::swiglu for ExecuTorch: silu(gate) * up from one packed row [gate | up], in one pass.
#include <executorch/extension/kernel_util/make_boxed_from_unboxed_functor.h>
#include <executorch/runtime/kernel/kernel_includes.h>

#include "share_out.h"
#include "vector_math.h"

namespace {

using executorch::aten::ScalarType;
using executorch::aten::SizesType;
using executorch::aten::Tensor;
using executorch::runtime::Error;
using executorch::runtime::KernelRuntimeContext;

constexpr int64_t kWorthSplitting = 1 << 16;  // elements below which waking the thread pool costs more than it saves

LORDBA_WIDE void swiglu_row(const float* __restrict gate, const float* __restrict up, int64_t width,
                            float* __restrict y) {
  for (int64_t i = 0; i < width; ++i) {
    const float g = gate[i];
    // Beyond +-87 the sigmoid is 0 or 1 in float; a NaN must pass through, so it is never compared away.
    const float limited = g < -87.0f ? -87.0f : g > 87.0f ? 87.0f : g;
    y[i] = g / (1.0f + lordba::exponential(-limited)) * up[i];
  }
}

Tensor& swiglu_out(KernelRuntimeContext& ctx, const Tensor& gate_up, Tensor& out) {
  for (const Tensor* tensor : {&gate_up, static_cast<const Tensor*>(&out)}) {
    ET_KERNEL_CHECK(ctx, tensor->scalar_type() == ScalarType::Float, InvalidArgument, out);
    ET_KERNEL_CHECK(ctx, executorch::runtime::tensor_is_default_dim_order(*tensor), InvalidArgument, out);
  }
  ET_KERNEL_CHECK(ctx, gate_up.dim() == 3 && gate_up.size(2) % 2 == 0, InvalidArgument, out);
  const int64_t rows = gate_up.size(0) * gate_up.size(1), width = gate_up.size(2) / 2;
  const SizesType sizes[3] = {static_cast<SizesType>(gate_up.size(0)), static_cast<SizesType>(gate_up.size(1)),
                              static_cast<SizesType>(width)};
  ET_KERNEL_CHECK(ctx, executorch::runtime::resize_tensor(out, {sizes, 3}) == Error::Ok, InvalidArgument, out);
  const float* from = gate_up.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      swiglu_row(from + 2 * t * width, from + (2 * t + 1) * width, width, to + t * width);
    }
  };
  lordba::share_out(rows, rows * width, kWorthSplitting, run);
  return out;
}

}  // namespace

EXECUTORCH_LIBRARY(lordba, "swiglu.out", swiglu_out);
