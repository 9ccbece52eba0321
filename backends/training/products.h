// Float matrix products of training, cut into panels of 16 columns: a panel may be a frozen weight, just decoded.
#pragma once

#include <executorch/runtime/kernel/thread_parallel_interface.h>

#include <cstdint>

namespace lordba {

constexpr int64_t kPanel = 16;                // columns of a panel
constexpr int64_t kWorthSplitting = 1 << 19;  // multiply-adds below which waking the pool costs more than it saves

// The left factor: element (m, j) is data[m * row + j * step], so that a transposed matrix needs no copy.
struct Left {
  const float* data;
  int64_t row, step;
};

// c[m][0..15] += sum over j < depth of a(m, j) * p[j * stride + 0..15], for m < rows; rows of c are c_row apart.
void panel_product(const Left& a, int64_t rows, int64_t depth, const float* p, int64_t stride, float* c, int64_t c_row);

// The same for any number of columns, on the calling thread.
void product(const Left& a, int64_t rows, int64_t depth, const float* p, int64_t stride, int64_t columns, float* c,
             int64_t c_row);

// run(begin, end) for ranges that cover all tasks, on the runtime's pool if so many multiply-adds are worth it.
template <typename Run>
void split(int64_t tasks, int64_t work, const Run& run) {
  if (work < kWorthSplitting || tasks < 2) {
    run(0, tasks);
  } else {
    executorch::extension::parallel_for(0, tasks, 1, run);
  }
}

// `product` on the runtime's pool.
inline void parallel_product(const Left& a, int64_t rows, int64_t depth, const float* p, int64_t stride,
                             int64_t columns, float* c, int64_t c_row) {
  split((columns + kPanel - 1) / kPanel, rows * depth * columns, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kPanel, last = end * kPanel < columns ? end * kPanel : columns;
    product(a, rows, depth, p + first, stride, last - first, c + first, c_row);
  });
}

}  // namespace lordba
