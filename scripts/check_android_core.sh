#!/usr/bin/env bash
# Checks android_demo without the Android SDK: core is compiled and tested on the JVM against the golden files that Python
# wrote, app is compiled against real Android classes and stubs of AndroidX, and Python reads what core writes.
#
#   scripts/check_android_core.sh [STEP...]      STEPs: core app style back (default: all)
#
# PYTHON names an interpreter that has lordba (default: python). See scripts/android_toolchain.sh for what is installed.
set -euo pipefail
cd "$(dirname "$0")/.."
started=$SECONDS
step() { printf -- '--- [%3d s] %s\n' $((SECONDS - started)) "$*"; }
wanted=${*:-core app style back}
python=${PYTHON:-python}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
demo=android_demo

paths=$(scripts/android_toolchain.sh apk) && eval "$paths"
export JAVA_HOME JAVA_OPTS="-XX:TieredStopAtLevel=1 -XX:+UseSerialGC -Xmx1g" # short runs: compiling hot code does not pay
kotlin=$(dirname "$KOTLINC")/../lib
coroutines=$kotlin/kotlinx-coroutines-core-jvm.jar
# The Kotlin that gradle/libs.versions.toml names; the compiler here is newer.
language=$(sed -n 's/^kotlin = "\([0-9]*\.[0-9]*\).*/\1/p' $demo/gradle/libs.versions.toml)
compile() { "$KOTLINC" -Werror -language-version "$language" -api-version "$language" "$@"; }

# What an API-23 phone has of Java is all that core may use; android.jar stands in for the JDK's classes.
step "core compiles as Kotlin $language for Java 8, against API 23's classes and Gson alone"
compile -no-jdk -jvm-target 1.8 -cp "$ANDROID_JAR:$GSON_JAR" -d "$work/core.jar" $demo/core/src/main/kotlin

for part in $wanted; do
  case $part in
    core)
      step "core's tests run on the JVM against tests/golden: manifest, signs and scales, blobs, tokenizers, sampling, profile"
      compile -jvm-target 1.8 -Xfriend-paths="$work/core.jar" -cp "$GSON_JAR:$work/core.jar:$JUNIT_CLASSPATH" \
        -d "$work/tests.jar" $demo/core/src/test/kotlin $demo/checks/RunTests.kt
      mkdir "$work/written" "$work/smollm2"
      options=("-Dlordba.golden=tests/golden" "-Dlordba.written=$work/written")
      if "$python" $demo/checks/tokenizer_cases.py "$work/smollm2"; then options+=("-Dlordba.smollm2=$work/smollm2"); fi
      names=$(cd $demo/core/src/test/kotlin && find . -name '*Test.kt' | sed 's,^\./,,; s,/,.,g; s,\.kt$,,' | sort)
      # shellcheck disable=SC2086
      "$JAVA_HOME/bin/java" "${options[@]}" -cp "$GSON_JAR:$work/core.jar:$work/tests.jar:$JUNIT_CLASSPATH" \
        ai.lordba.demo.checks.RunTestsKt $names
      ;;
    back)
      step "Python reads what the tests wrote: adapter folders, installed adapters, profile"
      [ -d "$work/written" ] || { echo "error: back needs core before it" >&2; exit 2; }
      "$python" $demo/checks/read_back.py "$work/written"
      ;;
    app)
      step "app's resources and manifest compile with aapt"
      mkdir -p "$work/generated" "$work/classes"
      sed 's,<manifest ,&package="ai.lordba.demo" ,; s,[$]{applicationId},ai.lordba.demo,' $demo/app/src/main/AndroidManifest.xml >"$work/AndroidManifest.xml"
      "$AAPT" package -f -m -J "$work/generated" -M "$work/AndroidManifest.xml" -S $demo/app/src/main/res -I "$ANDROID_RESOURCES"
      "$JAVA_HOME/bin/javac" -nowarn -d "$work/classes" "$work/generated/ai/lordba/demo/R.java"
      step "app and native's Kotlin pass the Compose compiler, against API 23, ONNX Runtime's classes and STUBS of AndroidX"
      compile -Xplugin="$kotlin/compose-compiler-plugin.jar" -jvm-target 1.8 -cp "$ANDROID_JAR:$GSON_JAR:$work/core.jar:$coroutines:$ONNXRUNTIME_JAR:$work/classes" \
        -d "$work/app.jar" $demo/app/src/main/kotlin $demo/native/src/main/kotlin $demo/checks/stubs
      step "app asks for no permission, and takes the network's away from its libraries"
      if grep 'android.permission' $demo/app/src/main/AndroidManifest.xml | grep -v INTERNET; then exit 1; fi
      grep -A1 'permission.INTERNET' $demo/app/src/main/AndroidManifest.xml | grep -q 'tools:node="remove"'
      ;;
    style)
      step "ktlint is clean"
      "$KTLINT" --log-level=error "$demo/**/*.kt" "$demo/**/*.kts" "!$demo/checks/stubs/**"
      ;;
    *)
      echo "error: $part is no step; take core, app, style or back" >&2
      exit 2
      ;;
  esac
done
step "all of $wanted passed"
