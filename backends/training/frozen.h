// A frozen weight [n, k] as floats, int8 codes or int4 codes, and the two products of training with it.
#pragma once

#include <executorch/runtime/kernel/kernel_includes.h>

#include <cstdint>
#include <optional>

namespace lordba {

using executorch::aten::Tensor;

constexpr int64_t kGroup = 32;  // inputs that share an int4 scale

// Float [n, k]; int8 codes [n, k] with float scales [n, groups], groups a divisor of k; or int4 codes, 16 bytes for
// each group of 32, byte i holding code i (low) and 16 + i (high), with bfloat16 scales and float offsets [n, k / 32]:
// w = scale * (code - 8) + offset.
struct Frozen {
  const void* codes = nullptr;
  const void* scales = nullptr;
  const float* offsets = nullptr;
  int64_t n = 0, k = 0, groups = 1;
  enum Kind { kFloat, kInt8, kInt4 } kind = kFloat;
};

// The weight that these tensors of a program hold; nullopt if they do not fit each other.
std::optional<Frozen> frozen_of(const Tensor& codes, const std::optional<Tensor>& scales,
                                const std::optional<Tensor>& offsets);

// out[0..count) = w[row][begin..begin + count).
void decode(const Frozen& w, int64_t row, int64_t begin, int64_t count, float* out);

// y [rows, n] += x [rows, k] W^T, and gx [rows, k] += g [rows, n] W, both on the runtime's pool; rows of y are y_row
// apart, rows of g are g_row apart.
void multiply(const Frozen& w, const float* x, int64_t rows, float* y, int64_t y_row);
void multiply_back(const Frozen& w, const float* g, int64_t g_row, int64_t rows, float* gx);

}  // namespace lordba
