// lordba::sign_adapter for ExecuTorch: checks, threads, and nothing else; the arithmetic is backends/kernels.
#include <executorch/extension/kernel_util/make_boxed_from_unboxed_functor.h>
#include <executorch/runtime/kernel/kernel_includes.h>
#include <executorch/runtime/kernel/thread_parallel_interface.h>

#include <cstddef>
#include <cstdlib>
#include <memory>
#include <new>
#include <optional>
#include <string_view>

#include "lordba_kernels.h"

namespace {

using executorch::aten::ScalarType;
using executorch::aten::SizesType;
using executorch::aten::Tensor;
using executorch::runtime::Error;
using executorch::runtime::KernelRuntimeContext;
using IntList = executorch::aten::ArrayRef<int64_t>;

constexpr size_t kMostModules = 8;  // of one op: layers that share x

const lordba_kernels* kernels() {
  static const lordba_kernels* const selected = lordba_select(std::getenv("LORDBA_ISA"));
  return selected;
}

std::optional<lordba_dtype> dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return LORDBA_F32;
    case ScalarType::Half:
      return LORDBA_F16;
    case ScalarType::BFloat16:
      return LORDBA_BF16;
    default:
      return std::nullopt;
  }
}

// Every tile of the call, on this thread or on the runtime's pool.
Error run(const lordba_call& call, const lordba_plan& plan) {
  alignas(LORDBA_ALIGNMENT) std::byte small[8192];  // enough for a few tokens
  struct Free {
    void operator()(void* p) const { ::operator delete(p, std::align_val_t{LORDBA_ALIGNMENT}); }
  };
  std::unique_ptr<void, Free> large;
  void* workspace = small;
  if (plan.workspace > sizeof small) {
    large.reset(::operator new(plan.workspace, std::align_val_t{LORDBA_ALIGNMENT}, std::nothrow));
    if (!large) return Error::MemoryAllocationFailed;
    workspace = large.get();
  }
  for (size_t stage = 0; stage < plan.stages; ++stage) {
    const auto run_tiles = [&](int64_t begin, int64_t end) {
      for (int64_t tile = begin; tile < end; ++tile) {
        lordba_run_tile(kernels(), &call, &plan, workspace, stage, static_cast<size_t>(tile));
      }
    };
    const auto tiles = static_cast<int64_t>(plan.tiles[stage]);
    if (plan.threads > 1) {
      executorch::extension::parallel_for(0, tiles, 1, run_tiles);
    } else {
      run_tiles(0, tiles);
    }
  }
  return Error::Ok;
}

bool is_dense(const Tensor& tensor, ScalarType type) {
  return tensor.scalar_type() == type && executorch::runtime::tensor_is_default_dim_order(tensor);
}

// Shapes out, checks base, runs. x has `leading` dimensions before its channels.
Tensor& apply(KernelRuntimeContext& ctx, const Tensor& x, int64_t leading, const lordba_module* modules, size_t count,
              const std::optional<Tensor>& base, Tensor& out) {
  ET_KERNEL_CHECK_MSG(ctx, kernels() != nullptr, InvalidState, out,
                      "LORDBA_ISA names an instruction set that this CPU or build lacks");
  SizesType sizes[executorch::runtime::kTensorDimensionLimit];
  size_t tokens = 1, width = 0;
  for (int64_t i = 0; i < leading; ++i) {
    sizes[i] = x.size(i);
    tokens *= static_cast<size_t>(x.size(i));
  }
  for (size_t i = 0; i < count; ++i) width += modules[i].d_out;
  ET_KERNEL_CHECK(ctx, width <= INT32_MAX, InvalidArgument, out);
  sizes[leading] = static_cast<SizesType>(width);
  const size_t dims = static_cast<size_t>(leading) + 1;
  const auto dtype = dtype_of(x);
  ET_KERNEL_CHECK_MSG(ctx, dtype && executorch::runtime::tensor_is_default_dim_order(x), InvalidArgument, out,
                      "x must be a dense tensor of float32, float16 or bfloat16");
  ET_KERNEL_CHECK(ctx, is_dense(out, x.scalar_type()), InvalidArgument, out);
  ET_KERNEL_CHECK(ctx, executorch::runtime::resize_tensor(out, {sizes, dims}) == Error::Ok, InvalidArgument, out);
  if (base) {
    ET_KERNEL_CHECK(ctx, is_dense(*base, x.scalar_type()), InvalidArgument, out);
    ET_KERNEL_CHECK_MSG(ctx, base->sizes().equals(out.sizes()), InvalidArgument, out,
                        "base must have the shape of the output");
  }
  lordba_call call{};
  call.modules = modules;
  call.count = count;
  call.dtype = *dtype;
  call.tokens = tokens;
  call.x = x.const_data_ptr();
  call.x_stride = modules[0].d_in;
  call.base = base ? base->const_data_ptr() : nullptr;
  call.base_stride = width;
  call.y = out.mutable_data_ptr();
  call.y_stride = width;
  lordba_plan plan;
  const auto threads = static_cast<size_t>(executorch::extension::get_thread_count());
  const lordba_status status = lordba_plan_call(kernels(), &call, threads, &plan);
  ET_KERNEL_CHECK_MSG(ctx, status == LORDBA_OK, InvalidArgument, out, "%s", lordba_status_text(status));
  ET_KERNEL_CHECK(ctx, run(call, plan) == Error::Ok, MemoryAllocationFailed, out);
  return out;
}

