import Foundation
import Testing

@testable import LordbaKit

struct BundleTests {
  struct Damage: Decodable, Sendable, CustomTestStringConvertible {
    let kind: String
    let file: String?
    let set: [String: JSONValue]?
    let remove: String?
    let error: [String]

    var testDescription: String { "\(kind) \(file ?? remove ?? set?.keys.first ?? "")" }

    static let all: [Damage] = (try? Golden.json([Damage].self, "demo/bundle-damaged.json")) ?? []

    func apply(to bundle: URL) throws {
      let path = bundle.appendingPathComponent(file ?? Manifest.fileName)
      switch kind {
      case "flip_byte":
        var data = try Data(contentsOf: path)
        data[data.count / 2] ^= 1
        try data.write(to: path)
      case "truncate": try Data(contentsOf: path).dropLast(1).write(to: path)
      case "remove": try FileManager.default.removeItem(at: path)
      case "manifest":
        var record = try JSONDecoder().decode([String: JSONValue].self, from: Data(contentsOf: path))
        for (key, value) in set ?? [:] { record[key] = value }
        if let remove { record[remove] = nil }
        try JSONEncoder().encode(record).write(to: path)
      default: Issue.record("unknown damage \(kind)")
      }
    }
  }

  @Test func aWholeBundleIsRead() throws {
    let bundle = try ModelBundle(folder: Golden.demo.appendingPathComponent("bundle"), target: "executorch")
    #expect(bundle.manifest.modules == ["layers.0.proj", "layers.1.proj"])
    #expect(bundle.manifest.eosIDs == [0, 2])
    #expect(try bundle.adapter("golden").rank == 17)
    #expect(message { _ = try bundle.adapter("other") }.contains("golden, none"))
    #expect(message { _ = try ModelBundle(folder: bundle.folder, target: "coreml") }.contains("--target coreml"))
  }

  @Test(arguments: Damage.all)
  func aDamagedBundleIsRefused(_ damage: Damage) throws {
    let temporary = try TemporaryFolder()
    let bundle = try temporary.copy("demo/bundle")
    _ = try ModelBundle(folder: bundle)
    try damage.apply(to: bundle)
    let found = message { _ = try ModelBundle(folder: bundle) }
    for word in damage.error { #expect(found.contains(word), "\(found)") }
  }

  @Test func allDamagesAreThere() { #expect(Damage.all.count >= 6) }

  @Test func aLinkOutOfTheBundleIsRefused() throws {
    let temporary = try TemporaryFolder()
    let bundle = try temporary.copy("demo/bundle")
    let program = bundle.appendingPathComponent("model.bin")
    let outside = temporary.url.appendingPathComponent("outside.bin")
    try FileManager.default.moveItem(at: program, to: outside)
    try FileManager.default.createSymbolicLink(at: program, withDestinationURL: outside)
    #expect(message { _ = try ModelBundle(folder: bundle) }.contains("outside the bundle"))
  }

  @Test(arguments: [
    ("", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"),
    ("abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
    (
      "abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq",
      "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1"
    ),
  ])
  func theDigestIsThatOfTheStandard(text: String, digest: String) {
    #expect(sha256(of: Data(text.utf8)) == digest)
  }

  @Test func anAdapterComesAndGoes() throws {
    let temporary = try TemporaryFolder()
    let folder = try temporary.copy("demo/bundle")
    let adapter = try Adapter(folder: Golden.folder.appendingPathComponent("adapter-log4"))
    let more = try ModelBundle(folder: folder).installing("second", adapter)
    let read = try ModelBundle(folder: folder)
    #expect(read == more)
    #expect(read.manifest.adapters.map(\.name) == ["golden", "second"])
    let golden = try Data(contentsOf: folder.appendingPathComponent("adapters/golden.bin"))
    #expect(try Data(contentsOf: read.adapterFile("second")!) == golden)
    _ = try read.removing("second")
    #expect(
      try ModelBundle(folder: folder).manifest
        == ModelBundle(folder: Golden.demo.appendingPathComponent("bundle")).manifest)
    #expect(message { _ = try read.installing("../x", adapter) }.contains("file name"))
    let other = try Adapter(folder: Golden.demo.appendingPathComponent("model/adapter"))
    #expect(message { _ = try read.installing("x", other) }.contains("its own base"))
  }
}
