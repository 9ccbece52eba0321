#include "program.h"

#include <executorch/extension/tensor/tensor_ptr.h>
#include <executorch/runtime/kernel/operator_registry.h>
#include <executorch/runtime/platform/runtime.h>

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <utility>

#if __has_include(<executorch/extension/threadpool/threadpool.h>)
#include <executorch/extension/threadpool/threadpool.h>
#else  // the Python package has the library and not the header
namespace executorch::extension::threadpool {
class ThreadPool {
 public:
  bool _unsafe_reset_threadpool(uint32_t count);
};
ThreadPool* get_threadpool();
}  // namespace executorch::extension::threadpool
#endif

namespace lordba {
namespace {

namespace fs = std::filesystem;
using executorch::aten::ScalarType;
using executorch::aten::SizesType;
using executorch::extension::make_tensor_ptr;
using executorch::extension::Module;
using executorch::extension::TensorPtr;
using executorch::runtime::Error;
using executorch::runtime::EValue;

// The integers that a metadata method of a program returns.
std::vector<int64_t> constant(Module& program, const std::string& path, const std::string& name) {
  const auto values = program.execute(name);
  std::vector<int64_t> integers;
  for (size_t i = 0; values.ok() && i < values->size(); ++i) {
    if ((*values)[i].isInt()) integers.push_back((*values)[i].toInt());
  }
  if (integers.empty()) throw Mistake(path + ": lacks the method " + name + "; export it with python -m lordba.export");
  return integers;
}

void check_operators(const std::string& path, const std::vector<std::string>& operators) {
  std::string missing;
  for (const std::string& name : operators) {
    if (executorch::ET_RUNTIME_NAMESPACE::registry_has_op_function(name.c_str())) continue;
    missing += (missing.empty() ? "" : ", ") + name;
  }
  if (!missing.empty()) {
    throw Mistake(path + ": needs operators that this build lacks: " + missing + "; export it again or update");
  }
}

}  // namespace

void check_file(const std::string& path) {
  if (!fs::is_regular_file(path) || !std::ifstream(path, std::ios::binary)) {
    throw Mistake(path + ": cannot be read; name an existing file");
  }
}

Blob read_file(const std::string& path) {
  check_file(path);
  std::ifstream file(path, std::ios::binary);
  Blob bytes{std::istreambuf_iterator<char>(file), {}};
  if (bytes.empty()) throw Mistake(path + ": is empty");
  return bytes;
}

void use_threads(uint32_t count) {
  auto* pool = executorch::extension::threadpool::get_threadpool();
  if (pool == nullptr || !pool->_unsafe_reset_threadpool(count)) {
    throw Mistake("this build of ExecuTorch cannot run on " + std::to_string(count) +
                  " threads; leave the number to it");
  }
}

Program::Program(const std::string& path, const std::vector<std::string>& operators) : path_(path) {
  executorch::runtime::runtime_init();
  check_file(path);
  check_operators(path, operators);
  Module program(path, Module::LoadMode::Mmap);
  const auto forward = program.method_meta("forward");
  if (!forward.ok()) throw Mistake(path + ": is no program with a method forward that this runtime can read");
  longest_input_ = constant(program, path, "get_max_seq_len")[0];
  longest_text_ = constant(program, path, "get_max_context_len")[0];
  vocabulary_ = constant(program, path, "get_vocab_size")[0];
  if (longest_input_ < 1 || longest_text_ < 1 || vocabulary_ < 1) {
    throw Mistake(path + ": tells lengths below 1; export it with python -m lordba.export");
  }
  ends_ = constant(program, path, "get_eos_ids");
  takes_blob_ = forward->num_inputs() == 3;
}

bool Program::is_end(int64_t token) const { return std::find(ends_.begin(), ends_.end(), token) != ends_.end(); }

void Program::use(const std::vector<std::string>& data_files) {
  if (takes_blob_) throw Mistake(path_ + ": takes its adapter as an input; give one");
  for (const std::string& file : data_files) check_file(file);
  module_.reset();
  load(data_files);
}

void Program::use(std::shared_ptr<const Blob> blob) {
  if (!takes_blob_) throw Mistake(path_ + ": takes its adapter as a data file, not as an input");
  if (!blob || blob->empty()) throw Mistake(path_ + ": takes its adapter as an input; give one");
  if (!module_) load({});
  blob_ = std::move(blob);
}

void Program::load(const std::vector<std::string>& data_files) {
  auto module = std::make_unique<Module>(path_, data_files, Module::LoadMode::Mmap);
  const Error error = module->load_forward();
  if (error == Error::OperatorMissing)
    throw Mistake(path_ + ": needs an operator that is not built in (its log says more)");
  if (error != Error::Ok) {
    throw Mistake(path_ + ": cannot be loaded with " +
                  (data_files.empty() ? "no adapter" : "the adapter " + data_files.back()) +
                  " (its log says more); give the adapter's file of the same bundle");
  }
  module_ = std::move(module);
}

std::vector<float> Program::run(const int64_t* tokens, size_t count, int64_t start) {
  if (!module_) throw Mistake(path_ + ": no adapter is in use; load one, or the base alone, first");
  if (count < 1 || count > static_cast<size_t>(longest_input_)) {
    throw Mistake(path_ + ": takes 1 to " + std::to_string(longest_input_) + " tokens at once, not " +
                  std::to_string(count));
  }
  if (start < 0 || start > longest_text_ - static_cast<int64_t>(count)) {
    throw Mistake(std::to_string(count) + " tokens after " + std::to_string(start) +
                  " do not fit the program, which was exported for " + std::to_string(longest_text_) +
                  "; give fewer or export with a larger --max-seq-len");
  }
  for (size_t i = 0; i < count; ++i) {
    if (tokens[i] < 0 || tokens[i] >= vocabulary_) {
      throw Mistake("token " + std::to_string(tokens[i]) + " is not one of the program's " +
                    std::to_string(vocabulary_));
    }
  }
  const TensorPtr ids =
      make_tensor_ptr({1, static_cast<SizesType>(count)}, std::vector<int64_t>(tokens, tokens + count));
  const TensorPtr position = make_tensor_ptr({1}, std::vector<int64_t>{start});
  std::vector<EValue> inputs{*ids, *position};
  TensorPtr adapter;
  if (blob_) {
    adapter =
        make_tensor_ptr({static_cast<SizesType>(blob_->size())}, const_cast<uint8_t*>(blob_->data()), ScalarType::Byte);
    inputs.emplace_back(*adapter);
  }
  const auto outputs = module_->forward(inputs);
  if (!outputs.ok()) {
    char code[8];
    std::snprintf(code, sizeof(code), "0x%x", static_cast<unsigned>(outputs.error()));
    throw std::runtime_error("the program failed with ExecuTorch's error " + std::string(code) +
                             " (its log says more)");
  }
  const auto& logits = outputs->at(0).toTensor();
  if (logits.scalar_type() != ScalarType::Float || logits.numel() < vocabulary_) {
    throw std::runtime_error("the program's output is not float32 logits of " + std::to_string(vocabulary_) +
                             " tokens");
  }
  const float* end = logits.const_data_ptr<float>() + logits.numel();
  return {end - vocabulary_, end};
}

}  // namespace lordba
