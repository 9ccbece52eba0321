#include "trainer.h"

#include <executorch/extension/tensor/tensor_ptr.h>
#include <executorch/runtime/platform/runtime.h>
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstring>

namespace lordba {
namespace {

using executorch::aten::ScalarType;
using executorch::aten::SizesType;
using executorch::extension::make_tensor_ptr;
using executorch::extension::Module;
using executorch::extension::TensorPtr;
using executorch::runtime::Error;
using executorch::runtime::EValue;

size_t padded(size_t count) { return (count + LORDBA_BLOCK - 1) / LORDBA_BLOCK * LORDBA_BLOCK; }

// splitmix64: numbers in [0, 1) that are the same everywhere.
double uniform(uint64_t& state) {
  uint64_t x = state += 0x9e3779b97f4a7c15;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
  x = (x ^ x >> 27) * 0x94d049bb133111eb;
  return static_cast<double>((x ^ x >> 31) >> 11) * 0x1p-53;
}

}  // namespace

LazyMemory::LazyMemory(size_t bytes) : data_(nullptr), size_(bytes) {
  void* memory = mmap(nullptr, std::max<size_t>(bytes, 1), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw Fault("no memory for " + std::to_string(bytes) + " bytes of activations");
  data_ = static_cast<uint8_t*>(memory);
}

LazyMemory::LazyMemory(LazyMemory&& other) noexcept : data_(other.data_), size_(other.size_) { other.data_ = nullptr; }

LazyMemory::~LazyMemory() {
  if (data_) munmap(data_, std::max<size_t>(size_, 1));
}

Trainer::Trainer(const std::string& path, const lordba_optimizer& optimizer, uint64_t seed) : optimizer_(optimizer) {
  executorch::runtime::runtime_init();
  module_ = std::make_unique<Module>(path, Module::LoadMode::Mmap);
  const auto meta = module_->method_meta("forward");
  if (!meta.ok() || meta->num_inputs() != 4) {
    throw Fault(path + ": is no training program of lordba.export --train that this runtime can read");
  }
  read_layout(path);
  for (size_t i = 0; i < meta->num_memory_planned_buffers(); ++i) {
    arenas_.emplace_back(static_cast<size_t>(*meta->memory_planned_buffer_size(i)));
    spans_.emplace_back(arenas_.back().data(), arenas_.back().size());
    planned_bytes += arenas_.back().size();
  }
  planned_ = std::make_unique<executorch::runtime::HierarchicalAllocator>(
      executorch::runtime::Span<executorch::runtime::Span<uint8_t>>(spans_.data(), spans_.size()));
  const Error error = module_->load_method("forward", planned_.get());
  if (error == Error::OperatorMissing) throw Fault(path + ": needs an operator that is not built in (see above)");
  if (error != Error::Ok) throw Fault(path + ": cannot be loaded (see above); copy or export the bundle again");
  if (meta->num_outputs() != 1 + places_.size()) {
    throw Fault(path + ": has " + std::to_string(meta->num_outputs()) + " outputs, its layout says " +
                std::to_string(1 + places_.size()) + "; export the bundle again");
  }
  state_.resize(lordba_optimizer_bytes(optimizer.kind, latents.size()));
  initialise(seed);
}

// The integers that a metadata method of the program returns.
std::vector<int64_t> Trainer::constant(const std::string& path, const std::string& name) {
  const auto values = module_->execute(name);
  std::vector<int64_t> integers;
  for (size_t i = 0; values.ok() && i < values->size(); ++i) {
    if ((*values)[i].isInt()) integers.push_back((*values)[i].toInt());
  }
  if (integers.empty()) throw Fault(path + ": lacks the method " + name + "; it is no training program of lordba");
  return integers;
}

// get_training_layout: [modules of the op, d_in, then r and d_out of each] for every op with an adapter, in the order
// of the gradients; the latents of an op start at a multiple of LORDBA_BLOCK.
void Trainer::read_layout(const std::string& path) {
  longest = static_cast<uint32_t>(constant(path, "get_max_seq_len")[0]);
  const std::vector<int64_t> layout = constant(path, "get_training_layout");
  const std::vector<int64_t> base = constant(path, "get_base_fingerprint");
  layout_hash_ = 0xcbf29ce484222325;
  for (const auto* numbers : {&layout, &base}) {
    for (const int64_t value : *numbers) layout_hash_ = (layout_hash_ ^ static_cast<uint64_t>(value)) * 0x100000001b3;
  }
  size_t size = 0;
  for (size_t at = 0; at < layout.size();) {
    const int64_t count = layout[at];
    if (count < 1 || at + 2 + 2 * count > layout.size()) throw Fault(path + ": its layout is damaged");
    const size_t first = size;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t d_in = layout[at + 1], r = layout[at + 2 + 2 * i], d_out = layout[at + 3 + 2 * i];
      if (d_in < 1 || r < 0 || d_out < 1 || std::max({d_in, r, d_out}) > INT32_MAX) {
        throw Fault(path + ": its layout is damaged");
      }
      modules.push_back({static_cast<uint32_t>(r), static_cast<uint32_t>(d_in), static_cast<uint32_t>(d_out), size});
      size += static_cast<size_t>(r * (d_in + d_out));
    }
    places_.push_back({nullptr, first, size - first});
    size = padded(size);
    at += 2 + 2 * count;
  }
  latents.resize(size);
}

void Trainer::initialise(uint64_t seed) {
  for (const lordba_trainer_module& module : modules) {
    const double bound = 1 / std::sqrt(static_cast<double>(module.d_in));
    for (size_t i = 0; i < size_t{module.r} * module.d_in; ++i) {
      latents[module.offset + i] = static_cast<float>((2 * uniform(seed) - 1) * bound);
    }
  }
}

double Trainer::add(const int64_t* tokens, const int64_t* targets, size_t count, float weight) {
  if (count < 1 || count > longest) {
    throw Fault("a sequence of " + std::to_string(count) + " tokens; the program takes 1 to " +
                std::to_string(longest));
  }
  if (added_.size() == places_.size() && sums_.empty()) {  // the program is about to overwrite the first gradients
    sums_.resize(latents.size());
    gather(sums_.data());
  }
  const auto length = static_cast<SizesType>(count);
  const TensorPtr ids = make_tensor_ptr({1, length}, const_cast<int64_t*>(tokens), ScalarType::Long);
  const TensorPtr next = make_tensor_ptr({1, length}, const_cast<int64_t*>(targets), ScalarType::Long);
  const TensorPtr share = make_tensor_ptr({1}, &weight);
  const TensorPtr flat = make_tensor_ptr({static_cast<SizesType>(latents.size())}, latents.data());
  const auto outputs = module_->execute("forward", {EValue(*ids), EValue(*next), EValue(*share), EValue(*flat)});
  if (!outputs.ok()) throw Fault("the training program failed (see above)");
  const bool first = added_.empty();
  std::vector<Span> found = places_;
  for (size_t i = 0; i < found.size(); ++i) {
    const auto& gradient = (*outputs)[1 + i].toTensor();
    if (static_cast<size_t>(gradient.numel()) != found[i].count)
      throw Fault("a gradient has another size than its latents");
    found[i].data = gradient.const_data_ptr<float>();
  }
  if (!first) {
    for (const Span& span : found) {
      for (size_t i = 0; i < span.count; ++i) sums_[span.first + i] += span.data[i];
    }
    for (Span& span : found) span.data = sums_.data() + span.first;
  }
  added_ = std::move(found);
  return (*outputs)[0].toTensor().const_data_ptr<float>()[0];
}

void Trainer::gather(float* gradients) {
  std::fill_n(gradients, latents.size(), 0.0f);
  for (const Span& span : added_) std::copy_n(span.data, span.count, gradients + span.first);
}

void Trainer::update(float rate, float largest_norm) {
  if (added_.empty()) throw Fault("there are no gradients; add a sequence before the update");
  double squares = 0.0;
  for (const Span& span : added_) {
    for (size_t i = 0; i < span.count; ++i) squares += double{span.data[i]} * span.data[i];
  }
  const double norm = std::sqrt(squares);
  if (!std::isfinite(norm)) throw Fault("the gradients are not finite: the training diverged; lower the rate");
  const float factor = norm > largest_norm ? static_cast<float>(largest_norm / (norm + 1e-6)) : 1.0f;
  ++steps;
  for (const Span& span : added_) {
    lordba_optimizer_step(&optimizer_, steps, rate, factor, latents.data(), span.data, span.first, span.count,
                          latents.size(), state_.data());
  }
  added_.clear();
  sums_.clear();
}

const lordba_trainer_module& Trainer::adapted(uint32_t index) const {
  if (index >= modules.size() || modules[index].r == 0) {
    throw Fault("module " + std::to_string(index) + " is not adapted by this program");
  }
  return modules[index];
}

void Trainer::pack(uint32_t index, lordba_scale_code code, lordba_packed* packed) const {
  const lordba_trainer_module& module = adapted(index);
  const float* a = latents.data() + module.offset;
  const auto status =
      lordba_pack_module(a, a + size_t{module.r} * module.d_in, module.r, module.d_in, module.d_out, code, packed);
  if (status == LORDBA_PACK_NOT_FINITE) throw Fault("the latents hold NaN or infinity: the training diverged");
  if (status == LORDBA_PACK_TOO_LARGE) throw Fault("a scale exceeds fp16, which this code needs; pack as fp32");
}

}  // namespace lordba
