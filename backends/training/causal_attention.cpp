// Causal attention over packed rows q | k | v, rotary embedding and head norms included; its backward pass keeps
// nothing but the rows and computes the rest again.
#include <executorch/extension/kernel_util/make_boxed_from_unboxed_functor.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "../executorch/vector_math.h"
#include "products.h"
#include "tensors.h"

namespace lordba {
namespace {

using Optional = std::optional<Tensor>;

struct Attention {
  const float *rows, *cos, *sin, *q_norm, *k_norm;  // rows [T, (heads + 2 kv_heads) dim], tables [max_len, dim]
  int64_t tokens, heads, kv_heads, dim;
  float scale;
  double eps;

  int64_t width() const { return (heads + 2 * kv_heads) * dim; }
  int64_t group() const { return heads / kv_heads; }
  const float* norm_of(int64_t head) const { return head < heads ? q_norm : k_norm; }
};

// 1 / sqrt(mean(x^2) + eps).
double inverse_rms(const float* x, int64_t dim, double eps) {
  double squares = 0.0;
  for (int64_t i = 0; i < dim; ++i) squares += x[i] * x[i];
  return 1 / std::sqrt(squares / dim + eps);
}

// Query or key head `head` of all tokens, normed and rotated: out [T, dim]. The first half of sin is negated.
void rotated(const Attention& a, int64_t head, float* out) {
  const int64_t half = a.dim / 2;
  const float* norm = a.norm_of(head);
  std::vector<float> x(a.dim);
  for (int64_t t = 0; t < a.tokens; ++t, out += a.dim) {
    const float* from = a.rows + t * a.width() + head * a.dim;
    std::copy_n(from, a.dim, x.data());
    if (norm) {
      const float r = static_cast<float>(inverse_rms(from, a.dim, a.eps));
      for (int64_t i = 0; i < a.dim; ++i) x[i] = norm[i] * (x[i] * r);
    }
    const float *cos = a.cos + t * a.dim, *sin = a.sin + t * a.dim;
    for (int64_t i = 0; i < half; ++i) {
      out[i] = x[i] * cos[i] + x[half + i] * sin[i];
      out[half + i] = x[half + i] * cos[half + i] + x[i] * sin[half + i];
    }
  }
}

// The gradient of `rotated`: g [T, dim] to the head's columns of `to`, rows like a.rows.
void rotated_backward(const Attention& a, int64_t head, const float* g, float* to) {
  const int64_t half = a.dim / 2;
  const float* norm = a.norm_of(head);
  for (int64_t t = 0; t < a.tokens; ++t, g += a.dim) {
    float* out = to + t * a.width() + head * a.dim;
    const float *cos = a.cos + t * a.dim, *sin = a.sin + t * a.dim;
    for (int64_t i = 0; i < half; ++i) {
      out[i] = g[i] * cos[i] + g[half + i] * sin[half + i];
      out[half + i] = g[half + i] * cos[half + i] + g[i] * sin[i];
    }
    if (!norm) continue;
    const float* x = a.rows + t * a.width() + head * a.dim;
    const double r = inverse_rms(x, a.dim, a.eps);
    double along = 0.0;
    for (int64_t i = 0; i < a.dim; ++i) along += norm[i] * out[i] * x[i];
    const float scale = static_cast<float>(r), pull = static_cast<float>(r * r * r * along / a.dim);
    for (int64_t i = 0; i < a.dim; ++i) out[i] = scale * norm[i] * out[i] - pull * x[i];
  }
}

void transpose(const float* from, int64_t rows, int64_t columns, int64_t stride, float* to) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) to[j * rows + i] = from[i * stride + j];
  }
}

// scores[t][0..T) -> weights of the keys up to t, zero beyond.
LORDBA_WIDE void soften(float* scores, int64_t tokens, float scale) {
  for (int64_t t = 0; t < tokens; ++t) {
    float* row = scores + t * tokens;
    float peak = row[0], total = 0.0f;
    for (int64_t j = 1; j <= t; ++j) peak = row[j] > peak ? row[j] : peak;
    for (int64_t j = 0; j <= t; ++j) {
      const float distance = scale * (row[j] - peak);
      row[j] = exponential(distance < -87.0f ? -87.0f : distance);
    }
    for (int64_t j = 0; j <= t; ++j) total += row[j];
    const float share = 1.0f / total;
    for (int64_t j = 0; j <= t; ++j) row[j] *= share;
    for (int64_t j = t + 1; j < tokens; ++j) row[j] = 0.0f;
  }
}

// Attention weights [T, T] of rotated queries [T, dim] and transposed rotated keys [dim, T].
void weigh(const Attention& a, const float* q, const float* k_t, std::vector<float>& weights) {
  weights.assign(a.tokens * a.tokens, 0.0f);
  product({q, a.dim, 1}, a.tokens, a.dim, k_t, a.tokens, a.tokens, weights.data(), a.tokens);
  soften(weights.data(), a.tokens, a.scale);
}

// The heads that share one key head; y [T, heads dim].
void attend(const Attention& a, int64_t kv_head, float* y) {
  const int64_t n = a.tokens, dim = a.dim;
  std::vector<float> k(n * dim), k_t(n * dim), q(n * dim), weights;
  rotated(a, a.heads + kv_head, k.data());
  transpose(k.data(), n, dim, dim, k_t.data());
  const float* v = a.rows + (a.heads + a.kv_heads + kv_head) * dim;
  for (int64_t head = kv_head * a.group(); head < (kv_head + 1) * a.group(); ++head) {
    rotated(a, head, q.data());
    weigh(a, q.data(), k_t.data(), weights);
    product({weights.data(), n, 1}, n, n, v, a.width(), dim, y + head * dim, a.heads * dim);
  }
}

