#!/usr/bin/env bash
# Checks ios_demo away from Apple systems. Each step says what it proves; any failure fails the whole.
# Where Swift cannot be set up within LORDBA_SWIFT_SETUP_SECONDS (default 900), everything but the parser is skipped, loudly.
set -euo pipefail
project=$(cd "$(dirname "$0")/.." && pwd)
cd "$project"
cache=${LORDBA_SWIFT_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/lordba-swift}
started=$SECONDS
step() { printf '\n--- [%3d s] ios: %s\n' $((SECONDS - started)) "$*"; }
swift() { scripts/swift_toolchain.sh "$@"; }

step "every Swift file parses with tree-sitter's grammar: no typing error, no forgotten brace"
if [ ! -d "$cache/tree-sitter-0.26.1" ]; then
  python3 -m pip install -q --target "$cache/tree-sitter.partial" tree-sitter==0.26.1 tree-sitter-swift==0.7.4
  mv "$cache/tree-sitter.partial" "$cache/tree-sitter-0.26.1"
fi
PYTHONPATH="$cache/tree-sitter-0.26.1" python3 scripts/parse_swift.py ios_demo

step "Swift for Linux"
if ! timeout "${LORDBA_SWIFT_SETUP_SECONDS:-900}" scripts/swift_toolchain.sh >/dev/null; then
  printf '\n%s\n' "################ SKIPPED: Swift could not be set up; LordbaKit was NOT built and NOT tested ################"
  exit 0
fi
swift swift --version 2>/dev/null | head -n 1

step "style: swift-format's rules hold in the package and the app"
swift swift-format lint --strict --recursive --parallel LordbaKit/Package.swift LordbaKit/Sources/LordbaKit \
  LordbaKit/Sources/LordbaDemo LordbaKit/Tests App

step "the app's sources parse with Swift's own parser; their types need Xcode"
swift sh -c 'swiftc -parse -swift-version 6 -warnings-as-errors $(find App -name "*.swift")'

step "the code for Core ML and ExecuTorch fits declarations of what it calls (ios_demo/stubs), written from Apple's and ExecuTorch's"
swift sh stubs/typecheck.sh

step "the kernels compile and assemble for Apple's arm64, without warnings"
swift sh -c 'for file in LordbaKit/Sources/CLordba/kernels/*.c; do
  case $file in */avx*) continue ;; esac
  clang --target=arm64-apple-ios17 -ffreestanding -isystem stubs/include -std=c11 -O2 -Wall -Wextra -Werror \
    -c "$file" -o /dev/null || exit 1
done'

step "LordbaKit builds with strict concurrency, no warnings, and does on Linux what the golden files say"
log=$cache/swift-test.log
status=0
# --allow-shlib-undefined: Debian's libswiftObservation lacks a function that ends programs with a message.
swift swift test --disable-xctest --package-path LordbaKit --scratch-path /var/tmp/lordba-kit \
  -Xswiftc -warnings-as-errors -Xlinker --allow-shlib-undefined >"$log" 2>&1 || status=$?
grep -vE '^\[[0-9]+/[0-9]+\]|^◇|^✔ Suite' "$log" || true
passed=$(grep -cE '^✔ Test .* passed after' "$log" || true)
failed=$(grep -cE '^✘ Test .* failed after' "$log" || true)
whole=$(grep -cE '^[✔✘] Test run with' "$log" || true) # the runner's own sum, not a test
[ "$whole" = 1 ] || { echo "error: swift test did not come to its end"; exit 1; }
if [ "$status" = 0 ]; then passed=$((passed - 1)); else failed=$((failed - 1)); fi
echo "$passed passed, $failed failed"
grep -qE "^[✔✘] Test run with $((passed + failed)) tests" "$log" || { echo "error: another sum than the runner's"; exit 1; }
exit "$status"
