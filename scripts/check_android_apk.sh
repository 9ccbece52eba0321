#!/usr/bin/env bash
# Builds the thin app (android_demo/thin) without the Android SDK, and reads what came out:
#
#   scripts/check_android_apk.sh FOLDER
#
# FOLDER, outside the checkout, receives the build; the last line says where the APK lies. It holds the ONNX runner alone:
# liblordba_jni.so needs the NDK. The signing key is made here and thrown away. Downloads: see scripts/android_toolchain.sh.
set -euo pipefail

if [ $# != 1 ]; then
  echo "usage: scripts/check_android_apk.sh FOLDER" >&2
  exit 2
fi
project=$(cd "$(dirname "$0")/.." && pwd)
demo=$project/android_demo
mkdir -p "$1"
folder=$(cd "$1" && pwd)
started=$SECONDS
step() { printf '[%3d s] %s\n' $((SECONDS - started)) "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }
quietly() { "$@" >"$folder/step.log" 2>&1 || { cat "$folder/step.log" >&2; fail "failed: $*"; }; }

step "toolchain, in pinned versions"
paths=$("$project/scripts/android_toolchain.sh" apk native) && eval "$paths"
export JAVA_HOME JAVA_OPTS="-XX:TieredStopAtLevel=1 -XX:+UseSerialGC -Xmx1g" # short runs: compiling hot code does not pay
work=$folder/work
rm -rf "$work"
mkdir -p "$work/apk/lib/arm64-v8a"
trap 'rm -f "$work/key"' EXIT

step "core, runners and Activity compile against the real android.jar (API 23) and ONNX Runtime's own classes"
mapfile -t sources < <(find "$demo"/{core/src/main,native/src/main,thin/src} -name '*.kt')
quietly "$KOTLINC" -Werror -jvm-target 1.8 -Xlambdas=class -Xsam-conversions=class -Xstring-concat=inline \
  -cp "$ANDROID_JAR:$ONNXRUNTIME_JAR:$GSON_JAR" -d "$work/app.jar" "${sources[@]}"

step "everything that Java runs becomes one classes.dex for API 26: lambdas and nests as Android has them, each class verified"
"$JAVA_HOME/bin/java" -XX:TieredStopAtLevel=1 -cp "$ASM_CLASSPATH" "$project/scripts/Desugar.java" "$work/desugared.jar" \
  "$work/app.jar" "$(dirname "$(dirname "$KOTLINC")")/lib/kotlin-stdlib.jar" "$GSON_JAR" "$ONNXRUNTIME_JAR"
quietly "$DX" --dex --min-sdk-version=26 --output="$work/apk/classes.dex" "$work/desugared.jar"

step "the operator library links for Android; ONNX Runtime's own libraries come from its AAR"
library=$("$project/scripts/check_android_native.sh" "$folder/native" | tail -n 1)
cp "$library" "$ONNXRUNTIME_LIBRARIES"/*.so "$work/apk/lib/arm64-v8a/"

step "manifest and resources are packed, aligned to 16 KB and signed with a key that nobody keeps"
quietly "$AAPT" package -f -M "$demo/thin/AndroidManifest.xml" -I "$ANDROID_RESOURCES" -F "$work/resources.apk"
"$project/scripts/pack_apk.py" "$work/resources.apk" "$work/apk" "$work/unsigned.apk"
quietly "$JAVA_HOME/bin/keytool" -genkeypair -keystore "$work/key" -storetype PKCS12 -storepass throwaway -alias key \
  -keyalg EC -groupname secp256r1 -validity 365 -dname "CN=thrown away"
quietly "$APKSIGNER" sign --ks "$work/key" --ks-pass pass:throwaway --min-sdk-version 26 --out "$folder/lordba-thin.apk" \
  "$work/unsigned.apk"

step "what came out: signatures, alignment, the manifest as Android reads it, the classes in the dex"
"$APKSIGNER" verify --verbose --min-sdk-version 26 "$folder/lordba-thin.apk" 2>&1 | grep -E '^Verified using v[23] .*true' ||
  fail "the signature does not verify"
quietly "$ZIPALIGN" -c -p 4 "$folder/lordba-thin.apk"
"$project/scripts/pack_apk.py" --check "$folder/lordba-thin.apk"
"$AAPT" dump badging "$folder/lordba-thin.apk" >"$work/badging"
grep -E '^(package|sdkVersion|launchable-activity|native-code)' "$work/badging"
if grep '^uses-permission' "$work/badging"; then fail "the app asks for a permission"; fi
grep -q "^launchable-activity: name='ai.lordba.demo.thin.MainActivity'" "$work/badging" || fail "no Activity to start"
"$DEXDUMP" -d "$folder/lordba-thin.apk" >"$work/dump"
sed -n "s/^  Class descriptor  : '\(.*\)'/\1/p" "$work/dump" >"$work/classes"
for class in ai/lordba/demo/thin/MainActivity ai/lordba/demo/core/AdapterBank ai/lordba/demo/runtime/OrtRunner \
  ai/lordba/demo/runtime/ExecuTorchRunner ai/onnxruntime/OrtLoraAdapter kotlin/jvm/internal/Intrinsics; do
  grep -qx "L$class;" "$work/classes" || fail "the dex lacks $class"
done
if grep -q 'invoke-custom' "$work/dump"; then fail "the dex asks for a LambdaMetafactory, which Android lacks"; fi
echo "classes.dex: $(wc -l <"$work/classes") classes"

step "done; it never ran: install it with adb install $folder/lordba-thin.apk"
echo "$folder/lordba-thin.apk"
