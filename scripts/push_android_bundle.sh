#!/usr/bin/env bash
# Pushes a bundle made by `python -m lordba.export --android` to the folder of the demo app on the phone that adb sees:
#
#   scripts/push_android_bundle.sh BUNDLE [NAME]
#
# NAME is what the app lists it as (default: the folder's name). The app must be installed; it verifies every file when
# it opens the bundle. ADB names another adb, ANDROID_SERIAL one of several phones.
set -euo pipefail
fail() { printf 'error: %s\n' "$*" >&2; exit 2; }

[ $# = 1 ] || [ $# = 2 ] || { sed -n '2,/^set /{/^#/p}' "$0" >&2; exit 2; }
bundle=${1%/}
name=${2:-$(basename "$bundle")}
adb=${ADB:-adb}
package=ai.lordba.demo
folder=/sdcard/Android/data/$package/files/bundles

[ -f "$bundle/manifest.json" ] || fail "$bundle: holds no manifest.json; make a bundle: python -m lordba.export --android"
grep -q '"android"' "$bundle/manifest.json" || fail "$bundle: was exported without --android; export it with that"
case $name in
  '' | .* | *[!A-Za-z0-9._-]*) fail "$name: no usable name; take letters, digits, - _ and ." ;;
esac
command -v "$adb" >/dev/null || fail "$adb: not found; install the platform tools, or name it with ADB="
"$adb" get-state >/dev/null || fail "adb sees no phone; connect one with USB debugging, or set ANDROID_SERIAL"
[ -n "$("$adb" shell pm list packages "$package")" ] || fail "$package is not installed; run it once from Android Studio"

# The app lists no folder whose name begins with a dot: half a bundle is never seen.
"$adb" shell "mkdir -p $folder && rm -rf $folder/.$name.partial"
"$adb" push "$bundle/." "$folder/.$name.partial/"
"$adb" shell "rm -rf $folder/$name && mv $folder/.$name.partial $folder/$name"
echo "pushed as $name; open Models in the app and refresh"
