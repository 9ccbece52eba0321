#include "peak_memory.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cinttypes>
#include <cstdio>
#include <stdexcept>

namespace lordba {

int64_t resident_bytes() {
  int64_t pages = -1;
  if (std::FILE* file = std::fopen("/proc/self/statm", "re")) {
    if (std::fscanf(file, "%*d %" SCNd64, &pages) != 1) pages = -1;
    std::fclose(file);
  }
  if (pages < 0) throw std::runtime_error("/proc/self/statm: cannot be read; this system does not tell memory");
  return pages * sysconf(_SC_PAGESIZE);
}

PeakMemory::PeakMemory() : peak_(resident_bytes()) {
  thread_ = std::thread([this] {
    while (!stopping_) {
      look();
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  });
}

PeakMemory::~PeakMemory() {
  stopping_ = true;
  if (thread_.joinable()) thread_.join();
}

void PeakMemory::look() {
  try {
    peak_ = std::max(peak_.load(), resident_bytes());
  } catch (const std::exception&) {  // out of file descriptors for a moment: what was seen so far stands
  }
}

int64_t PeakMemory::stop() {
  stopping_ = true;
  if (thread_.joinable()) thread_.join();
  look();
  return peak_;
}

}  // namespace lordba
