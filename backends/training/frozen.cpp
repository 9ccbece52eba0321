#include "frozen.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "../executorch/vector_math.h"
#include "products.h"

namespace lordba {
namespace {

using executorch::aten::ScalarType;

constexpr int64_t kHalf = kGroup / 2;
constexpr int64_t kDepth = 512;       // rows of W that a panel of the backward product holds
constexpr int64_t kColumns = kGroup;  // columns of it: two panels, for one int4 group

bool is_dense(const Tensor& tensor, ScalarType type) {
  return tensor.scalar_type() == type && executorch::runtime::tensor_is_default_dim_order(tensor);
}

LORDBA_INLINE float from_bfloat16(uint16_t bits) {
  const uint32_t word = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &word, sizeof(value));
  return value;
}

// The 32 values of one int4 group.
LORDBA_INLINE void decode_group(const uint8_t* codes, float scale, float offset, float* out) {
  const float low = offset - 8.0f * scale;
  for (int64_t i = 0; i < kHalf; ++i) out[i] = static_cast<float>(codes[i] & 15) * scale + low;
  for (int64_t i = 0; i < kHalf; ++i) out[kHalf + i] = static_cast<float>(codes[i] >> 4) * scale + low;
}

// begin and count are multiples of 32 for int4.
LORDBA_INLINE void decode_row(const Frozen& w, int64_t row, int64_t begin, int64_t count, float* out) {
  switch (w.kind) {
    case Frozen::kFloat:
      std::memcpy(out, static_cast<const float*>(w.codes) + row * w.k + begin, count * sizeof(float));
      return;
    case Frozen::kInt8: {
      const int8_t* codes = static_cast<const int8_t*>(w.codes) + row * w.k;
      const float* scales = static_cast<const float*>(w.scales) + row * w.groups;
      const int64_t width = w.k / w.groups;
      for (int64_t i = begin; i < begin + count;) {
        const int64_t end = std::min(begin + count, (i / width + 1) * width);
        const float scale = scales[i / width];
        for (; i < end; ++i) out[i - begin] = static_cast<float>(codes[i]) * scale;
      }
      return;
    }
    case Frozen::kInt4: {
      const uint8_t* codes = static_cast<const uint8_t*>(w.codes) + row * (w.k / 2);
      const uint16_t* scales = static_cast<const uint16_t*>(w.scales) + row * w.groups;
      const float* offsets = w.offsets + row * w.groups;
      for (int64_t group = begin / kGroup; group < (begin + count) / kGroup; ++group) {
        decode_group(codes + group * kHalf, from_bfloat16(scales[group]), offsets[group], out + group * kGroup - begin);
      }
    }
  }
}

// Rows first .. first + 15 of W as columns: panel [k][16], zeros past the last row.
LORDBA_WIDE void pack_rows(const Frozen& w, int64_t first, float* panel, float* rows) {
  const int64_t count = std::min(kPanel, w.n - first);
  for (int64_t r = 0; r < count; ++r) decode_row(w, first + r, 0, w.k, rows + r * w.k);
  for (int64_t j = 0; j < w.k; ++j) {
    for (int64_t r = 0; r < kPanel; ++r) panel[j * kPanel + r] = r < count ? rows[r * w.k + j] : 0.0f;
  }
}

// Columns first .. first + count (at most 32) of `depth` rows of W from row `row` on: two panels [depth][16].
LORDBA_WIDE void pack_columns(const Frozen& w, int64_t row, int64_t depth, int64_t first, int64_t count,
                              float* panels) {
  float values[kColumns] = {};
  for (int64_t j = 0; j < depth; ++j) {
    decode_row(w, row + j, first, count, values);
    std::memcpy(panels + j * kPanel, values, sizeof(float) * kPanel);
    std::memcpy(panels + (depth + j) * kPanel, values + kPanel, sizeof(float) * kPanel);
  }
}

}  // namespace

std::optional<Frozen> frozen_of(const Tensor& codes, const std::optional<Tensor>& scales,
                                const std::optional<Tensor>& offsets) {
  if (codes.dim() != 2 || codes.numel() == 0) return std::nullopt;
  Frozen w;
  w.codes = codes.const_data_ptr();
  w.n = codes.size(0);
  w.k = codes.size(1);
  if (is_dense(codes, ScalarType::Float)) {
    return scales || offsets ? std::nullopt : std::optional<Frozen>(w);
  }
  if (!scales || scales->dim() != 2 || scales->size(0) != w.n || scales->size(1) == 0) return std::nullopt;
  w.scales = scales->const_data_ptr();
  w.groups = scales->size(1);
  if (is_dense(codes, ScalarType::Char)) {
    w.kind = Frozen::kInt8;
    return is_dense(*scales, ScalarType::Float) && !offsets && w.k % w.groups == 0 ? std::optional<Frozen>(w)
                                                                                   : std::nullopt;
  }
  w.kind = Frozen::kInt4;
  w.k *= 2;
  if (!is_dense(codes, ScalarType::Byte) || !is_dense(*scales, ScalarType::BFloat16) || !offsets ||
      !is_dense(*offsets, ScalarType::Float) || !offsets->sizes().equals(scales->sizes()) || w.groups * kGroup != w.k) {
    return std::nullopt;
  }
  w.offsets = offsets->const_data_ptr<float>();
  return w;
}

void decode(const Frozen& w, int64_t row, int64_t begin, int64_t count, float* out) {
  decode_row(w, row, begin, count, out);
}

void multiply(const Frozen& w, const float* x, int64_t rows, float* y, int64_t y_row) {
  split((w.n + kPanel - 1) / kPanel, rows * w.n * w.k, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> panel(new float[2 * w.k * kPanel]);
    std::vector<float> sums;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * kPanel, count = std::min(kPanel, w.n - first);
      pack_rows(w, first, panel.get(), panel.get() + w.k * kPanel);
      if (count == kPanel) {
        panel_product({x, w.k, 1}, rows, w.k, panel.get(), kPanel, y + first, y_row);
        continue;
      }
      sums.assign(rows * kPanel, 0.0f);
      panel_product({x, w.k, 1}, rows, w.k, panel.get(), kPanel, sums.data(), kPanel);
      for (int64_t m = 0; m < rows; ++m) {
        for (int64_t r = 0; r < count; ++r) y[m * y_row + first + r] += sums[m * kPanel + r];
      }
    }
  });
}

void multiply_back(const Frozen& w, const float* g, int64_t g_row, int64_t rows, float* gx) {
  split((w.k + kColumns - 1) / kColumns, rows * w.n * w.k, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> panels(new float[kDepth * kColumns]);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * kColumns, count = std::min(kColumns, w.k - first);
      for (int64_t row = 0; row < w.n; row += kDepth) {
        const int64_t depth = std::min(kDepth, w.n - row);
        pack_columns(w, row, depth, first, count, panels.get());
        for (int64_t part = 0; part * kPanel < count; ++part) {
          product({g + row, g_row, 1}, rows, depth, panels.get() + part * depth * kPanel, kPanel,
                  std::min(kPanel, count - part * kPanel), gx + first + part * kPanel, w.k);
        }
      }
    }
  });
}

}  // namespace lordba