// Gradients of the same heads: g [T, heads dim], to rows like a.rows, where the key and value head is theirs alone.
void attend_backward(const Attention& a, int64_t kv_head, const float* g, float* to) {
  const int64_t n = a.tokens, dim = a.dim, width = a.width(), g_row = a.heads * dim;
  std::vector<float> k(n * dim), k_t(n * dim), v_t(n * dim), q(n * dim), gq(n * dim), gk(n * dim), weights, gs(n * n);
  rotated(a, a.heads + kv_head, k.data());
  transpose(k.data(), n, dim, dim, k_t.data());
  const int64_t v_column = (a.heads + a.kv_heads + kv_head) * dim;
  transpose(a.rows + v_column, n, dim, width, v_t.data());
  for (int64_t head = kv_head * a.group(); head < (kv_head + 1) * a.group(); ++head) {
    rotated(a, head, q.data());
    weigh(a, q.data(), k_t.data(), weights);
    product({weights.data(), 1, n}, n, n, g + head * dim, g_row, dim, to + v_column, width);
    std::fill(gs.begin(), gs.end(), 0.0f);
    product({g + head * dim, g_row, 1}, n, dim, v_t.data(), n, n, gs.data(), n);
    for (int64_t t = 0; t < n; ++t) {
      float *row = gs.data() + t * n, *w = weights.data() + t * n, sum = 0.0f;
      for (int64_t j = 0; j <= t; ++j) sum += row[j] * w[j];
      for (int64_t j = 0; j < n; ++j) row[j] = a.scale * w[j] * (row[j] - sum);
    }
    std::fill(gq.begin(), gq.end(), 0.0f);
    product({gs.data(), n, 1}, n, n, k.data(), dim, dim, gq.data(), dim);
    product({gs.data(), 1, n}, n, n, q.data(), dim, dim, gk.data(), dim);
    rotated_backward(a, head, gq.data(), to);
  }
  rotated_backward(a, a.heads + kv_head, gk.data(), to);
}

std::optional<Attention> attention_of(const Tensor& x, const Tensor& cos, const Tensor& sin, const Optional& q_norm,
                                      const Optional& k_norm, int64_t heads, int64_t kv_heads, double scale,
                                      double eps) {
  if (!is_float(cos) || !is_float(sin) || cos.dim() != 2 || !cos.sizes().equals(sin.sizes())) return std::nullopt;
  const int64_t dim = cos.size(1);
  if (dim % 2 || kv_heads < 1 || heads < 1 || heads % kv_heads) return std::nullopt;
  if (!is_rows(x, (heads + 2 * kv_heads) * dim) || x.size(1) > cos.size(0)) return std::nullopt;
  if ((q_norm && !is_vector(*q_norm, dim)) || (k_norm && !is_vector(*k_norm, dim))) return std::nullopt;
  return Attention{x.const_data_ptr<float>(),
                   cos.const_data_ptr<float>(),
                   sin.const_data_ptr<float>(),
                   q_norm ? q_norm->const_data_ptr<float>() : nullptr,
                   k_norm ? k_norm->const_data_ptr<float>() : nullptr,
                   x.size(1),
                   heads,
                   kv_heads,
                   dim,
                   static_cast<float>(scale),
                   eps};
}

// Rows q | k | v [1, T, (heads + 2 kv_heads) dim] -> [1, T, heads dim], from position 0 on.
Tensor& causal_attention_out(KernelRuntimeContext& ctx, const Tensor& x, const Tensor& cos, const Tensor& sin,
                             const Optional& q_norm, const Optional& k_norm, int64_t heads, int64_t kv_heads,
                             double scale, double eps, Tensor& out) {
  const auto a = attention_of(x, cos, sin, q_norm, k_norm, heads, kv_heads, scale, eps);
  ET_KERNEL_CHECK_MSG(ctx, a, InvalidArgument, out, "rows, tables and heads do not fit, or more tokens than positions");
  ET_KERNEL_CHECK(ctx, resize(out, {1, a->tokens, heads * a->dim}), InvalidArgument, out);
  float* y = out.mutable_data_ptr<float>();
  std::fill_n(y, out.numel(), 0.0f);
  split(kv_heads, 2 * heads * a->tokens * a->tokens * a->dim, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) attend(*a, i, y);
  });
  return out;
}

Tensor& causal_attention_backward_out(KernelRuntimeContext& ctx, const Tensor& g, const Tensor& x, const Tensor& cos,
                                      const Tensor& sin, const Optional& q_norm, const Optional& k_norm, int64_t heads,
                                      int64_t kv_heads, double scale, double eps, Tensor& out) {
  const auto a = attention_of(x, cos, sin, q_norm, k_norm, heads, kv_heads, scale, eps);
  ET_KERNEL_CHECK_MSG(ctx, a, InvalidArgument, out, "rows, tables and heads do not fit, or more tokens than positions");
  ET_KERNEL_CHECK(ctx, is_rows(g, heads * a->dim) && g.size(1) == a->tokens, InvalidArgument, out);
  ET_KERNEL_CHECK(ctx, resize(out, {1, a->tokens, a->width()}), InvalidArgument, out);
  float* to = out.mutable_data_ptr<float>();
  std::fill_n(to, out.numel(), 0.0f);
  split(kv_heads, 5 * heads * a->tokens * a->tokens * a->dim, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) attend_backward(*a, i, g.const_data_ptr<float>(), to);
  });
  return out;
}

}  // namespace
}  // namespace lordba

EXECUTORCH_LIBRARY(lordba, "causal_attention.out", lordba::causal_attention_out);
EXECUTORCH_LIBRARY(lordba, "causal_attention_backward.out", lordba::causal_attention_backward_out);
