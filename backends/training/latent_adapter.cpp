// An adapter in training: y = base + env(B) env(A) x for the layers that share x, from flat latents
// (lordba/training/ste.py).
#include <executorch/extension/kernel_util/make_boxed_from_unboxed_functor.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "../executorch/vector_math.h"
#include "pack.h"
#include "products.h"
#include "tensors.h"

namespace lordba {
namespace {

using IntList = executorch::aten::ArrayRef<int64_t>;

// The envelopes of one layer's latents as products read them; ranks are padded with zeros to whole panels.
struct Factors {
  int64_t r, wide, d_in, d_out;
  std::vector<float> right;    // env(A) [r, d_in]
  std::vector<float> right_t;  // its transpose [d_in, wide]
  std::vector<float> left;     // env(B) [d_out, wide]

  Factors(const float* latents, int64_t r, int64_t d_in, int64_t d_out)
      : r(r),
        wide((r + kPanel - 1) / kPanel * kPanel),
        d_in(d_in),
        d_out(d_out),
        right(r * d_in),
        right_t(d_in * wide),
        left(d_out * wide) {
    const float *a = latents, *b = latents + r * d_in;
    std::vector<float> p_a(r), q_a(d_in), p_b(d_out), q_b(r);
    std::vector<double> sums(std::max(r, d_in));
    lordba_envelope(a, r, d_in, p_a.data(), q_a.data(), sums.data());
    lordba_envelope(b, d_out, r, p_b.data(), q_b.data(), sums.data());
    for (int64_t i = 0; i < r; ++i) {
      for (int64_t j = 0; j < d_in; ++j) {
        const float value = p_a[i] * q_a[j];
        right[i * d_in + j] = a[i * d_in + j] < 0 ? -value : value;
      }
    }
    for (int64_t j = 0; j < d_in; ++j) {
      for (int64_t i = 0; i < r; ++i) right_t[j * wide + i] = right[i * d_in + j];
    }
    for (int64_t o = 0; o < d_out; ++o) {
      for (int64_t i = 0; i < r; ++i) left[o * wide + i] = b[o * r + i] < 0 ? -p_b[o] * q_b[i] : p_b[o] * q_b[i];
    }
  }
};

bool fits(const Tensor& x, const Tensor& latents, int64_t offset, IntList ranks, IntList d_outs, int64_t* size) {
  if (!is_float(x) || x.dim() != 3 || x.size(0) != 1 || !is_float(latents) || latents.dim() != 1) return false;
  if (ranks.size() != d_outs.size() || ranks.empty() || offset < 0) return false;
  *size = 0;
  for (size_t i = 0; i < ranks.size(); ++i) {
    if (ranks[i] < 0 || d_outs[i] < 1) return false;
    *size += ranks[i] * (x.size(2) + d_outs[i]);
  }
  return offset + *size <= latents.numel();
}

int64_t total(IntList sizes) {
  int64_t sum = 0;
  for (const int64_t size : sizes) sum += size;
  return sum;
}

// h [T, wide] = x right^T.
std::vector<float> inner(const Factors& f, const float* x, int64_t tokens) {
  std::vector<float> h(tokens * f.wide);
  parallel_product({x, f.d_in, 1}, tokens, f.d_in, f.right_t.data(), f.wide, f.wide, h.data(), f.wide);
  return h;
}

Tensor& latent_adapter_out(KernelRuntimeContext& ctx, const Tensor& x, const Tensor& latents, int64_t offset,
                           IntList ranks, IntList d_outs, const Tensor& base, Tensor& out) {
  int64_t size;
  ET_KERNEL_CHECK_MSG(ctx, fits(x, latents, offset, ranks, d_outs, &size), InvalidArgument, out,
                      "x, latents and the sizes of the layers do not fit");
  const int64_t tokens = x.size(1), d_in = x.size(2), width = total(d_outs);
  ET_KERNEL_CHECK(ctx, is_rows(base, width) && base.size(1) == tokens, InvalidArgument, out);
  ET_KERNEL_CHECK(ctx, resize(out, {1, tokens, width}), InvalidArgument, out);
  float* y = out.mutable_data_ptr<float>();
  std::copy_n(base.const_data_ptr<float>(), tokens * width, y);
  const float* from = latents.const_data_ptr<float>() + offset;
  for (size_t i = 0; i < ranks.size(); y += d_outs[i], from += ranks[i] * (d_in + d_outs[i]), ++i) {
    if (ranks[i] == 0) continue;
    const Factors f(from, ranks[i], d_in, d_outs[i]);
    const std::vector<float> h = inner(f, x.const_data_ptr<float>(), tokens);
    std::vector<float> left_t(f.r * f.d_out);
    for (int64_t o = 0; o < f.d_out; ++o) {
      for (int64_t r = 0; r < f.r; ++r) left_t[r * f.d_out + o] = f.left[o * f.wide + r];
    }
    parallel_product({h.data(), f.wide, 1}, tokens, f.r, left_t.data(), f.d_out, f.d_out, y, width);
  }
  return out;
}

// With g [1, T, sum of d_outs]: gx [1, T, d_in] = through (the gradient through the frozen layer) plus the adapter's,
// and the latents' straight-through gradients [size], ordered as the latents are.
void latent_adapter_backward(KernelRuntimeContext& ctx, const Tensor& g, const Tensor& x, const Tensor& latents,
                             int64_t offset, IntList ranks, IntList d_outs, const Tensor& through, Tensor& gx,
                             Tensor& gl) {
  int64_t size;
  ET_KERNEL_CHECK_MSG(ctx, fits(x, latents, offset, ranks, d_outs, &size), InvalidArgument, ,
                      "x, latents and the sizes of the layers do not fit");
  const int64_t tokens = x.size(1), d_in = x.size(2), width = total(d_outs);
  ET_KERNEL_CHECK(ctx, is_rows(g, width) && g.size(1) == tokens, InvalidArgument, );
  ET_KERNEL_CHECK(ctx, is_rows(through, d_in) && through.size(1) == tokens, InvalidArgument, );
  ET_KERNEL_CHECK(ctx, resize(gx, {1, tokens, d_in}) && resize(gl, {size}), InvalidArgument, );
  const float *rows = x.const_data_ptr<float>(), *grads = g.const_data_ptr<float>();
  const float* from = latents.const_data_ptr<float>() + offset;
  float *to_x = gx.mutable_data_ptr<float>(), *to = gl.mutable_data_ptr<float>();
  std::copy_n(through.const_data_ptr<float>(), tokens * d_in, to_x);
  std::fill_n(to, size, 0.0f);
  for (size_t i = 0; i < ranks.size(); ++i) {
    const int64_t length = ranks[i] * (d_in + d_outs[i]);
    if (length > 0) {
      const Factors f(from, ranks[i], d_in, d_outs[i]);
      const std::vector<float> h = inner(f, rows, tokens);
      std::vector<float> gh(tokens * f.wide);
      parallel_product({grads, width, 1}, tokens, f.d_out, f.left.data(), f.wide, f.wide, gh.data(), f.wide);
      parallel_product({gh.data(), f.wide, 1}, tokens, f.r, f.right.data(), d_in, d_in, to_x, d_in);
      parallel_product({gh.data(), 1, f.wide}, f.r, tokens, rows, d_in, d_in, to, d_in);
      std::vector<float> gb_t(f.r * f.d_out);
      parallel_product({h.data(), 1, f.wide}, f.r, tokens, grads, width, f.d_out, gb_t.data(), f.d_out);
      float* gb = to + f.r * d_in;
      for (int64_t r = 0; r < f.r; ++r) {
        for (int64_t o = 0; o < f.d_out; ++o) gb[o * f.r + r] = gb_t[r * f.d_out + o];
      }
    }
    from += length;
    to += length;
    grads += d_outs[i];
  }
}

void latent_adapter_backward_boxed(KernelRuntimeContext& ctx, Span<EValue*> stack) {
  latent_adapter_backward(ctx, stack[0]->toTensor(), stack[1]->toTensor(), stack[2]->toTensor(), stack[3]->toInt(),
                          stack[4]->toIntList(), stack[5]->toIntList(), stack[6]->toTensor(), stack[7]->toTensor(),
                          stack[8]->toTensor());
}

const auto registered = executorch::runtime::register_kernel(
    executorch::runtime::Kernel("lordba::latent_adapter_backward.out", latent_adapter_backward_boxed));

}  // namespace
}  // namespace lordba

EXECUTORCH_LIBRARY(lordba, "latent_adapter.out", lordba::latent_adapter_out);
