// Between Java and C++: strings, arrays, objects by handles, exceptions.
#pragma once

#include <jni.h>

#include <cstdint>
#include <exception>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

namespace lordba {

// A Java exception is pending already; unwinds to the JNI function, which returns.
struct PendingException {};

// UTF-8 of a Java string, and back; JNI's own UTF-8 differs outside the basic plane, and file names may be there.
std::string text_of(JNIEnv* env, jstring string);
jstring java_string(JNIEnv* env, const std::string& text);

std::vector<std::string> texts_of(JNIEnv* env, jobjectArray strings);
std::vector<jint> ints_of(JNIEnv* env, jintArray array);
std::vector<float> floats_of(JNIEnv* env, jfloatArray array);
jfloatArray java_floats(JNIEnv* env, const std::vector<float>& values);
jintArray java_ints(JNIEnv* env, const std::vector<jint>& values);
jobjectArray java_byte_arrays(JNIEnv* env, const std::vector<std::vector<uint8_t>>& arrays);

// An object by its handle, which is its address; its Kotlin owner destroys it once and then holds 0.
template <class T>
T& object(jlong handle) {
  if (handle == 0) throw std::invalid_argument("what is closed cannot be used; open it again");
  return *reinterpret_cast<T*>(static_cast<intptr_t>(handle));
}

template <class T>
jlong handle_of(std::unique_ptr<T> object) {
  return static_cast<jlong>(reinterpret_cast<intptr_t>(object.release()));
}

template <class T>
void destroy(jlong handle) {
  delete reinterpret_cast<T*>(static_cast<intptr_t>(handle));
}

// Throws Java's LordbaError with this message, or OutOfMemoryError.
void throw_error(JNIEnv* env, const std::string& message);
void throw_out_of_memory(JNIEnv* env);

// Runs the body of a JNI function: no C++ exception may leave it, and Java hears of each.
template <class Body>
auto guarded(JNIEnv* env, Body body) -> decltype(body()) {
  try {
    return body();
  } catch (const PendingException&) {
  } catch (const std::bad_alloc&) {
    throw_out_of_memory(env);
  } catch (const std::exception& error) {
    throw_error(env, error.what());
  }
  return decltype(body())();
}

}  // namespace lordba
