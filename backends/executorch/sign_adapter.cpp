// lordba::sign_adapter for ExecuTorch: checks, threads, and nothing else; the arithmetic is backends/kernels.
#include <executorch/extension/kernel_util/make_boxed_from_unboxed_functor.h>
#include <executorch/runtime/kernel/kernel_includes.h>
#include <executorch/runtime/kernel/thread_parallel_interface.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <optional>
#include <string_view>
#include <vector>

#include "lordba_kernels.h"

namespace {

using executorch::aten::ScalarType;
using executorch::aten::SizesType;
using executorch::aten::Tensor;
using executorch::extension::parallel_for;
using executorch::runtime::Error;
using executorch::runtime::KernelRuntimeContext;
using IntList = executorch::aten::ArrayRef<int64_t>;

constexpr int64_t kTokens = 16;         // tokens that share the unpacked signs of a tile
constexpr int64_t kOutputs = 256;       // outputs of one piece of work when a single token is split
constexpr double kWorthSplitting = 50;  // microseconds below which waking the thread pool costs more than it saves

const lordba_kernels* kernels() {
  static const lordba_kernels* const selected = lordba_select(std::getenv("LORDBA_ISA"));
  return selected;
}

// Modules side by side over one x: y [tokens, width], the modules' outputs next to each other.
struct Job {
  const std::vector<lordba_module>& modules;  // r = 0 where nothing is added
  IntList d_outs;
  const float* x;
  int64_t d_in;
  const float* base;  // or null
  float* y;
  int64_t width;
};

// Outputs [begin, end) of one module at column `column` of y, for tokens [first, first + count), from h.
void second_stage(const Job& job, const lordba_module& module, int64_t column, int64_t first, int64_t count,
                  int64_t begin, int64_t end, const float* h) {
  const int64_t offset = first * job.width + column;
  const float* base = job.base ? job.base + offset : nullptr;
  float* y = job.y + offset;
  if (module.r != 0) {
    lordba_sum_ranks(kernels(), &module, h, count, begin, end, base, job.width, y, job.width);
    return;
  }
  for (int64_t t = 0; t < count; ++t, y += job.width) {
    if (base) {
      std::copy_n(base + t * job.width + begin, end - begin, y + begin);
    } else {
      std::fill_n(y + begin, end - begin, 0.0f);
    }
  }
}

// Both stages for a range of tokens; `sums` holds, zeroed, a padded rank per module and token.
void run_tokens(const Job& job, int64_t begin, int64_t end, int64_t ranks, float* sums) {
  for (int64_t first = begin; first < end; first += kTokens) {
    const int64_t count = std::min(kTokens, end - first);
    float* h = sums + first * ranks;
    int64_t column = 0;
    for (size_t i = 0; i < job.modules.size(); ++i) {
      const lordba_module& module = job.modules[i];
      if (module.r != 0) {
        lordba_sum_inputs(kernels(), &module, job.x + first * job.d_in, job.d_in, count, 0, lordba_chunks(&module), h);
        lordba_scale_ranks(kernels(), &module, count, 1, h);
      }
      second_stage(job, module, column, first, count, 0, job.d_outs[i], h);
      h += count * lordba_padded_rank(&module);
      column += job.d_outs[i];
    }
  }
}

// Few tokens, much work: stage 1 split over chunks of the inputs, stage 2 over outputs.
// `sums` holds, zeroed, [chunks][tokens][padded rank] per module.
void run_split(const Job& job, int64_t tokens, int64_t chunks, int64_t threads, float* sums) {
  parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    float* partials = sums;
    for (const lordba_module& module : job.modules) {
      const int64_t stride = tokens * lordba_padded_rank(&module);
      for (int64_t chunk = begin; module.r != 0 && chunk < end; ++chunk) {
        lordba_sum_inputs(kernels(), &module, job.x, job.d_in, tokens, chunk, chunk + 1, partials + chunk * stride);
      }
      partials += chunks * stride;
    }
  });
  float* partials = sums;
  int64_t pieces = 0;
  for (size_t i = 0; i < job.modules.size(); ++i) {
    lordba_scale_ranks(kernels(), &job.modules[i], tokens, chunks, partials);
    partials += chunks * tokens * lordba_padded_rank(&job.modules[i]);
    pieces += (job.d_outs[i] + kOutputs - 1) / kOutputs;
  }
  parallel_for(0, pieces, std::max<int64_t>(1, pieces / (2 * threads)), [&](int64_t begin, int64_t end) {
    const float* h = sums;
    int64_t column = 0, piece = 0;
    for (size_t i = 0; i < job.modules.size(); ++i) {
      const int64_t here = (job.d_outs[i] + kOutputs - 1) / kOutputs;
      const int64_t from = std::max(begin - piece, int64_t{0}) * kOutputs;
      const int64_t to = std::min(std::min(end - piece, here) * kOutputs, job.d_outs[i]);
      if (from < to) second_stage(job, job.modules[i], column, 0, tokens, from, to, h);
      h += chunks * tokens * lordba_padded_rank(&job.modules[i]);
      column += job.d_outs[i];
      piece += here;
    }
  });
}

