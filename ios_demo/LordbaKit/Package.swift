// swift-tools-version: 6.0
import PackageDescription

let package = Package(
  name: "LordbaKit",
  platforms: [.iOS(.v17), .macOS(.v14)],
  products: [
    .library(name: "LordbaKit", targets: ["LordbaKit"]),
    .library(name: "LordbaDemo", targets: ["LordbaDemo"]),
  ],
  targets: [
    // backends/kernels, as it is. SwiftPM has no flags per file, so the sets of x86, which need them, stay out.
    .target(
      name: "CLordba",
      exclude: ["kernels/CMakeLists.txt", "kernels/avx2.c", "kernels/avx512.c"],
      cSettings: [.define("LORDBA_WITHOUT_X86")]
    ),
    .target(name: "LordbaKit", dependencies: ["CLordba"]),
    // The models behind the app's screens: all of the app but its views.
    .target(name: "LordbaDemo", dependencies: ["LordbaKit"]),
    .testTarget(name: "LordbaKitTests", dependencies: ["LordbaKit", "LordbaDemo"]),
  ]
)
