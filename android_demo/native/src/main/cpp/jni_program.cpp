// Native methods of ai.lordba.demo.runtime.ExecuTorch: lordba::Program and what belongs to it, by handles.
//
// A handle is an object's address. Its Kotlin owner closes it once and never calls it again, nor on two threads at a
// time.
#include <jni.h>

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "jni_support.h"
#include "peak_memory.h"
#include "program.h"

namespace {

using lordba::Blob;
using lordba::guarded;
using lordba::handle_of;
using lordba::object;
using lordba::PeakMemory;
using lordba::Program;
using SharedBlob = std::shared_ptr<const Blob>;  // a program may still use a blob that its owner closed

}  // namespace

#define NATIVE(type, name) extern "C" JNIEXPORT type JNICALL Java_ai_lordba_demo_runtime_ExecuTorch_##name

NATIVE(jlong, openProgram)(JNIEnv* env, jobject, jstring path, jobjectArray operators, jint threads) {
  return guarded(env, [&] {
    if (threads < 0)
      throw lordba::Mistake("the number of threads is " + std::to_string(threads) + "; 0 leaves it open");
    auto program = std::make_unique<Program>(lordba::text_of(env, path), lordba::texts_of(env, operators));
    if (threads > 0) lordba::use_threads(static_cast<uint32_t>(threads));
    return handle_of(std::move(program));
  });
}

NATIVE(void, closeProgram)(JNIEnv*, jobject, jlong program) { lordba::destroy<Program>(program); }

NATIVE(jint, longestInput)(JNIEnv* env, jobject, jlong program) {
  return guarded(env, [&] { return static_cast<jint>(object<Program>(program).longest_input()); });
}

NATIVE(jboolean, takesBlob)(JNIEnv* env, jobject, jlong program) {
  return guarded(env, [&] { return static_cast<jboolean>(object<Program>(program).takes_blob()); });
}

NATIVE(void, useData)(JNIEnv* env, jobject, jlong program, jobjectArray files) {
  guarded(env, [&] { object<Program>(program).use(lordba::texts_of(env, files)); });
}

NATIVE(void, useBlob)(JNIEnv* env, jobject, jlong program, jlong blob) {
  guarded(env, [&] { object<Program>(program).use(object<SharedBlob>(blob)); });
}

NATIVE(jfloatArray, run)(JNIEnv* env, jobject, jlong program, jintArray tokens, jint start) {
  return guarded(env, [&] {
    const std::vector<jint> ids = lordba::ints_of(env, tokens);
    const std::vector<int64_t> wide(ids.begin(), ids.end());
    return lordba::java_floats(env, object<Program>(program).run(wide.data(), wide.size(), start));
  });
}

NATIVE(jlong, openBlob)(JNIEnv* env, jobject, jstring path) {
  return guarded(env, [&] {
    return handle_of(
        std::make_unique<SharedBlob>(std::make_shared<const Blob>(lordba::read_file(lordba::text_of(env, path)))));
  });
}

NATIVE(void, closeBlob)(JNIEnv*, jobject, jlong blob) { lordba::destroy<SharedBlob>(blob); }

NATIVE(jlong, openPeakMemory)(JNIEnv* env, jobject) {
  return guarded(env, [] { return handle_of(std::make_unique<PeakMemory>()); });
}

NATIVE(jlong, stopPeakMemory)(JNIEnv* env, jobject, jlong watch) {
  return guarded(env, [&] { return static_cast<jlong>(object<PeakMemory>(watch).stop()); });
}

NATIVE(void, closePeakMemory)(JNIEnv*, jobject, jlong watch) { lordba::destroy<PeakMemory>(watch); }
