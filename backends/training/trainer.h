// A training program in ExecuTorch's runtime, with its latents, gradients and optimizer.
#pragma once

#include <executorch/extension/module/module.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "lordba_trainer.h"

namespace lordba {

// What went wrong, for lordba_trainer_error.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Memory that the system hands out page by page as it is touched: a program planned for long sequences costs no more
// than the short ones that it sees.
class LazyMemory {
 public:
  explicit LazyMemory(size_t bytes);
  LazyMemory(LazyMemory&& other) noexcept;
  LazyMemory& operator=(LazyMemory&&) = delete;
  ~LazyMemory();
  uint8_t* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  uint8_t* data_;
  size_t size_;
};

class Trainer {
 public:
  Trainer(const std::string& program, const lordba_optimizer& optimizer, uint64_t seed);

  double add(const int64_t* tokens, const int64_t* targets, size_t count, float weight);
  void gather(float* gradients);
  void update(float rate, float largest_norm);
  void save(const std::string& file, const std::string& note) const;
  std::string load(const std::string& file);
  void write_adapter(lordba_scale_code code, const char* template_file, const std::string& file) const;
  void pack(uint32_t index, lordba_scale_code code, lordba_packed* packed) const;

  uint32_t longest = 0;
  uint64_t steps = 0, planned_bytes = 0;
  std::vector<lordba_trainer_module> modules;
  std::vector<float> latents;
  std::string error;

 private:
  // Gradients of latents [first, first + count), as the program or `sums_` holds them.
  struct Span {
    const float* data;
    size_t first, count;
  };
  void read_layout(const std::string& path);
  void initialise(uint64_t seed);
  std::vector<int64_t> constant(const std::string& path, const std::string& name);
  const lordba_trainer_module& adapted(uint32_t index) const;

  lordba_optimizer optimizer_;
  std::vector<LazyMemory> arenas_;  // must outlive module_
  std::vector<executorch::runtime::Span<uint8_t>> spans_;
  std::unique_ptr<executorch::runtime::HierarchicalAllocator> planned_;
  std::unique_ptr<executorch::extension::Module> module_;
  std::vector<Span> places_;  // of the program's outputs after the loss
  std::vector<Span> added_;   // empty: nothing was added since the last update
  std::vector<float> sums_;   // of more than one sequence
  std::vector<uint8_t> state_;
  uint64_t layout_hash_ = 0;  // of the module sizes and the base: what a checkpoint must agree with
};

}  // namespace lordba
