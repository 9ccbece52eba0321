// How the ops' loops are shared out over the runtime's thread pool.
#pragma once

#include <executorch/runtime/kernel/thread_parallel_interface.h>

#include <algorithm>
#include <cstdint>

namespace lordba {

// run(begin, end) over all of [0, count). `work` is that of the whole range; below `worth_waking` of it everything
// stays on this thread, for waking the pool would cost more than it saves. No part is smaller than a quarter of that.
template <typename Run>
void share_out(int64_t count, int64_t work, int64_t worth_waking, const Run& run) {
  if (work < worth_waking) {
    run(0, count);
  } else {
    const int64_t smallest = worth_waking / 4 * count / work;
    executorch::extension::parallel_for(0, count, std::max<int64_t>(1, smallest), run);
  }
}

}  // namespace lordba
