#!/usr/bin/env bash
# Installs what builds and runs 64-bit ARM code on another machine: Debian's cross compiler and qemu's user emulation.
# Does nothing where both are there. Prints the compiler, the emulator and the folder of the ARM system libraries.
set -euo pipefail

missing() { ! command -v aarch64-linux-gnu-g++ >/dev/null || ! command -v qemu-aarch64-static >/dev/null; }

if missing; then
  as_root=""
  [ "$(id -u)" = 0 ] || as_root=sudo
  $as_root apt-get update -qq
  DEBIAN_FRONTEND=noninteractive $as_root apt-get install -y -qq --no-install-recommends \
    g++-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user-static >/dev/null
fi
if missing; then
  echo "error: g++-aarch64-linux-gnu and qemu-user-static are installed but not in PATH" >&2
  exit 1
fi

echo "compiler  $(command -v aarch64-linux-gnu-g++) ($(aarch64-linux-gnu-g++ -dumpfullversion))"
echo "emulator  $(command -v qemu-aarch64-static) ($(qemu-aarch64-static --version | head -n 1 | cut -d ' ' -f 3))"
echo "system    /usr/aarch64-linux-gnu"
