#!/usr/bin/env bash
# Sets up ONNX Runtime for 64-bit ARM under emulation: scripts/arm64_onnxruntime.sh FOLDER
# FOLDER, outside the checkout, receives an ARM system with Python, qemu 10 (7.2 cannot run ONNX Runtime) and the
# packages, each made once. The last line says which command runs ARM's Python.
set -euo pipefail

if [ $# != 1 ]; then
  echo "usage: scripts/arm64_onnxruntime.sh FOLDER" >&2
  exit 2
fi
project=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$1"
folder=$(cd "$1" && pwd)
version=$(sed -n 's/.*"onnxruntime==\([^"]*\)".*/\1/p' "$project/pyproject.toml" | head -n 1)
mirror=$({ cat /etc/apt/sources.list /etc/apt/sources.list.d/debian.sources 2>/dev/null || true; } |
  sed -n -e 's/^URIs: *\([^ ]*\).*/\1/p' -e 's/^deb \(\[[^]]*\] \)\?\([^ ]*\) .*/\2/p' | grep -v security | head -n 1)

if [ ! -d "$folder/system" ]; then
  if ! command -v mmdebstrap >/dev/null; then
    as_root=""
    [ "$(id -u)" = 0 ] || as_root=sudo
    $as_root apt-get update -qq
    DEBIAN_FRONTEND=noninteractive $as_root apt-get install -y -qq --no-install-recommends mmdebstrap >/dev/null
  fi
  rm -rf "$folder/system.partial"
  mode=$([ "$(id -u)" = 0 ] && echo root || echo unshare)
  mmdebstrap --quiet --mode="$mode" --variant=extract --architectures=arm64 \
    --include=python3,python3-minimal,libstdc++6,libgcc-s1,libgomp1,libexpat1,zlib1g,libffi8 \
    bookworm "$folder/system.partial" "$mirror" 2>"$folder/system.log" || { cat "$folder/system.log" >&2; exit 1; }
  # Our Android library asks for Android's name of it.
  ln -s libc.so.6 "$folder/system.partial/lib/aarch64-linux-gnu/libc.so"
  mv "$folder/system.partial" "$folder/system"
fi

if [ ! -x "$folder/qemu-aarch64" ]; then
  apt=$folder/apt
  mkdir -p "$apt/lists/partial"
  printf 'Types: deb\nURIs: %s\nSuites: bookworm-backports\nComponents: main\nSigned-By: %s\n' "$mirror" \
    /usr/share/keyrings/debian-archive-keyring.gpg >"$apt/debian.sources"
  options=(-qq -o "Dir::Etc::sourcelist=$apt/debian.sources" -o Dir::Etc::sourceparts=/dev/null
    -o "Dir::State::lists=$apt/lists" -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache= -o APT::Sandbox::User=root)
  apt-get "${options[@]}" update
  (cd "$apt" && apt-get "${options[@]}" download qemu-user)
  dpkg -x "$apt"/qemu-user_*.deb "$apt/unpacked"
  cp "$apt/unpacked/usr/bin/qemu-aarch64" "$folder/"
  rm -r "$apt"
fi

if [ ! -d "$folder/packages" ]; then
  rm -rf "$folder/packages.partial"
  python3 -m pip install -q --no-compile --only-binary=:all: --platform manylinux_2_28_aarch64 --platform \
    manylinux_2_27_aarch64 --platform manylinux2014_aarch64 --python-version 3.11 --no-deps \
    --target "$folder/packages.partial" "onnxruntime==$version" "numpy<3"
  mv "$folder/packages.partial" "$folder/packages"
fi

cat >"$folder/python" <<EOF
#!/bin/sh
exec "$folder/qemu-aarch64" -L "$folder/system" \${QEMU_CPU_MODEL:+-cpu "\$QEMU_CPU_MODEL"} \\
  -E PYTHONPATH="$folder/packages\${PYTHONPATH:+:\$PYTHONPATH}" "$folder/system/usr/bin/python3.11" "\$@"
EOF
chmod +x "$folder/python"
echo "$folder/python"
