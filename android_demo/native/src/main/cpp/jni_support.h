// Between Java and C++: strings, arrays, exceptions.
#pragma once

#include <jni.h>

#include <exception>
#include <new>
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
jfloatArray java_floats(JNIEnv* env, const std::vector<float>& values);

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
