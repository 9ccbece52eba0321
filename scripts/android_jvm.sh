#!/usr/bin/env bash
# Builds what the app runs an ExecuTorch bundle with for a JVM on this machine: scripts/android_jvm.sh FOLDER
# The native library as the app's CMake project builds it, against the installed executorch package, and the Kotlin above
# it. FOLDER, outside the checkout, receives both; the last line says which command runs android_demo's RunBundle.kt.
# Needs scripts/android_toolchain.sh (called here), CMake >= 3.28 and a Python with executorch.
set -euo pipefail

if [ $# != 1 ]; then
  echo "usage: scripts/android_jvm.sh FOLDER" >&2
  exit 2
fi
project=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$1"
folder=$(cd "$1" && pwd)
paths=$("$project/scripts/android_toolchain.sh" apk) && eval "$paths"
export JAVA_HOME JAVA_OPTS="-XX:TieredStopAtLevel=1 -XX:+UseSerialGC -Xmx1g" # short runs: compiling hot code does not pay
executorch=$(python3 -c "from importlib.util import find_spec; print(*find_spec('executorch').submodule_search_locations)")

{
  JAVA_HOME=$JAVA_HOME cmake -S "$project/android_demo/native/src/main/cpp" -B "$folder/native" \
    -DLORDBA_EXECUTORCH="$executorch"
  cmake --build "$folder/native" --parallel 2 --target lordba_jni lordba_onnxruntime
} >"$folder/cmake.log" 2>&1 || { cat "$folder/cmake.log" >&2; exit 1; }

mapfile -t sources < <(find "$project"/android_demo/{core/src/main,native/src/main,native/src/test} -name '*.kt')
libraries=$GSON_JAR:$ONNXRUNTIME_JAR
"$KOTLINC" -Werror -jvm-target 1.8 -cp "$libraries" -d "$folder/runtime.jar" "${sources[@]}" >&2

stdlib=$(dirname "$(dirname "$KOTLINC")")/lib/kotlin-stdlib.jar
cat >"$folder/run_bundle" <<EOF
#!/bin/sh
exec "$JAVA_HOME/bin/java" -Xcheck:jni -Dfile.encoding=UTF-8 -Djava.library.path="$folder/native" \\
  -cp "$folder/runtime.jar:$libraries:$stdlib" ai.lordba.demo.runtime.RunBundleKt "\$@"
EOF
chmod +x "$folder/run_bundle"
echo "$folder/run_bundle"
