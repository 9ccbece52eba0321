#!/usr/bin/env bash
# Links liblordba_ort.so for Android as the app's CMake project does, and reads what came out:
#
#   scripts/check_android_native.sh FOLDER [EXECUTORCH]
#
# FOLDER, outside the checkout, receives the build; the last line says where the library lies. EXECUTORCH names an
# executorch package for 64-bit ARM Linux (scripts/arm64_runner.sh downloads one): liblordba_jni.so then links against it.
# Needs scripts/android_toolchain.sh (called here), CMake >= 3.28 and, for EXECUTORCH, scripts/arm64_toolchain.sh.
set -euo pipefail

if [ $# != 1 ] && [ $# != 2 ]; then
  echo "usage: scripts/check_android_native.sh FOLDER [EXECUTORCH]" >&2
  exit 2
fi
project=$(cd "$(dirname "$0")/.." && pwd)
native=$project/android_demo/native
mkdir -p "$1"
folder=$(cd "$1" && pwd)
paths=$("$project/scripts/android_toolchain.sh" native) && eval "$paths"
# build NAME TARGET OPTION...: a target of the app's project, quietly
build() {
  local name=$1 target=$2
  shift 2
  {
    cmake -S "$native/src/main/cpp" -B "$folder/$name" "$@" && cmake --build "$folder/$name" --parallel 2 --target "$target"
  } >"$folder/$name.log" 2>&1 || { cat "$folder/$name.log" >&2; exit 1; }
}

# A stub library that defines exactly the symbols of bionic.txt, for the linker to check against.
mkdir -p "$folder/stubs"
awk '!/^#/ { print "char " $1 ";" }' "$native/freestanding/bionic.txt" |
  "$CLANG" --target=aarch64-linux-android26 -ffreestanding -fno-builtin -w -shared -nostdlib -fuse-ld=lld-19 \
    -Wl,-soname,libc.so -x c - -o "$folder/stubs/libc.so"

build android lordba_onnxruntime -DCMAKE_TOOLCHAIN_FILE="$native/freestanding/toolchain.cmake" \
  -DLORDBA_STUBS="$folder/stubs"
library=$folder/android/onnxruntime/liblordba_ort.so

"$project/scripts/check_android_library.py" "$library" --soname liblordba_ort.so --imports "$native/freestanding/bionic.txt" \
  --exports RegisterCustomOps lordba_active_isa lordba_native_calls

if [ $# = 2 ]; then
  executorch=$(cd "$2" && pwd)
  build arm64 lordba_jni -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
    -DCMAKE_C_COMPILER=aarch64-linux-gnu-gcc -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ \
    -DLORDBA_EXECUTORCH="$executorch" -DJAVA_HOME="$JAVA_HOME"
  methods=$(for file in "$native"/src/main/cpp/jni_*.cpp; do
    prefix=$(sed -n 's/^#define NATIVE.* \(Java_[A-Za-z_]*_\)##name/\1/p' "$file")
    sed -n "s/^NATIVE([A-Za-z]*, \([A-Za-z]*\)).*/$prefix\1/p" "$file"
  done)
  # shellcheck disable=SC2086
  "$project/scripts/check_android_library.py" "$folder/arm64/liblordba_jni.so" --soname liblordba_jni.so --linux \
    --exports $methods
fi
echo "$library"
