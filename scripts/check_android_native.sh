#!/usr/bin/env bash
# Links liblordba_ort.so for Android as the app's CMake project does, and reads what came out:
#
#   scripts/check_android_native.sh FOLDER
#
# FOLDER, outside the checkout, receives the build; the last line says where the library lies. Needs
# scripts/android_toolchain.sh (called here) and CMake >= 3.28.
set -euo pipefail

if [ $# != 1 ]; then
  echo "usage: scripts/check_android_native.sh FOLDER" >&2
  exit 2
fi
project=$(cd "$(dirname "$0")/.." && pwd)
native=$project/android_demo/native
mkdir -p "$1"
folder=$(cd "$1" && pwd)
paths=$("$project/scripts/android_toolchain.sh" native) && eval "$paths"
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

# Stub libraries that define exactly the symbols of bionic.txt, for the linker to check against.
mkdir -p "$folder/stubs"
for library in libc libm; do
  awk -v library=$library.so '!/^#/ && $2 == library { print "char " $1 ";" }' "$native/freestanding/bionic.txt" |
    "$CLANG" --target=aarch64-linux-android26 -ffreestanding -fno-builtin -w -shared -nostdlib -fuse-ld=lld-19 \
      -Wl,-soname,$library.so -x c - -o "$folder/stubs/$library.so"
done

cmake -S "$native/src/main/cpp" -B "$folder/android" -DCMAKE_TOOLCHAIN_FILE="$native/freestanding/toolchain.cmake" \
  -DLORDBA_STUBS="$folder/stubs" >"$folder/android.log" 2>&1 || { cat "$folder/android.log" >&2; exit 1; }
cmake --build "$folder/android" --parallel 2 >>"$folder/android.log" 2>&1 || { cat "$folder/android.log" >&2; exit 1; }
library=$folder/android/onnxruntime/liblordba_ort.so

"$project/scripts/check_android_library.py" "$library" --soname liblordba_ort.so --imports "$native/freestanding/bionic.txt" \
  --exports RegisterCustomOps lordba_active_isa lordba_native_calls
echo "$library"