Error run(const Job& job, int64_t tokens) {
  int64_t ranks = 0, chunks = 1;
  double cost = 0;
  for (const lordba_module& module : job.modules) {
    const int64_t rank = lordba_padded_rank(&module);
    ranks += rank;
    chunks = std::max<int64_t>(chunks, lordba_chunks(&module));
    cost += lordba_cost(kernels(), &module, tokens);
  }
  const int64_t threads = cost < kWorthSplitting ? 1 : executorch::extension::get_thread_count();
  const bool split = threads > 1 && tokens < 2 * threads;
  const size_t floats = static_cast<size_t>(tokens) * ranks * (split ? chunks : 1);
  const std::unique_ptr<float[]> sums(new (std::nothrow) float[floats]());
  if (!sums) return Error::MemoryAllocationFailed;
  if (split) {
    run_split(job, tokens, chunks, threads, sums.get());
  } else if (threads > 1) {
    const int64_t grain = std::clamp<int64_t>(tokens / (2 * threads), 1, kTokens);
    parallel_for(0, tokens, grain, [&](int64_t begin, int64_t end) { run_tokens(job, begin, end, ranks, sums.get()); });
  } else {
    run_tokens(job, 0, tokens, ranks, sums.get());
  }
  return Error::Ok;
}

bool is_dense(const Tensor& tensor, ScalarType type) {
  return tensor.scalar_type() == type && executorch::runtime::tensor_is_default_dim_order(tensor);
}

// Shapes out, checks base, runs. x has `leading` dimensions before its channels.
Tensor& apply(KernelRuntimeContext& ctx, const Tensor& x, int64_t leading, int64_t d_in,
              std::vector<lordba_module>& modules, IntList d_outs, const std::optional<Tensor>& base, Tensor& out) {
  ET_KERNEL_CHECK_MSG(ctx, kernels() != nullptr, InvalidState, out,
                      "LORDBA_ISA names an instruction set that this CPU or build lacks");
  SizesType sizes[executorch::runtime::kTensorDimensionLimit];
  int64_t tokens = 1, width = 0;
  for (int64_t i = 0; i < leading; ++i) {
    sizes[i] = x.size(i);
    tokens *= x.size(i);
  }
  for (const int64_t d_out : d_outs) width += d_out;
  ET_KERNEL_CHECK(ctx, width <= INT32_MAX, InvalidArgument, out);
  sizes[leading] = static_cast<SizesType>(width);
  const size_t dims = static_cast<size_t>(leading) + 1;
  ET_KERNEL_CHECK(ctx, is_dense(out, ScalarType::Float), InvalidArgument, out);
  ET_KERNEL_CHECK(ctx, executorch::runtime::resize_tensor(out, {sizes, dims}) == Error::Ok, InvalidArgument, out);
  if (base) {
    ET_KERNEL_CHECK(ctx, is_dense(*base, ScalarType::Float), InvalidArgument, out);
    ET_KERNEL_CHECK_MSG(ctx, base->sizes().equals(out.sizes()), InvalidArgument, out,
                        "base must have the shape of the output");
  }
  for (lordba_module& module : modules) {
    if (lordba_is_zero(kernels(), &module)) module.r = 0;
  }
  const Job job{modules,
                d_outs,
                x.const_data_ptr<float>(),
                d_in,
                base ? base->const_data_ptr<float>() : nullptr,
                out.mutable_data_ptr<float>(),
                width};
  ET_KERNEL_CHECK(ctx, run(job, tokens) == Error::Ok, MemoryAllocationFailed, out);
  return out;
}

Tensor& sign_adapter_blob_out(KernelRuntimeContext& ctx, const Tensor& x, const Tensor& blob, int64_t first,
                              int64_t d_in, IntList d_outs, const std::optional<Tensor>& base, Tensor& out) {
  ET_KERNEL_CHECK(ctx, is_dense(x, ScalarType::Float) && is_dense(blob, ScalarType::Byte), InvalidArgument, out);
  ET_KERNEL_CHECK(ctx, x.dim() >= 1 && d_in > 0 && first >= 0, InvalidArgument, out);
  int64_t leading = x.dim() - 1, channels = x.size(leading);
  if (channels != d_in && leading > 0) channels *= x.size(--leading);
  ET_KERNEL_CHECK_MSG(ctx, channels == d_in, InvalidArgument, out, "x does not have the layer's %lld channels",
                      static_cast<long long>(d_in));
  std::vector<lordba_module> modules(d_outs.size());
  for (size_t i = 0; i < d_outs.size(); ++i) {
    lordba_module& module = modules[i];
    const auto status = lordba_blob_module(blob.const_data_ptr<uint8_t>(), blob.numel(), first + i, &module);
    ET_KERNEL_CHECK_MSG(ctx, status == LORDBA_OK, InvalidArgument, out, "module %lld: %s",
                        static_cast<long long>(first + i), lordba_status_text(status));
    ET_KERNEL_CHECK(ctx, d_outs[i] > 0 && d_outs[i] <= INT32_MAX, InvalidArgument, out);
    ET_KERNEL_CHECK_MSG(ctx, module.r == 0 || (module.d_in == d_in && module.d_out == d_outs[i]), InvalidArgument, out,
                        "module %lld of the adapter blob maps %u to %u channels, the program's layer %lld to %lld",
                        static_cast<long long>(first + i), module.d_in, module.d_out, static_cast<long long>(d_in),
                        static_cast<long long>(d_outs[i]));
  }
  return apply(ctx, x, leading, d_in, modules, d_outs, base, out);
}

