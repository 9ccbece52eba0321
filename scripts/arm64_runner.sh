#!/usr/bin/env bash
# Cross-compiles the runner and the trainer (backends/executorch/runner) for 64-bit ARM Linux:
# scripts/arm64_runner.sh FOLDER
# FOLDER, outside the checkout, receives ExecuTorch's aarch64 package, downloaded once, and the build.
# Needs scripts/arm64_toolchain.sh and CMake >= 3.28. The last line says where the
# runner lies; the trainer lies beside it.
set -euo pipefail

if [ $# != 1 ]; then
  echo "usage: scripts/arm64_runner.sh FOLDER" >&2
  exit 2
fi
project=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$1"
folder=$(cd "$1" && pwd)
version=$(sed -n 's/^ *"executorch==\([^"]*\)".*/\1/p' "$project/pyproject.toml")
package="$folder/executorch-$version"

if [ ! -d "$package" ]; then
  python3 -m pip install -q --no-deps --no-compile --only-binary=:all: --platform manylinux_2_28_aarch64 \
    --target "$package.partial" "executorch==$version"
  mv "$package.partial" "$package"
fi

cmake -S "$project/backends/executorch/runner" -B "$folder/build" -DCMAKE_SYSTEM_NAME=Linux \
  -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_C_COMPILER=aarch64-linux-gnu-gcc \
  -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DCMAKE_PREFIX_PATH="$package/executorch" >"$folder/cmake.log"
cmake --build "$folder/build" --parallel 2 >>"$folder/cmake.log"
echo "$folder/build/lordba_runner"
