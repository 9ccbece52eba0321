import Foundation
import Testing

@testable import LordbaKit

/// tests/golden, which the Python package writes and all languages are tested against.
enum Golden {
  static let folder: URL = (0..<5).reduce(URL(fileURLWithPath: #filePath)) { path, _ in path.deletingLastPathComponent()
  }
  .appendingPathComponent("tests/golden")
  static let demo = folder.appendingPathComponent("demo")

  static func json<Value: Decodable>(_ type: Value.Type, _ path: String) throws -> Value {
    try JSONDecoder().decode(type, from: Data(contentsOf: folder.appendingPathComponent(path)))
  }
}

/// A folder that goes away with the test.
final class TemporaryFolder {
  let url: URL

  init() throws {
    url = FileManager.default.temporaryDirectory.appendingPathComponent("lordba-\(UUID().uuidString)")
    try FileManager.default.createDirectory(at: url, withIntermediateDirectories: true)
  }

  deinit { try? FileManager.default.removeItem(at: url) }

  /// A copy of one of the golden folders.
  func copy(_ path: String) throws -> URL {
    let target = url.appendingPathComponent((path as NSString).lastPathComponent)
    try FileManager.default.copyItem(at: Golden.folder.appendingPathComponent(path), to: target)
    return target
  }
}

/// What a call throws, in words.
func message(of body: () throws -> Void) -> String {
  do {
    try body()
  } catch {
    return "\(error)"
  }
  Issue.record("nothing was thrown")
  return ""
}
