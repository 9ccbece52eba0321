#!/bin/sh
# Runs inside scripts/swift_toolchain.sh, in ios_demo. Compiles LordbaKit, LordbaDemo, and what of the app imports no
# SwiftUI, against the stubs, with CoreML and ExecuTorch as if they were there.
set -eu
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
common="-swift-version 6 -warnings-as-errors -parse-as-library -I $out -I LordbaKit/Sources/CLordba/include"
module() {
  name=$1
  shift
  swiftc -emit-module -wmo -enable-testing $common -module-name "$name" -emit-module-path "$out/$name.swiftmodule" "$@"
}
module CoreML stubs/CoreML.swift
module ExecuTorch stubs/ExecuTorch.swift
module LordbaKit $(find LordbaKit/Sources/LordbaKit -name '*.swift')
module LordbaDemo $(find LordbaKit/Sources/LordbaDemo -name '*.swift')
swiftc -typecheck -wmo $common -module-name LordbaDemoApp App/AppModel.swift App/Runtimes/*.swift
echo "types fit"
