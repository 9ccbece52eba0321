// llama::update_cache and llama::custom_sdpa for programs that run without Python: ExecuTorch's wheel holds these ops
// only in a library that needs torch. Never linked into what Python loads, for registering an op twice aborts.
#include <executorch/extension/kernel_util/make_boxed_from_unboxed_functor.h>
#include <executorch/runtime/kernel/kernel_includes.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>

#include "share_out.h"
#include "vector_math.h"

namespace {

using executorch::aten::ScalarType;
using executorch::aten::Tensor;
using executorch::runtime::Error;
using executorch::runtime::KernelRuntimeContext;

// Floats of a vector of the loops: no more than a register holds, for compilers keep wider ones on the stack.
#if defined(__aarch64__)
constexpr int kLanes = 4;
#else
constexpr int kLanes = 8;
#endif
constexpr int kAtOnce = 16 / kLanes;          // vectors in flight per query row, to keep the multipliers busy
constexpr int kRows = 4;                      // query rows of a tile: they share every load of a key or value
constexpr int kBlock = 32;                    // query rows of a block: they share keys and values in the nearest cache
constexpr int kKeys = 64;                     // keys that a block looks at before it goes on to the next ones
constexpr int64_t kWorthSplitting = 1 << 18;  // multiply-adds below which the thread pool costs more than it saves

typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float)), aligned(sizeof(float)), may_alias));

// One attention over the cache. Query head h reads key and value head h / group; rows of all tensors are head_dim long.
struct Attention {
  const float *q, *k, *v;  // q [tokens, heads, dim], k and v [max_len, kv_heads, dim]
  float* y;                // [tokens, heads, dim]
  int64_t heads, kv_heads, dim, tokens, start;
  float scale;

  int64_t group() const { return heads / kv_heads; }
  int64_t rows() const { return tokens * group(); }  // query rows that share one key head
  int64_t blocks() const { return (rows() + kBlock - 1) / kBlock; }
};

// A query row on its way through the keys: y is the sum of the values so far, weighted by exp(score - largest so far).
struct Row {
  const float* q;
  float* y;
  int64_t visible;  // the first so many keys
  float largest, total;
};

LORDBA_INLINE float sum_of(const Lanes& lanes) {
  float parts[kLanes];
  std::memcpy(parts, &lanes, sizeof(parts));
  for (int n = kLanes / 2; n > 0; n /= 2) {
    for (int i = 0; i < n; ++i) parts[i] += parts[i + n];
  }
  return parts[0];
}

// scores[r][j] = q of row r . k[j] for the keys at k, k + stride, ...
template <int R>
LORDBA_INLINE void score(const Row* rows, const float* k, int64_t stride, int keys, int64_t dim,
                         float (*scores)[kKeys]) {
  for (int begin = 0; begin < keys; begin += kAtOnce) {
    const float* at[kAtOnce];
    for (int j = 0; j < kAtOnce; ++j) at[j] = k + std::min(begin + j, keys - 1) * stride;
    Lanes sums[R][kAtOnce] = {};
    int64_t i = 0;
    for (; i + kLanes <= dim; i += kLanes) {
      for (int r = 0; r < R; ++r) {
        const Lanes& x = *reinterpret_cast<const Lanes*>(rows[r].q + i);
        for (int j = 0; j < kAtOnce; ++j) sums[r][j] += x * *reinterpret_cast<const Lanes*>(at[j] + i);
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int j = 0; j < kAtOnce; ++j) {
        float sum = sum_of(sums[r][j]);
        for (int64_t rest = i; rest < dim; ++rest) sum += rows[r].q[rest] * at[j][rest];
        scores[r][begin + j] = sum;
      }
    }
  }
}

// Turns a row's scores into weights exp(scale * score - largest so far), which vanish beyond the `seen` first, and
// brings the row up to date. Returns the factor by which its earlier weights shrink.
LORDBA_INLINE float soften(float* scores, int seen, int keys, float scale, Row& row) {
  const int padded = (keys + kLanes - 1) / kLanes * kLanes;
  std::fill(scores + seen, scores + padded, -std::numeric_limits<float>::infinity());
  Lanes peaks = row.largest - Lanes{};
  for (int j = 0; j < padded; j += kLanes) {
    Lanes& x = *reinterpret_cast<Lanes*>(scores + j);
    x *= scale;
    peaks = x > peaks ? x : peaks;
  }
  float peak = peaks[0];
  for (int i = 1; i < kLanes; ++i) peak = std::max(peak, peaks[i]);
  for (int j = 0; j < padded; ++j) {
    const float distance = scores[j] - peak;  // a NaN must pass through, so it is never compared away
    scores[j] = lordba::exponential(distance < -87.0f ? -87.0f : distance);
  }
  Lanes sums = {};
  for (int j = 0; j < padded; j += kLanes) sums += *reinterpret_cast<const Lanes*>(scores + j);
  const float shrink = lordba::exponential(std::max(row.largest - peak, -87.0f));
  row.total = shrink * row.total + sum_of(sums);
  row.largest = peak;
  return shrink;
}

