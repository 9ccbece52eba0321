// The most memory that this process holds while something runs.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>

namespace lordba {

// Bytes of this process in RAM now, shared pages of mapped files included.
int64_t resident_bytes();

// Looks at the process every millisecond, from its making to `stop`. Apps may not reset the kernel's own high-water
// mark (VmHWM), which would need no looking.
class PeakMemory {
 public:
  PeakMemory();
  ~PeakMemory();
  PeakMemory(const PeakMemory&) = delete;
  PeakMemory& operator=(const PeakMemory&) = delete;

  // Ends the watch; the most bytes seen.
  int64_t stop();

 private:
  void look();

  std::atomic<bool> stopping_{false};
  std::atomic<int64_t> peak_{0};
  std::thread thread_;
};

}  // namespace lordba
