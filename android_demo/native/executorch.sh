#!/usr/bin/env bash
# Builds ExecuTorch for the app with the NDK: android_demo/native/executorch.sh FOLDER
# ANDROID_NDK names the NDK, r27 or newer, the same that builds the app. FOLDER receives the sources and the build, about
# 5 GB; the last line is for ~/.gradle/gradle.properties. ExecuTorch's AAR cannot take its place: it exports no symbol that
# operators of ours could register with.
set -euo pipefail

if [ $# != 1 ] || [ ! -f "${ANDROID_NDK:-}/build/cmake/android.toolchain.cmake" ]; then
  echo "usage: ANDROID_NDK=FOLDER_OF_THE_NDK android_demo/native/executorch.sh FOLDER" >&2
  exit 2
fi
project=$(cd "$(dirname "$0")/../.." && pwd)
version=$(sed -n 's/^ *"executorch==\([^"]*\)".*/\1/p' "$project/pyproject.toml")
mkdir -p "$1"
folder=$(cd "$1" && pwd)

if [ ! -d "$folder/executorch" ]; then
  rm -rf "$folder/executorch.partial"
  git clone --depth 1 --branch "v$version" --recurse-submodules --shallow-submodules \
    https://github.com/pytorch/executorch "$folder/executorch.partial"
  mv "$folder/executorch.partial" "$folder/executorch"
fi
cd "$folder/executorch" # its presets are found from here
cmake --preset android-arm64-v8a -B "$folder/build" -DCMAKE_INSTALL_PREFIX="$folder/installed" \
  -DCMAKE_TOOLCHAIN_FILE="$ANDROID_NDK/build/cmake/android.toolchain.cmake" -DANDROID_PLATFORM=android-26 \
  -DCMAKE_BUILD_TYPE=Release -DEXECUTORCH_BUILD_ANDROID_JNI=OFF -DEXECUTORCH_BUILD_KERNELS_QUANTIZED=ON \
  -DEXECUTORCH_BUILD_TESTS=OFF
cmake --build "$folder/build" --parallel --target install
echo "lordba.executorch=$folder/installed"
