// lordba::rope_heads for ExecuTorch: takes heads out of a packed row and rotates them, in one pass.
#include <executorch/extension/kernel_util/make_boxed_from_unboxed_functor.h>
#include <executorch/runtime/kernel/kernel_includes.h>

#include <algorithm>

#include "share_out.h"

namespace {

using executorch::aten::ScalarType;
using executorch::aten::SizesType;
using executorch::aten::Tensor;
using executorch::runtime::Error;
using executorch::runtime::KernelRuntimeContext;

constexpr int64_t kWorthSplitting = 1 << 17;  // elements below which waking the thread pool costs more than it saves

// y = x * cos + swap(x) * sin, where swap exchanges the halves of the head.
void rotate_head(const float* __restrict x, const float* __restrict cos, const float* __restrict sin, int64_t half,
                 float* __restrict y) {
  for (int64_t i = 0; i < half; ++i) {
    const float low = x[i], high = x[half + i];
    y[i] = low * cos[i] + high * sin[i];
    y[half + i] = high * cos[half + i] + low * sin[half + i];
  }
}

Tensor& rope_heads_out(KernelRuntimeContext& ctx, const Tensor& x, const Tensor& cos, const Tensor& sin, int64_t start,
                       int64_t first_head, int64_t heads, bool rotate, Tensor& out) {
  for (const Tensor* tensor : {&x, &cos, &sin, static_cast<const Tensor*>(&out)}) {
    ET_KERNEL_CHECK(ctx, tensor->scalar_type() == ScalarType::Float, InvalidArgument, out);
    ET_KERNEL_CHECK(ctx, executorch::runtime::tensor_is_default_dim_order(*tensor), InvalidArgument, out);
  }
  ET_KERNEL_CHECK(ctx, x.dim() == 3 && x.size(0) == 1, InvalidArgument, out);
  ET_KERNEL_CHECK(ctx, cos.dim() == 2 && cos.sizes().equals(sin.sizes()), InvalidArgument, out);
  const int64_t tokens = x.size(1), width = x.size(2), dim = cos.size(1);
  ET_KERNEL_CHECK(ctx, dim > 0 && dim % 2 == 0, InvalidArgument, out);
  ET_KERNEL_CHECK_MSG(ctx, start >= 0 && start <= cos.size(0) - tokens, InvalidArgument, out,
                      "positions %lld to %lld exceed the tables' %lld", static_cast<long long>(start),
                      static_cast<long long>(start + tokens), static_cast<long long>(cos.size(0)));
  ET_KERNEL_CHECK(ctx, heads > 0 && first_head >= 0 && heads <= width / dim && first_head <= width / dim - heads,
                  InvalidArgument, out);
  const SizesType sizes[4] = {1, static_cast<SizesType>(tokens), static_cast<SizesType>(heads),
                              static_cast<SizesType>(dim)};
  ET_KERNEL_CHECK(ctx, executorch::runtime::resize_tensor(out, {sizes, 4}) == Error::Ok, InvalidArgument, out);

  const float* from = x.const_data_ptr<float>() + first_head * dim;
  const float* cos_rows = cos.const_data_ptr<float>() + start * dim;
  const float* sin_rows = sin.const_data_ptr<float>() + start * dim;
  float* to = out.mutable_data_ptr<float>();
  const int64_t row = heads * dim;
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t offset = 0; rotate && offset < row; offset += dim) {
        rotate_head(from + t * width + offset, cos_rows + t * dim, sin_rows + t * dim, dim / 2, to + t * row + offset);
      }
      if (!rotate) std::copy_n(from + t * width, row, to + t * row);
    }
  };
  lordba::share_out(tokens, tokens * row, kWorthSplitting, run);
  return out;
}

}  // namespace

EXECUTORCH_LIBRARY(lordba, "rope_heads.out", rope_heads_out);
