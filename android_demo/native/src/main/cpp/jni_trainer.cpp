// Native methods of ai.lordba.demo.runtime.TrainingProgram: lordba::Trainer by handles, as jni_program.cpp has
// programs.
#include <jni.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <string>
#include <vector>

#include "jni_support.h"
#include "program.h"
#include "trainer.h"

namespace {

using lordba::guarded;
using lordba::object;
using lordba::Trainer;

// AdamW with one byte per moment: what a phone has memory for.
constexpr lordba_optimizer kOptimizer = {LORDBA_ADAMW8, 0.9f, 0.999f, 1e-8f, 0.0f};
constexpr float kLargestNorm = 1.0f;

const lordba_trainer_module& module_of(const Trainer& trainer, jint index) {
  if (index < 0 || static_cast<size_t>(index) >= trainer.modules.size()) {
    throw lordba::Mistake("the training program has " + std::to_string(trainer.modules.size()) + " modules, not " +
                          std::to_string(index));
  }
  return trainer.modules[index];
}

// Gives both factors of each rank the same size: the product stays, and one rate then suits both
// (lordba.training.latents).
void balance(std::vector<float>& a, std::vector<float>& b, const lordba_trainer_module& m) {
  for (size_t k = 0; k < m.r; ++k) {
    double of_a = 0, of_b = 0;
    for (size_t i = 0; i < m.d_in; ++i) of_a += double{a[k * m.d_in + i]} * a[k * m.d_in + i];
    for (size_t o = 0; o < m.d_out; ++o) of_b += double{b[o * m.r + k]} * b[o * m.r + k];
    if (of_a == 0 || of_b == 0) continue;
    const double factor = std::sqrt(std::sqrt(of_b / of_a));
    for (size_t i = 0; i < m.d_in; ++i) a[k * m.d_in + i] = static_cast<float>(a[k * m.d_in + i] * factor);
    for (size_t o = 0; o < m.d_out; ++o) b[o * m.r + k] = static_cast<float>(b[o * m.r + k] / factor);
  }
}

// One module as an adapter folder stores it: signs of A and B, codes of the three scales, their ranges (fp16).
using Packed = std::array<std::vector<uint8_t>, 6>;

Packed pack(const Trainer& trainer, jint index) {
  const lordba_trainer_module& m = module_of(trainer, index);
  Packed parts;
  parts[0].resize(size_t{m.r} * ((m.d_in + 7) / 8));
  parts[1].resize(size_t{m.d_out} * ((m.r + 7) / 8));
  const uint32_t lengths[] = {m.d_in, m.r, m.d_out};
  lordba_packed packed = {parts[0].data(), parts[1].data(), {}, {}};
  for (int i = 0; i < 3; ++i) {
    parts[2 + i].resize(lordba_stored_bytes(LORDBA_LOG4, lengths[i]));
    packed.scales[i] = parts[2 + i].data();
  }
  trainer.pack(static_cast<uint32_t>(index), LORDBA_LOG4, &packed);
  for (const auto& range : packed.ranges) {
    for (const uint16_t half : range) parts[5].insert(parts[5].end(), {uint8_t(half & 0xff), uint8_t(half >> 8)});
  }
  return parts;
}

}  // namespace

#define NATIVE(type, name) extern "C" JNIEXPORT type JNICALL Java_ai_lordba_demo_runtime_TrainingProgram_##name

NATIVE(jlong, open)(JNIEnv* env, jobject, jstring path, jlong seed) {
  return guarded(env, [&] {
    const std::string file = lordba::text_of(env, path);
    lordba::check_file(file);
    return lordba::handle_of(std::make_unique<Trainer>(file, kOptimizer, static_cast<uint64_t>(seed)));
  });
}

NATIVE(void, close)(JNIEnv*, jobject, jlong trainer) { lordba::destroy<Trainer>(trainer); }

NATIVE(jint, longest)(JNIEnv* env, jobject, jlong trainer) {
  return guarded(env, [&] { return static_cast<jint>(object<Trainer>(trainer).longest); });
}

NATIVE(jintArray, modules)(JNIEnv* env, jobject, jlong trainer) {
  return guarded(env, [&] {
    std::vector<jint> sizes;
    for (const lordba_trainer_module& m : object<Trainer>(trainer).modules) {
      sizes.insert(sizes.end(), {static_cast<jint>(m.r), static_cast<jint>(m.d_in), static_cast<jint>(m.d_out)});
    }
    return lordba::java_ints(env, sizes);
  });
}

NATIVE(void, setFactors)(JNIEnv* env, jobject, jlong handle, jint index, jfloatArray a, jfloatArray b) {
  guarded(env, [&] {
    Trainer& trainer = object<Trainer>(handle);
    const lordba_trainer_module& m = module_of(trainer, index);
    std::vector<float> to_a = lordba::floats_of(env, a), to_b = lordba::floats_of(env, b);
    if (to_a.size() != size_t{m.r} * m.d_in || to_b.size() != size_t{m.r} * m.d_out) {
      throw lordba::Mistake("the factors of module " + std::to_string(index) + " are not those of rank " +
                            std::to_string(m.r) + ", which the training program has; start from another adapter");
    }
    float* const to = trainer.latents.data() + m.offset;
    balance(to_a, to_b, m);
    std::copy(to_b.begin(), to_b.end(), std::copy(to_a.begin(), to_a.end(), to));
  });
}

NATIVE(jfloat, step)(JNIEnv* env, jobject, jlong handle, jintArray tokens, jfloat rate) {
  return guarded(env, [&] {
    Trainer& trainer = object<Trainer>(handle);
    const std::vector<jint> ids = lordba::ints_of(env, tokens);
    if (ids.size() < 2 || ids.size() > trainer.longest) {
      throw lordba::Mistake("a step takes 2 to " + std::to_string(trainer.longest) + " tokens, not " +
                            std::to_string(ids.size()));
    }
    const std::vector<int64_t> text(ids.begin(), ids.end());
    const size_t learned = text.size() - 1;
    const double loss = trainer.add(text.data(), text.data() + 1, learned, 1.0f / static_cast<float>(learned));
    trainer.update(rate, kLargestNorm);
    return static_cast<jfloat>(loss);
  });
}

NATIVE(jobjectArray, pack)(JNIEnv* env, jobject, jlong trainer, jint index) {
  return guarded(env, [&] {
    const Packed parts = pack(object<Trainer>(trainer), index);
    return lordba::java_byte_arrays(env, {parts.begin(), parts.end()});
  });
}

NATIVE(void, save)(JNIEnv* env, jobject, jlong trainer, jstring file, jstring note) {
  guarded(env, [&] { object<Trainer>(trainer).save(lordba::text_of(env, file), lordba::text_of(env, note)); });
}

NATIVE(jstring, load)(JNIEnv* env, jobject, jlong trainer, jstring file) {
  return guarded(env,
                 [&] { return lordba::java_string(env, object<Trainer>(trainer).load(lordba::text_of(env, file))); });
}