std::optional<lordba_scale_code> scale_code_of(std::string_view name) {
  if (name == "fp32") return LORDBA_FP32;
  if (name == "fp16") return LORDBA_FP16;
  if (name == "int8") return LORDBA_INT8;
  if (name == "log4") return LORDBA_LOG4;
  return std::nullopt;
}

// What a vector's codes mean, in the form the kernels read: log4's 16 levels, or int8's lo and step.
void fill_meaning(lordba_scale_code code, double lo, double hi, float meaning[16]) {
  if (code == LORDBA_INT8) {
    meaning[0] = static_cast<float>(lo);
    meaning[1] = static_cast<float>((hi - lo) / 254);
    return;
  }
  const double ratio = std::pow(hi / lo, 1.0 / 14);
  double level = lo;
  meaning[0] = 0.0f;
  for (int i = 1; i < 16; ++i, level *= ratio) meaning[i] = static_cast<float>(level);
}

Tensor& sign_adapter_out(KernelRuntimeContext& ctx, const Tensor& x, const Tensor& a_signs, const Tensor& b_signs,
                         const Tensor& s_in, const Tensor& s_mid, const Tensor& s_out,
                         const std::optional<Tensor>& s_ranges, std::string_view scale_code, Tensor& out) {
  const auto code = scale_code_of(scale_code);
  ET_KERNEL_CHECK_MSG(ctx, code.has_value(), InvalidArgument, out, "scale_code must be fp32, fp16, int8 or log4");
  const bool coded = *code == LORDBA_INT8 || *code == LORDBA_LOG4;
  ET_KERNEL_CHECK(ctx, is_dense(x, ScalarType::Float) && x.dim() >= 1, InvalidArgument, out);
  ET_KERNEL_CHECK(ctx, is_dense(a_signs, ScalarType::Byte) && a_signs.dim() == 2, InvalidArgument, out);
  ET_KERNEL_CHECK(ctx, is_dense(b_signs, ScalarType::Byte) && b_signs.dim() == 2, InvalidArgument, out);
  const int64_t d_in = x.size(x.dim() - 1), r = a_signs.size(0), d_out = b_signs.size(0);
  ET_KERNEL_CHECK(ctx, d_in > 0 && d_out > 0 && a_signs.size(1) == (d_in + 7) / 8 && b_signs.size(1) == (r + 7) / 8,
                  InvalidArgument, out);
  const ScalarType stored = *code == LORDBA_FP32 ? ScalarType::Float : coded ? ScalarType::Byte : ScalarType::Half;
  const Tensor* const vectors[3] = {&s_in, &s_mid, &s_out};
  const int64_t lengths[3] = {d_in, r, d_out};
  lordba_scales scales[3];
  float meaning[3][16];
  if (coded) {
    ET_KERNEL_CHECK_MSG(ctx, s_ranges && is_dense(*s_ranges, ScalarType::Half) && s_ranges->numel() == 6,
                        InvalidArgument, out, "int8 and log4 scales need s_ranges, fp16 [3, 2]");
  }
  for (int i = 0; i < 3; ++i) {
    const int64_t expected = *code == LORDBA_LOG4 ? (lengths[i] + 1) / 2 : lengths[i];
    ET_KERNEL_CHECK(ctx, is_dense(*vectors[i], stored) && vectors[i]->dim() == 1 && vectors[i]->numel() == expected,
                    InvalidArgument, out);
    if (coded) {
      const auto* range = s_ranges->const_data_ptr<executorch::aten::Half>() + 2 * i;
      fill_meaning(*code, static_cast<float>(range[0]), static_cast<float>(range[1]), meaning[i]);
    }
    scales[i] = {*code, reinterpret_cast<const uint8_t*>(meaning[i]),
                 static_cast<const uint8_t*>(vectors[i]->const_data_ptr())};
  }
  std::vector<lordba_module> modules{{static_cast<uint32_t>(r), static_cast<uint32_t>(d_in),
                                      static_cast<uint32_t>(d_out), a_signs.const_data_ptr<uint8_t>(),
                                      b_signs.const_data_ptr<uint8_t>(), scales[0], scales[1], scales[2]}};
  return apply(ctx, x, x.dim() - 1, d_in, modules, {&d_out, 1}, std::nullopt, out);
}

}  // namespace

extern "C" __attribute__((visibility("default"))) const char* lordba_active_isa() {
  return kernels() ? lordba_isa(kernels()) : nullptr;
}

EXECUTORCH_LIBRARY(lordba, "sign_adapter.out", sign_adapter_out);
EXECUTORCH_LIBRARY(lordba, "sign_adapter.blob_out", sign_adapter_blob_out);