Tensor& sign_adapter_blob_out(KernelRuntimeContext& ctx, const Tensor& x, const Tensor& blob, int64_t first,
                              int64_t d_in, IntList d_outs, const std::optional<Tensor>& base, Tensor& out) {
  ET_KERNEL_CHECK(ctx, is_dense(blob, ScalarType::Byte), InvalidArgument, out);
  ET_KERNEL_CHECK_MSG(ctx, !d_outs.empty() && d_outs.size() <= kMostModules, InvalidArgument, out,
                      "an op takes 1 to %zu modules, not %zu", kMostModules, d_outs.size());
  ET_KERNEL_CHECK(ctx, x.dim() >= 1 && d_in > 0 && d_in <= INT32_MAX && first >= 0, InvalidArgument, out);
  int64_t leading = x.dim() - 1, channels = x.size(leading);
  if (channels != d_in && leading > 0) channels *= x.size(--leading);
  ET_KERNEL_CHECK_MSG(ctx, channels == d_in, InvalidArgument, out, "x does not have the layer's %lld channels",
                      static_cast<long long>(d_in));
  lordba_module modules[kMostModules];
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
    module.d_in = static_cast<uint32_t>(d_in);
    module.d_out = static_cast<uint32_t>(d_outs[i]);
  }
  return apply(ctx, x, leading, modules, d_outs.size(), base, out);
}

std::optional<lordba_scale_code> scale_code_of(std::string_view name) {
  if (name == "fp32") return LORDBA_FP32;
  if (name == "fp16") return LORDBA_FP16;
  if (name == "int8") return LORDBA_INT8;
  if (name == "log4") return LORDBA_LOG4;
  return std::nullopt;
}

Tensor& sign_adapter_out(KernelRuntimeContext& ctx, const Tensor& x, const Tensor& a_signs, const Tensor& b_signs,
                         const Tensor& s_in, const Tensor& s_mid, const Tensor& s_out,
                         const std::optional<Tensor>& s_ranges, std::string_view scale_code, Tensor& out) {
  const auto code = scale_code_of(scale_code);
  ET_KERNEL_CHECK_MSG(ctx, code.has_value(), InvalidArgument, out, "scale_code must be fp32, fp16, int8 or log4");
  const bool coded = *code == LORDBA_INT8 || *code == LORDBA_LOG4;
  ET_KERNEL_CHECK(ctx, x.dim() >= 1, InvalidArgument, out);
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
      const auto* range = static_cast<const uint8_t*>(s_ranges->const_data_ptr()) + 4 * i;
      ET_KERNEL_CHECK_MSG(ctx, lordba_scale_meaning(*code, range, meaning[i]), InvalidArgument, out,
                          "s_ranges must be 0 < lo <= hi and finite");
    }
    scales[i] = {*code, reinterpret_cast<const uint8_t*>(meaning[i]),
                 static_cast<const uint8_t*>(vectors[i]->const_data_ptr())};
  }
  const lordba_module module = {static_cast<uint32_t>(r),
                                static_cast<uint32_t>(d_in),
                                static_cast<uint32_t>(d_out),
                                a_signs.const_data_ptr<uint8_t>(),
                                b_signs.const_data_ptr<uint8_t>(),
                                nullptr,
                                scales[0],
                                scales[1],
                                scales[2]};
  return apply(ctx, x, x.dim() - 1, &module, 1, std::nullopt, out);
}

}  // namespace

extern "C" __attribute__((visibility("default"))) const char* lordba_active_isa() {
  return kernels() ? lordba_isa(kernels()) : nullptr;
}

EXECUTORCH_LIBRARY(lordba, "sign_adapter.out", sign_adapter_out);
EXECUTORCH_LIBRARY(lordba, "sign_adapter.blob_out", sign_adapter_blob_out);
