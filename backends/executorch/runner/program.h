// A program made by python -m lordba.export, loaded in ExecuTorch's runtime: swap the adapter, run tokens.
#pragma once

#include <executorch/extension/module/module.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace lordba {

// What the caller gave is wrong or does not fit; says what to do. Any other exception is a fault.
struct Mistake : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// An adapter's file in memory, as programs take it that have adapters as inputs.
using Blob = std::vector<uint8_t>;
Blob read_file(const std::string& path);

// Throws Mistake unless the file can be read.
void check_file(const std::string& path);

// Gives ExecuTorch so many threads, in the whole process; only while no program runs.
void use_threads(uint32_t count);

// One program with its KV cache. One thread at a time may call it; two programs share nothing.
class Program {
 public:
  // Reads what the program says about itself; `use` loads it. `operators` are those that the manifest requires.
  explicit Program(const std::string& path, const std::vector<std::string>& operators = {});

  // Whether adapters are inputs (a blob) or else data files, with which the program is loaded.
  bool takes_blob() const { return takes_blob_; }
  int64_t longest_input() const { return longest_input_; }  // tokens of one run
  int64_t longest_text() const { return longest_text_; }    // tokens of the KV cache
  int64_t vocabulary() const { return vocabulary_; }
  bool is_end(int64_t token) const;

  // Switches to an adapter; what the KV cache holds is void. Loading data files lets the program go first, for both at
  // once would need twice the memory: if it fails, nothing is in use until the next call succeeds.
  void use(const std::vector<std::string>& data_files);
  void use(std::shared_ptr<const Blob> blob);

  // Runs tokens that follow the first `start` of the cache, in one call; the last one's logits, [vocabulary].
  std::vector<float> run(const int64_t* tokens, size_t count, int64_t start);

 private:
  void load(const std::vector<std::string>& data_files);

  std::string path_;
  std::unique_ptr<executorch::extension::Module> module_;
  std::shared_ptr<const Blob> blob_;
  bool takes_blob_ = false;
  int64_t longest_input_ = 0, longest_text_ = 0, vocabulary_ = 0;
  std::vector<int64_t> ends_;
};

}  // namespace lordba
