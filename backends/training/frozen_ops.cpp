// Ops of frozen weights in training: rows of an embedding, a linear layer with its backward pass g W, and the loss.
#include <executorch/extension/kernel_util/make_boxed_from_unboxed_functor.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "../executorch/vector_math.h"
#include "frozen.h"
#include "products.h"
#include "tensors.h"

namespace lordba {
namespace {

using Optional = std::optional<Tensor>;

constexpr int64_t kTokens = 64;     // whose logits exist at once
constexpr int64_t kIgnored = -100;  // the target of a token that is not learned

// Rows of a weight [n, k] by tokens int64 [1, T]: [1, T, k].
Tensor& frozen_rows_out(KernelRuntimeContext& ctx, const Tensor& tokens, const Tensor& codes, const Optional& scales,
                        Tensor& out) {
  const auto w = frozen_of(codes, scales, std::nullopt);
  ET_KERNEL_CHECK_MSG(ctx, w && w->kind != Frozen::kInt4, InvalidArgument, out, "weight and scales do not fit");
  ET_KERNEL_CHECK(ctx, tokens.scalar_type() == ScalarType::Long && tokens.dim() == 2 && tokens.size(0) == 1,
                  InvalidArgument, out);
  const int64_t count = tokens.size(1);
  ET_KERNEL_CHECK(ctx, resize(out, {1, count, w->k}), InvalidArgument, out);
  const int64_t* ids = tokens.const_data_ptr<int64_t>();
  for (int64_t t = 0; t < count; ++t) {
    ET_KERNEL_CHECK_MSG(ctx, ids[t] >= 0 && ids[t] < w->n, InvalidArgument, out, "token %lld is not one of %lld",
                        static_cast<long long>(ids[t]), static_cast<long long>(w->n));
    decode(*w, ids[t], 0, w->k, out.mutable_data_ptr<float>() + t * w->k);
  }
  return out;
}

// y = x W^T (+ bias) (+ residual), x [1, T, k], y [1, T, n].
Tensor& frozen_linear_out(KernelRuntimeContext& ctx, const Tensor& x, const Tensor& codes, const Optional& scales,
                          const Optional& offsets, const Optional& bias, const Optional& residual, Tensor& out) {
  const auto w = frozen_of(codes, scales, offsets);
  ET_KERNEL_CHECK_MSG(ctx, w, InvalidArgument, out, "codes, scales and offsets do not fit each other");
  ET_KERNEL_CHECK_MSG(ctx, is_rows(x, w->k), InvalidArgument, out, "x must be float32 [1, T, %lld]",
                      static_cast<long long>(w->k));
  const int64_t tokens = x.size(1);
  ET_KERNEL_CHECK(ctx, resize(out, {1, tokens, w->n}), InvalidArgument, out);
  ET_KERNEL_CHECK(ctx, !bias || is_vector(*bias, w->n), InvalidArgument, out);
  ET_KERNEL_CHECK(ctx, !residual || residual->sizes().equals(out.sizes()), InvalidArgument, out);
  float* y = out.mutable_data_ptr<float>();
  if (residual) {
    std::copy_n(residual->const_data_ptr<float>(), tokens * w->n, y);
  } else {
    std::fill_n(y, tokens * w->n, 0.0f);
  }
  for (int64_t i = 0; bias && i < tokens * w->n; ++i) y[i] += bias->const_data_ptr<float>()[i % w->n];
  multiply(*w, x.const_data_ptr<float>(), tokens, y, w->n);
  return out;
}

// gx = g W, g [1, T, n], gx [1, T, k].
Tensor& frozen_linear_backward_out(KernelRuntimeContext& ctx, const Tensor& g, const Tensor& codes,
                                   const Optional& scales, const Optional& offsets, Tensor& out) {
  const auto w = frozen_of(codes, scales, offsets);
  ET_KERNEL_CHECK_MSG(ctx, w, InvalidArgument, out, "codes, scales and offsets do not fit each other");
  ET_KERNEL_CHECK_MSG(ctx, is_rows(g, w->n), InvalidArgument, out, "g must be float32 [1, T, %lld]",
                      static_cast<long long>(w->n));
  ET_KERNEL_CHECK(ctx, resize(out, {1, g.size(1), w->k}), InvalidArgument, out);
  std::fill_n(out.mutable_data_ptr<float>(), out.numel(), 0.0f);
  multiply_back(*w, g.const_data_ptr<float>(), w->n, g.size(1), out.mutable_data_ptr<float>());
  return out;
}

// logits [n] -> weight * (softmax - one-hot of target), in place; returns weight * cross-entropy.
LORDBA_WIDE float soften(float* __restrict logits, int64_t n, int64_t target, float weight) {
  float peak = logits[0];
  for (int64_t i = 1; i < n; ++i) peak = logits[i] > peak ? logits[i] : peak;
  const float wanted = logits[target] - peak;
  for (int64_t i = 0; i < n; ++i) {
    const float distance = logits[i] - peak;  // a NaN must pass through, so it is never compared away
    logits[i] = exponential(distance < -87.0f ? -87.0f : distance);
  }
  double total = 0.0;  // of parts, or the last of a hundred thousand small ones would be lost
  for (int64_t i = 0; i < n;) {
    float part = 0.0f;
    for (const int64_t end = std::min(n, i + 256); i < end; ++i) part += logits[i];
    total += part;
  }
  const float share = weight / static_cast<float>(total);
  for (int64_t i = 0; i < n; ++i) logits[i] *= share;
  logits[target] -= weight;
  return weight * (static_cast<float>(std::log(total)) - wanted);
}

// Cross-entropy of the logits x W^T (+ bias): loss [1], the sum over learned tokens times weight [1], and its gradient
// gx [1, T, k]. targets int64 [1, T]; those of -100 are not learned, and cost nothing.
void head_loss(KernelRuntimeContext& ctx, const Tensor& x, const Tensor& codes, const Optional& scales,
               const Optional& bias, const Tensor& targets, const Tensor& weight, Tensor& loss, Tensor& gx) {
  const auto w = frozen_of(codes, scales, std::nullopt);
  ET_KERNEL_CHECK_MSG(ctx, w && is_rows(x, w->k), InvalidArgument, , "x and the head's weight do not fit");
  const int64_t tokens = x.size(1);
  ET_KERNEL_CHECK(ctx, targets.scalar_type() == ScalarType::Long && targets.numel() == tokens, InvalidArgument, );
  ET_KERNEL_CHECK(ctx, is_vector(weight, 1) && (!bias || is_vector(*bias, w->n)), InvalidArgument, );
  ET_KERNEL_CHECK(ctx, resize(loss, {1}) && resize(gx, {1, tokens, w->k}), InvalidArgument, );
  std::vector<int64_t> learned;
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t target = targets.const_data_ptr<int64_t>()[t];
    ET_KERNEL_CHECK_MSG(ctx, target == kIgnored || (target >= 0 && target < w->n), InvalidArgument, ,
                        "target %lld is neither -100 nor one of %lld tokens", static_cast<long long>(target),
                        static_cast<long long>(w->n));
    if (target != kIgnored) learned.push_back(t);
  }
  const float* from = x.const_data_ptr<float>();
  float* to = gx.mutable_data_ptr<float>();
  std::fill_n(to, tokens * w->k, 0.0f);
  const auto count = static_cast<int64_t>(learned.size());
  std::vector<float> rows(std::min(count, kTokens) * w->k), logits(std::min(count, kTokens) * w->n), losses(count);
  for (int64_t first = 0; first < count; first += kTokens) {
    const int64_t some = std::min(kTokens, count - first);
    for (int64_t i = 0; i < some; ++i) std::copy_n(from + learned[first + i] * w->k, w->k, &rows[i * w->k]);
    for (int64_t i = 0; i < some; ++i) {
      if (bias) {
        std::copy_n(bias->const_data_ptr<float>(), w->n, &logits[i * w->n]);
      } else {
        std::fill_n(&logits[i * w->n], w->n, 0.0f);
      }
    }
    multiply(*w, rows.data(), some, logits.data(), w->n);
    split(some, some * w->n * 8, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        losses[first + i] = soften(&logits[i * w->n], w->n, targets.const_data_ptr<int64_t>()[learned[first + i]],
                                   weight.const_data_ptr<float>()[0]);
      }
    });
    std::fill(rows.begin(), rows.end(), 0.0f);
    multiply_back(*w, logits.data(), w->n, some, rows.data());
    for (int64_t i = 0; i < some; ++i) std::copy_n(&rows[i * w->k], w->k, to + learned[first + i] * w->k);
  }
  double total = 0.0;
  for (const float one : losses) total += one;
  loss.mutable_data_ptr<float>()[0] = static_cast<float>(total);
}

// An op of two outputs, which ExecuTorch's own boxing does not take.
void head_loss_boxed(KernelRuntimeContext& ctx, Span<EValue*> stack) {
  head_loss(ctx, stack[0]->toTensor(), stack[1]->toTensor(), stack[2]->toOptional<Tensor>(),
            stack[3]->toOptional<Tensor>(), stack[4]->toTensor(), stack[5]->toTensor(), stack[6]->toTensor(),
            stack[7]->toTensor());
}

const auto registered =
    executorch::runtime::register_kernel(executorch::runtime::Kernel("lordba::head_loss.out", head_loss_boxed));

}  // namespace
}  // namespace lordba

EXECUTORCH_LIBRARY(lordba, "frozen_rows.out", lordba::frozen_rows_out);
EXECUTORCH_LIBRARY(lordba, "frozen_linear.out", lordba::frozen_linear_out);
EXECUTORCH_LIBRARY(lordba, "frozen_linear_backward.out", lordba::frozen_linear_backward_out);
