import Foundation
import LordbaKit

#if os(iOS)
  import os
#endif

extension Device {
  /// The device that this runs on, for the profile file.
  public static func current() -> Device {
    let info = ProcessInfo.processInfo
    let version = info.operatingSystemVersion
    let total = Int(info.physicalMemory)
    #if os(iOS)
      let (system, free) = ("iOS", Int(os_proc_available_memory()))  // what this app may still take
    #elseif os(macOS)
      let (system, free) = ("macOS", 0)
    #else
      let (system, free) = ("Linux", 0)
    #endif
    return Device(
      device: model(), arch: arch,
      os: "\(system) \(version.majorVersion).\(version.minorVersion).\(version.patchVersion)", totalMem: total,
      availMem: free)
  }

  private static var arch: String {
    #if arch(arm64)
      "arm64"
    #elseif arch(x86_64)
      "x86_64"
    #else
      "unknown"
    #endif
  }

  /// As "iPhone17,1".
  private static func model() -> String {
    var name = utsname()
    guard uname(&name) == 0 else { return "unknown" }
    return withUnsafeBytes(of: &name.machine) { String(decoding: $0.prefix { $0 != 0 }, as: UTF8.self) }
  }
}
