import Foundation
import Testing

@testable import LordbaKit

/// The golden Llama as a bundle for the reference runtime, with its adapter and one whose first sign is flipped.
final class GoldenModel {
  struct Logits: Decodable {
    let tokens: [Int32]
    let last_logits: [String: [Float]]
  }

  let folder: TemporaryFolder
  let bundle: ModelBundle
  let golden: Logits

  init(rank r: Int = 8) throws {
    folder = try TemporaryFolder()
    let url = folder.url.appendingPathComponent("bundle")
    try FileManager.default.createDirectory(
      at: url.appendingPathComponent("adapters"), withIntermediateDirectories: true)
    let model = Golden.demo.appendingPathComponent("model")
    for name in ["model.safetensors", "config.json"] {
      try FileManager.default.copyItem(at: model.appendingPathComponent(name), to: url.appendingPathComponent(name))
    }
    try FileManager.default.copyItem(
      at: Golden.demo.appendingPathComponent("tokenizer/tokenizer.json"),
      to: url.appendingPathComponent("tokenizer.json"))
    let adapter = try Adapter(folder: model.appendingPathComponent("adapter"))
    let paths = adapter.modules.keys.sorted()
    let blob = AdapterBlob(modules: paths.map { adapter.modules[$0] })
    var flipped = blob.bytes
    flipped[32 + 64 * paths.count] ^= 1  // the first sign of the first A
    try Data(blob.bytes).write(to: url.appendingPathComponent("adapters/adapter.blob"))
    try Data(flipped).write(to: url.appendingPathComponent("adapters/flipped.blob"))
    try Self.writeManifest(url, adapter, paths, blob.bytes.count)
    bundle = try ModelBundle(folder: url)
    golden = try Golden.json(Logits.self, "demo/model/logits.json")
  }

  private static func writeManifest(_ url: URL, _ adapter: Adapter, _ paths: [String], _ bytes: Int) throws {
    let files = try [
      "model.safetensors", "config.json", "tokenizer.json", "adapters/adapter.blob", "adapters/flipped.blob",
    ].map {
      let path = url.appendingPathComponent($0)
      return BundleFile(path: $0, bytes: try Data(contentsOf: path).count, sha256: try sha256(of: path))
    }
    let adapters = ["adapter", "flipped"].map {
      BundleAdapter(
        name: $0, file: "adapters/\($0).blob", rank: adapter.rank, scaleCode: "log4", modules: paths.count,
        bytes: adapter.bytes, fp16LoRABytes: adapter.fp16LoRABytes, fileBytes: bytes)
    }
    func value(_ encodable: some Encodable) throws -> JSONValue {
      try JSONDecoder().decode(JSONValue.self, from: JSONEncoder().encode(encodable))
    }
    let record: [String: JSONValue] = [
      "format_version": .int(1), "target": .string("reference"), "program": .string("model.safetensors"),
      "base": .object(["name": .string("tiny"), "fingerprint": .string(adapter.baseFingerprint ?? "")]),
      "base_quant": .string("none"), "toolchain": .object([:]), "requires": .array([]),
      "adapter_mode": .string("input"), "max_seq_len": .int(48), "eos_ids": .array([.int(2)]),
      "modules": .array(paths.map { .string($0) }), "files": try value(files), "adapters": try value(adapters),
      "parity": .array([]), "tokenizer": .string("tokenizer.json"), "no_adapter": .null,
    ]
    try JSONEncoder().encode(record).write(to: url.appendingPathComponent(Manifest.fileName))
  }

  /// The largest difference from the golden logits.
  func error(_ logits: [Float], from name: String) -> Float {
    zip(logits, golden.last_logits[name]!).map { abs($0 - $1) }.max()!
  }
}

struct ReferenceTests {
  private static let tolerance: Float = 2e-5  // the logits reach 8, the golden ones have 7 digits

  private func logits(_ model: GoldenModel, _ adapter: String?, piece: Int = 100) throws -> [Float] {
    let runner = try ReferenceRunner(model.bundle)
    try runner.use(try runner.load(try adapter.map(model.bundle.adapter), of: model.bundle))
    var result: [Float] = []
    for begin in stride(from: 0, to: model.golden.tokens.count, by: piece) {
      let tokens = Array(model.golden.tokens[begin..<min(begin + piece, model.golden.tokens.count)])
      result = try runner.run(tokens, start: begin)
    }
    return result
  }

  @Test(arguments: [1, 5, 100])
  func logitsAreThoseOfPython(piece: Int) throws {
    let model = try GoldenModel()
    #expect(model.error(try logits(model, nil, piece: piece), from: "none") < Self.tolerance)
    #expect(model.error(try logits(model, "adapter", piece: piece), from: "adapter") < Self.tolerance)
  }

  @Test func withoutTheAdapterOrWithOneFlippedSignTheyAreNot() throws {
    let model = try GoldenModel()
    #expect(model.error(try logits(model, nil), from: "adapter") > 0.1)
    #expect(model.error(try logits(model, "flipped"), from: "adapter") > 10 * Self.tolerance)
  }

  @Test func aModelThatIsNoneOfItsKindIsRefused() throws {
    let model = try GoldenModel()
    let path = model.bundle.folder.appendingPathComponent("config.json")
    let text = try String(contentsOf: path, encoding: .utf8).replacingOccurrences(of: "\"llama\"", with: "\"gpt2\"")
    try text.write(to: path, atomically: true, encoding: .utf8)
    #expect(message { _ = try ReferenceRunner(model.bundle) }.contains("gpt2"))
  }

  @Test func theBenchmarkMeasuresEveryPhase() throws {
    let model = try GoldenModel()
    var benchmark = Benchmark()
    (benchmark.loads, benchmark.swaps, benchmark.prefills, benchmark.decodes) = (1, 2, 2, 3)
    (benchmark.prefillTokens, benchmark.warmUp) = (16, 1)
    var shares: [Double] = []
    let series = try benchmark.run(model.bundle, adapters: ["adapter"]) { shares.append($0) }
    #expect(series.map(\.phase) == ["load", "swap", "swap", "prefill", "prefill", "decode", "decode"])
    #expect(series.map(\.samples.count) == [1, 2, 2, 2, 2, 3, 3])
    #expect(series.allSatisfy { $0.samples.allSatisfy { $0 > 0 } })
    #expect(shares.last == 1 && shares == shares.sorted())
    #expect(series.last?.adapter == "lordba" && series.last?.rank == 8)
  }
}