// y of row r = shrink[r] * y + sum over j of weights[r][j] * v[j], for V vectors of channels at a time from channel i
// on. Returns the first channel that is left.
template <int R, int V>
LORDBA_INLINE int64_t accumulate(const float (*weights)[kKeys], const float* shrink, const float* v, int64_t stride,
                                 int keys, int64_t dim, int64_t i, const Row* rows) {
  for (; i + V * kLanes <= dim; i += V * kLanes) {
    Lanes sums[R][V];
    for (int r = 0; r < R; ++r) {
      for (int p = 0; p < V; ++p) sums[r][p] = shrink[r] * reinterpret_cast<const Lanes*>(rows[r].y + i)[p];
    }
    for (int j = 0; j < keys; ++j) {
      const Lanes* values = reinterpret_cast<const Lanes*>(v + j * stride + i);
      for (int r = 0; r < R; ++r) {
        for (int p = 0; p < V; ++p) sums[r][p] += weights[r][j] * values[p];
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int p = 0; p < V; ++p) reinterpret_cast<Lanes*>(rows[r].y + i)[p] = sums[r][p];
    }
  }
  return i;
}

// Shows the keys from position `begin` on to a tile of R rows, of which the last sees the most.
template <int R>
LORDBA_INLINE void show_keys(const Attention& a, int64_t kv_head, int64_t begin, Row* rows) {
  if (begin >= rows[R - 1].visible) return;
  const int keys = static_cast<int>(std::min<int64_t>(kKeys, rows[R - 1].visible - begin));
  const int64_t stride = a.kv_heads * a.dim, offset = begin * stride + kv_head * a.dim;
  float scores[R][kKeys], shrink[R];
  score<R>(rows, a.k + offset, stride, keys, a.dim, scores);
  for (int r = 0; r < R; ++r) {
    const int seen = static_cast<int>(std::clamp<int64_t>(rows[r].visible - begin, 0, keys));
    shrink[r] = soften(scores[r], seen, keys, a.scale, rows[r]);
  }
  const float* v = a.v + offset;
  int64_t i = accumulate<R, kAtOnce>(scores, shrink, v, stride, keys, a.dim, 0, rows);
  i = accumulate<R, 1>(scores, shrink, v, stride, keys, a.dim, i, rows);
  for (; i < a.dim; ++i) {
    for (int r = 0; r < R; ++r) {
      float sum = shrink[r] * rows[r].y[i];
      for (int j = 0; j < keys; ++j) sum += scores[r][j] * v[j * stride + i];
      rows[r].y[i] = sum;
    }
  }
}

// Rows first, first + 1, ... of one key head, a block of them, by the online softmax (arXiv 1805.02867).
LORDBA_WIDE void attend_block(const Attention& a, int64_t kv_head, int64_t first) {
  Row rows[kBlock] = {};
  const int count = static_cast<int>(std::min<int64_t>(kBlock, a.rows() - first));
  for (int r = 0; r < count; ++r) {
    const int64_t token = (first + r) / a.group(), head = kv_head * a.group() + (first + r) % a.group();
    const int64_t offset = (token * a.heads + head) * a.dim;
    rows[r] = {a.q + offset, a.y + offset, a.start + token + 1, -std::numeric_limits<float>::infinity(), 0.0f};
    std::fill_n(rows[r].y, a.dim, 0.0f);
  }
  for (int64_t begin = 0; begin < rows[count - 1].visible; begin += kKeys) {
    for (int r = 0; r < count; r += kRows) {
      switch (std::min(kRows, count - r)) {
        case 1:
          show_keys<1>(a, kv_head, begin, rows + r);
          break;
        case 2:
          show_keys<2>(a, kv_head, begin, rows + r);
          break;
        case 3:
          show_keys<3>(a, kv_head, begin, rows + r);
          break;
        default:
          show_keys<kRows>(a, kv_head, begin, rows + r);
      }
    }
  }
  for (int r = 0; r < count; ++r) {
    for (int64_t i = 0; i < a.dim; ++i) rows[r].y[i] /= rows[r].total;
  }
}

