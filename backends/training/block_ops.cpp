// The small ops of a decoder block in training: RMS norm, forward and backward, and the backward pass of swiglu.
#include <executorch/extension/kernel_util/make_boxed_from_unboxed_functor.h>

#include <cmath>
#include <optional>

#include "../executorch/vector_math.h"
#include "tensors.h"

namespace lordba {
namespace {

// y = weight * x / sqrt(mean(x^2) + eps), row by row.
Tensor& rms_norm_out(KernelRuntimeContext& ctx, const Tensor& x, const Tensor& weight, double eps, Tensor& out) {
  const int64_t width = weight.numel();
  ET_KERNEL_CHECK(ctx, is_vector(weight, width) && is_rows(x, width), InvalidArgument, out);
  ET_KERNEL_CHECK(ctx, resize(out, {1, x.size(1), width}), InvalidArgument, out);
  const float *from = x.const_data_ptr<float>(), *w = weight.const_data_ptr<float>();
  float* y = out.mutable_data_ptr<float>();
  for (int64_t t = 0; t < x.size(1); ++t, from += width, y += width) {
    double squares = 0.0;
    for (int64_t i = 0; i < width; ++i) squares += from[i] * from[i];
    const float r = static_cast<float>(1 / std::sqrt(squares / width + eps));
    for (int64_t i = 0; i < width; ++i) y[i] = w[i] * (from[i] * r);
  }
  return out;
}

// gx = r w g - x r^3 mean(w g x), r = 1 / sqrt(mean(x^2) + eps); plus `add`, the gradient that passed beside the norm.
Tensor& rms_norm_backward_out(KernelRuntimeContext& ctx, const Tensor& g, const Tensor& x, const Tensor& weight,
                              double eps, const std::optional<Tensor>& add, Tensor& out) {
  const int64_t width = weight.numel();
  ET_KERNEL_CHECK(ctx, is_vector(weight, width) && is_rows(x, width), InvalidArgument, out);
  ET_KERNEL_CHECK(ctx, g.sizes().equals(x.sizes()) && (!add || add->sizes().equals(x.sizes())), InvalidArgument, out);
  ET_KERNEL_CHECK(ctx, resize(out, {1, x.size(1), width}), InvalidArgument, out);
  const float *rows = x.const_data_ptr<float>(), *grads = g.const_data_ptr<float>();
  const float *w = weight.const_data_ptr<float>(), *beside = add ? add->const_data_ptr<float>() : nullptr;
  float* to = out.mutable_data_ptr<float>();
  for (int64_t t = 0; t < x.size(1); ++t, rows += width, grads += width, to += width) {
    double squares = 0.0, along = 0.0;
    for (int64_t i = 0; i < width; ++i) {
      squares += rows[i] * rows[i];
      along += w[i] * grads[i] * rows[i];
    }
    const double r = 1 / std::sqrt(squares / width + eps);
    const float scale = static_cast<float>(r), pull = static_cast<float>(r * r * r * along / width);
    for (int64_t i = 0; i < width; ++i) to[i] = scale * w[i] * grads[i] - pull * rows[i];
    for (int64_t i = 0; beside && i < width; ++i) to[i] += beside[t * width + i];
  }
  return out;
}

LORDBA_WIDE void swiglu_backward_row(const float* __restrict g, const float* __restrict gate,
                                     const float* __restrict up, int64_t width, float* __restrict to_gate,
                                     float* __restrict to_up) {
  for (int64_t i = 0; i < width; ++i) {
    const float z = gate[i], limited = z < -87.0f ? -87.0f : z > 87.0f ? 87.0f : z;
    const float s = 1.0f / (1.0f + exponential(-limited)), silu = z * s;
    to_gate[i] = g[i] * up[i] * (s + silu * (1.0f - s));
    to_up[i] = g[i] * silu;
  }
}

// For silu(gate) * up of rows [gate | up] [1, T, 2 F] and g [1, T, F]: the gradient of the rows.
Tensor& swiglu_backward_out(KernelRuntimeContext& ctx, const Tensor& g, const Tensor& gate_up, Tensor& out) {
  const int64_t width = g.dim() == 3 ? g.size(2) : 0, tokens = g.dim() == 3 ? g.size(1) : 0;
  ET_KERNEL_CHECK(ctx, is_rows(g, width) && is_rows(gate_up, 2 * width) && gate_up.size(1) == tokens, InvalidArgument,
                  out);
  ET_KERNEL_CHECK(ctx, resize(out, {1, tokens, 2 * width}), InvalidArgument, out);
  const float *grads = g.const_data_ptr<float>(), *rows = gate_up.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  for (int64_t t = 0; t < tokens; ++t, grads += width, rows += 2 * width, to += 2 * width) {
    swiglu_backward_row(grads, rows, rows + width, width, to, to + width);
  }
  return out;
}

}  // namespace
}  // namespace lordba

EXECUTORCH_LIBRARY(lordba, "rms_norm.out", lordba::rms_norm_out);
EXECUTORCH_LIBRARY(lordba, "rms_norm_backward.out", lordba::rms_norm_backward_out);
EXECUTORCH_LIBRARY(lordba, "swiglu_backward.out", lordba::swiglu_backward_out);
