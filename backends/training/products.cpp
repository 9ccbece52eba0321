#include "products.h"

#include <algorithm>
#include <vector>

#include "../executorch/vector_math.h"

namespace lordba {
namespace {

// Floats of a vector: no more than a register holds, for compilers keep wider ones on the stack.
#if defined(__aarch64__)
constexpr int kLanes = 4;
#else
constexpr int kLanes = 8;
#endif
constexpr int kVectors = kPanel / kLanes;
constexpr int kTile = 6;  // rows: 6 x 16 sums leave registers for a panel's row and one factor on AVX2 and on NEON

typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float)), aligned(sizeof(float)), may_alias));

template <int R>
LORDBA_INLINE void tile(const Left& a, int64_t depth, const float* p, int64_t stride, float* c, int64_t c_row) {
  Lanes sums[R][kVectors];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < kVectors; ++v) sums[r][v] = reinterpret_cast<const Lanes*>(c + r * c_row)[v];
  }
  const float* left = a.data;
  for (int64_t j = 0; j < depth; ++j, left += a.step, p += stride) {
    const Lanes* values = reinterpret_cast<const Lanes*>(p);
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < kVectors; ++v) sums[r][v] += left[r * a.row] * values[v];
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < kVectors; ++v) reinterpret_cast<Lanes*>(c + r * c_row)[v] = sums[r][v];
  }
}

LORDBA_WIDE void tiles(const Left& a, int64_t rows, int64_t depth, const float* p, int64_t stride, float* c,
                       int64_t c_row) {
  int64_t m = 0;
  for (; m + kTile <= rows; m += kTile) {
    tile<kTile>({a.data + m * a.row, a.row, a.step}, depth, p, stride, c + m * c_row, c_row);
  }
  for (; m < rows; ++m) tile<1>({a.data + m * a.row, a.row, a.step}, depth, p, stride, c + m * c_row, c_row);
}

}  // namespace

void panel_product(const Left& a, int64_t rows, int64_t depth, const float* p, int64_t stride, float* c,
                   int64_t c_row) {
  tiles(a, rows, depth, p, stride, c, c_row);
}

void product(const Left& a, int64_t rows, int64_t depth, const float* p, int64_t stride, int64_t columns, float* c,
             int64_t c_row) {
  int64_t first = 0;
  for (; first + kPanel <= columns; first += kPanel) tiles(a, rows, depth, p + first, stride, c + first, c_row);
  if (first == columns) return;
  const int64_t left = columns - first;  // the last columns, in panels of their own
  std::vector<float> panel(depth * kPanel), sums(rows * kPanel);
  for (int64_t j = 0; j < depth; ++j) std::copy_n(p + j * stride + first, left, panel.data() + j * kPanel);
  tiles(a, rows, depth, panel.data(), kPanel, sums.data(), kPanel);
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t i = 0; i < left; ++i) c[m * c_row + first + i] += sums[m * kPanel + i];
  }
}

}  // namespace lordba