bool is_float_row(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Float && tensor.dim() == 4 && tensor.size(0) == 1 &&
         executorch::runtime::tensor_is_default_dim_order(tensor);
}

// Attention of query [1, T, heads, dim] over the first start_pos + T entries of the caches [1, max_len, kv_heads, dim].
Tensor& custom_sdpa_out(KernelRuntimeContext& ctx, const Tensor& query, const Tensor& key, const Tensor& value,
                        int64_t start_pos, const std::optional<Tensor>& attn_mask, double dropout_p, bool is_causal,
                        std::optional<double> scale, Tensor& out) {
  ET_KERNEL_CHECK_MSG(ctx, is_causal && !attn_mask && dropout_p == 0, NotSupported, out,
                      "only causal attention without a mask and without dropout is built in");
  for (const Tensor* tensor : {&query, &key, &value, static_cast<const Tensor*>(&out)}) {
    ET_KERNEL_CHECK(ctx, is_float_row(*tensor), InvalidArgument, out);
  }
  const int64_t tokens = query.size(1), heads = query.size(2), dim = query.size(3), kv_heads = key.size(2);
  ET_KERNEL_CHECK(ctx, key.sizes().equals(value.sizes()) && key.size(3) == dim, InvalidArgument, out);
  ET_KERNEL_CHECK(ctx, dim > 0 && kv_heads > 0 && heads % kv_heads == 0, InvalidArgument, out);
  ET_KERNEL_CHECK_MSG(ctx, start_pos >= 0 && start_pos <= key.size(1) - tokens, InvalidArgument, out,
                      "positions %lld to %lld exceed the cache's %lld", static_cast<long long>(start_pos),
                      static_cast<long long>(start_pos + tokens), static_cast<long long>(key.size(1)));
  ET_KERNEL_CHECK(ctx, executorch::runtime::resize_tensor(out, query.sizes()) == Error::Ok, InvalidArgument, out);

  const Attention attention{query.const_data_ptr<float>(),
                            key.const_data_ptr<float>(),
                            value.const_data_ptr<float>(),
                            out.mutable_data_ptr<float>(),
                            heads,
                            kv_heads,
                            dim,
                            tokens,
                            start_pos,
                            static_cast<float>(scale.value_or(1 / std::sqrt(static_cast<double>(dim))))};
  const int64_t blocks = attention.blocks();
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      // Later blocks see more keys: taken from both ends in turn, every thread gets the same share of them.
      const int64_t i = piece % blocks, block = i % 2 == 0 ? i / 2 : blocks - 1 - i / 2;
      attend_block(attention, piece / blocks, block * kBlock);
    }
  };
  lordba::share_out(kv_heads * blocks, tokens * heads * dim * (start_pos + tokens), kWorthSplitting, run);
  return out;
}

// Writes value [1, T, heads, dim] into cache [1, max_len, heads, dim] from position start_pos on; out holds nothing.
Tensor& update_cache_out(KernelRuntimeContext& ctx, const Tensor& value, Tensor& cache, int64_t start_pos,
                         Tensor& out) {
  ET_KERNEL_CHECK(ctx, is_float_row(value) && is_float_row(cache), InvalidArgument, out);
  ET_KERNEL_CHECK(ctx, value.size(2) == cache.size(2) && value.size(3) == cache.size(3), InvalidArgument, out);
  ET_KERNEL_CHECK_MSG(ctx, start_pos >= 0 && start_pos <= cache.size(1) - value.size(1), InvalidArgument, out,
                      "positions %lld to %lld exceed the cache's %lld", static_cast<long long>(start_pos),
                      static_cast<long long>(start_pos + value.size(1)), static_cast<long long>(cache.size(1)));
  const int64_t row = cache.size(2) * cache.size(3);
  std::copy_n(value.const_data_ptr<float>(), value.numel(), cache.mutable_data_ptr<float>() + start_pos * row);
  return out;
}

}  // namespace

EXECUTORCH_LIBRARY(llama, "update_cache.out", update_cache_out);
EXECUTORCH_LIBRARY(llama, "custom_sdpa.out", custom_sdpa_out);
