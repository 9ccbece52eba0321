#include "jni_support.h"

#include <cstdint>
#include <limits>
#include <stdexcept>

namespace lordba {
namespace {

constexpr uint32_t kReplacement = 0xfffd;

// Throws if a call of JNI left an exception or returned nothing.
template <class T>
T required(JNIEnv* env, T value) {
  if (value == nullptr || env->ExceptionCheck()) throw PendingException();
  return value;
}

template <class T>
jsize size_of(const std::vector<T>& values) {
  if (values.size() > static_cast<size_t>(std::numeric_limits<jsize>::max())) throw std::bad_alloc();
  return static_cast<jsize>(values.size());
}

void append_utf8(std::string& text, uint32_t code) {
  if (code < 0x80) {
    text += static_cast<char>(code);
    return;
  }
  const int more = code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
  text += static_cast<char>((0xff00 >> (more + 1) & 0xff) | code >> 6 * more);
  for (int i = more - 1; i >= 0; --i) text += static_cast<char>(0x80 | (code >> 6 * i & 0x3f));
}

// The code point that begins at `at`, which moves behind it; whatever is no UTF-8 becomes U+FFFD, byte by byte.
uint32_t next_code(const std::string& text, size_t& at) {
  const auto byte = [&](size_t i) -> uint32_t { return i < text.size() ? static_cast<uint8_t>(text[i]) : 0; };
  const uint32_t first = byte(at++);
  if (first < 0x80) return first;
  const int more = first >= 0xf8 ? 0 : first >= 0xf0 ? 3 : first >= 0xe0 ? 2 : first >= 0xc2 ? 1 : 0;
  if (more == 0) return kReplacement;
  uint32_t code = first & (0x3f >> more);
  for (int i = 0; i < more; ++i) {
    if ((byte(at + i) & 0xc0) != 0x80) return kReplacement;
    code = code << 6 | (byte(at + i) & 0x3f);
  }
  constexpr uint32_t smallest[] = {0, 0x80, 0x800, 0x10000};
  if (code < smallest[more] || code > 0x10ffff || (code >= 0xd800 && code < 0xe000)) return kReplacement;
  at += more;
  return code;
}

}  // namespace

std::string text_of(JNIEnv* env, jstring string) {
  if (string == nullptr) throw std::invalid_argument("expected a text, found null");
  std::vector<jchar> units(env->GetStringLength(string));
  env->GetStringRegion(string, 0, static_cast<jsize>(units.size()), units.data());
  if (env->ExceptionCheck()) throw PendingException();
  std::string text;
  for (size_t i = 0; i < units.size(); ++i) {
    uint32_t code = units[i];
    const bool is_pair =
        code >= 0xd800 && code < 0xdc00 && i + 1 < units.size() && units[i + 1] >= 0xdc00 && units[i + 1] < 0xe000;
    if (is_pair) {
      code = 0x10000 + ((code - 0xd800) << 10) + (units[++i] - 0xdc00);
    } else if (code >= 0xd800 && code < 0xe000) {
      code = kReplacement;
    }
    append_utf8(text, code);
  }
  return text;
}

jstring java_string(JNIEnv* env, const std::string& text) {
  std::vector<jchar> units;
  for (size_t at = 0; at < text.size();) {
    const uint32_t code = next_code(text, at);
    if (code >= 0x10000) {
      units.push_back(static_cast<jchar>(0xd800 + ((code - 0x10000) >> 10)));
      units.push_back(static_cast<jchar>(0xdc00 + (code & 0x3ff)));
    } else {
      units.push_back(static_cast<jchar>(code));
    }
  }
  return required(env, env->NewString(units.data(), static_cast<jsize>(units.size())));
}

std::vector<std::string> texts_of(JNIEnv* env, jobjectArray strings) {
  if (strings == nullptr) throw std::invalid_argument("expected texts, found null");
  std::vector<std::string> texts;
  const jsize count = env->GetArrayLength(strings);
  for (jsize i = 0; i < count; ++i) {
    const auto string = static_cast<jstring>(env->GetObjectArrayElement(strings, i));
    if (env->ExceptionCheck()) throw PendingException();
    texts.push_back(text_of(env, string));
    env->DeleteLocalRef(string);  // arrays may be longer than the table of local references
  }
  return texts;
}

std::vector<jint> ints_of(JNIEnv* env, jintArray array) {
  if (array == nullptr) throw std::invalid_argument("expected an array of integers, found null");
  std::vector<jint> values(env->GetArrayLength(array));
  env->GetIntArrayRegion(array, 0, static_cast<jsize>(values.size()), values.data());
  if (env->ExceptionCheck()) throw PendingException();
  return values;
}

std::vector<float> floats_of(JNIEnv* env, jfloatArray array) {
  if (array == nullptr) throw std::invalid_argument("expected an array of floats, found null");
  std::vector<float> values(env->GetArrayLength(array));
  env->GetFloatArrayRegion(array, 0, static_cast<jsize>(values.size()), values.data());
  if (env->ExceptionCheck()) throw PendingException();
  return values;
}

jfloatArray java_floats(JNIEnv* env, const std::vector<float>& values) {
  const jsize count = size_of(values);
  const jfloatArray array = required(env, env->NewFloatArray(count));
  env->SetFloatArrayRegion(array, 0, count, values.data());
  if (env->ExceptionCheck()) throw PendingException();
  return array;
}

jintArray java_ints(JNIEnv* env, const std::vector<jint>& values) {
  const jsize count = size_of(values);
  const jintArray array = required(env, env->NewIntArray(count));
  env->SetIntArrayRegion(array, 0, count, values.data());
  if (env->ExceptionCheck()) throw PendingException();
  return array;
}

jobjectArray java_byte_arrays(JNIEnv* env, const std::vector<std::vector<uint8_t>>& arrays) {
  const jclass type = required(env, env->FindClass("[B"));
  const jobjectArray all = required(env, env->NewObjectArray(size_of(arrays), type, nullptr));
  for (size_t i = 0; i < arrays.size(); ++i) {
    const jsize count = size_of(arrays[i]);
    const jbyteArray array = required(env, env->NewByteArray(count));
    env->SetByteArrayRegion(array, 0, count, reinterpret_cast<const jbyte*>(arrays[i].data()));
    env->SetObjectArrayElement(all, static_cast<jsize>(i), array);
    if (env->ExceptionCheck()) throw PendingException();
    env->DeleteLocalRef(array);
  }
  return all;
}

void throw_error(JNIEnv* env, const std::string& message) {
  if (env->ExceptionCheck()) return;
  try {
    const jclass type = required(env, env->FindClass("ai/lordba/demo/core/LordbaError"));
    const jmethodID make =
        required(env, env->GetMethodID(type, "<init>", "(Ljava/lang/String;Ljava/lang/Throwable;)V"));
    const jobject error = required(env, env->NewObject(type, make, java_string(env, message), jobject()));
    env->Throw(static_cast<jthrowable>(error));
  } catch (const PendingException&) {  // Java hears of that one instead
  } catch (const std::bad_alloc&) {
    throw_out_of_memory(env);
  }
}

void throw_out_of_memory(JNIEnv* env) {
  if (env->ExceptionCheck()) return;
  const jclass type = env->FindClass("java/lang/OutOfMemoryError");
  if (type != nullptr) env->ThrowNew(type, "no memory left for the program");
}

}  // namespace lordba
