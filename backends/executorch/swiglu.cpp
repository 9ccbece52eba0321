// lordba::swiglu for ExecuTorch: silu(gate) * up from one packed row [gate | up], in one pass.
#include <executorch/extension/kernel_util/make_boxed_from_unboxed_functor.h>
#include <executorch/runtime/kernel/kernel_includes.h>
#include <executorch/runtime/kernel/thread_parallel_interface.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define LORDBA_WIDE __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define LORDBA_WIDE
#endif

namespace {

using executorch::aten::ScalarType;
using executorch::aten::SizesType;
using executorch::aten::Tensor;
using executorch::runtime::Error;
using executorch::runtime::KernelRuntimeContext;

constexpr int64_t kWorthSplitting = 1 << 16;  // elements below which waking the thread pool costs more than it saves

// e^x for x in [-87, 87] to 2e-7 relative: 2^k * e^f with |f| <= ln(2)/2 by a polynomial. The compiler vectorizes it.
inline float exponential(float x) {
  const float scaled = x * 1.44269504f;
  const float rounding = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low mantissa bits
  const float shifted = scaled + rounding;
  const float k = shifted - rounding;
  const float f = (x - k * 0.693145752f) - k * 1.42860677e-6f;
  float p = 1.3888889e-3f;
  p = p * f + 8.3333333e-3f;
  p = p * f + 4.1666667e-2f;
  p = p * f + 0.16666667f;
  p = p * f + 0.5f;
  p = p * f + 1.0f;
  p = p * f + 1.0f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof(power));
  return p * power;
}

LORDBA_WIDE void swiglu_row(const float* __restrict gate, const float* __restrict up, int64_t width,
                            float* __restrict y) {
  for (int64_t i = 0; i < width; ++i) {
    const float g = gate[i];
    // Beyond +-87 the sigmoid is 0 or 1 in float; a NaN must pass through, so it is never compared away.
    const float limited = g < -87.0f ? -87.0f : g > 87.0f ? 87.0f : g;
    y[i] = g / (1.0f + exponential(-limited)) * up[i];
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
  if (rows * width < kWorthSplitting) {
    run(0, rows);
  } else {
    executorch::extension::parallel_for(0, rows, std::max<int64_t>(1, kWorthSplitting / 4 / width), run);
  }
  return out;
}

}  // namespace

EXECUTORCH_LIBRARY(lordba, "swiglu.out", swiglu_out);
