import Foundation
import Testing

@testable import LordbaKit

struct AdapterTests {
  /// values.json: in plain numbers, what the other golden files hold.
  struct Values: Decodable {
    struct Scales: Decodable {
      let `in`: [Float]
      let mid: [Float]
      let out: [Float]
    }

    let d_in: Int
    let d_out: Int
    let r: Int
    let a: [String]
    let b: [String]
    let stored: [String: Scales]

    func rows(_ signs: [String]) -> [[Float]] { signs.map { $0.map { $0 == "-" ? -1 : 1 } } }
  }

  static let values = (try? Golden.json([String: Values].self, "values.json")) ?? [:]

  private func adapter(_ code: ScaleCode) throws -> Adapter {
    try Adapter(folder: Golden.folder.appendingPathComponent("adapter-\(code.rawValue)"))
  }

  @Test(arguments: ScaleCode.allCases)
  func aFolderHoldsTheGoldenValues(_ code: ScaleCode) throws {
    let adapter = try adapter(code)
    #expect(adapter.scaleCode == code)
    #expect(Set(adapter.modules.keys) == Set(Self.values.keys) && !adapter.modules.isEmpty)
    for (path, expected) in Self.values {
      let module = try #require(adapter.modules[path])
      #expect((module.dIn, module.dOut, module.rank) == (expected.d_in, expected.d_out, expected.r))
      #expect(unpackSigns(module.aSigns, columns: module.dIn) == expected.rows(expected.a))
      #expect(unpackSigns(module.bSigns, columns: module.rank) == expected.rows(expected.b))
      let scales = try #require(expected.stored[code.rawValue])
      #expect(module.sIn.decoded == scales.in)
      #expect(module.sMid.decoded == scales.mid)
      #expect(module.sOut.decoded == scales.out)
    }
  }

  @Test(arguments: ScaleCode.allCases)
  func aBlobIsTheGoldenOneByteForByte(_ code: ScaleCode) throws {
    let adapter = try adapter(code)
    let paths = ["layers.0.proj", "layers.1.proj"]
    let blob = AdapterBlob(modules: paths.map { adapter.modules[$0] } + [nil])
    let golden = try Data(contentsOf: Golden.folder.appendingPathComponent("blob-\(code.rawValue).bin"))
    #expect(Data(blob.bytes) == golden)
    let read = try AdapterBlob(bytes: [UInt8](golden), expecting: 3, name: "golden")
    for (i, path) in paths.enumerated() {
      let (parts, expected) = (try #require(read.parts(i)), Self.values[path]!)
      #expect(parts.a == expected.rows(expected.a))
      #expect(parts.b == expected.rows(expected.b))
      let scales = expected.stored[code.rawValue]!
      for (found, wanted) in [(parts.sIn, scales.in), (parts.sMid, scales.mid), (parts.sOut, scales.out)] {
        // int8 in a blob is lo and a step in fp32: one rounding more than in the folder
        #expect(zip(found, wanted).allSatisfy { abs($0 - $1) <= 1e-6 * $1 })
      }
    }
    #expect(read.parts(2) == nil)
  }

  @Test func aDamagedBlobIsRefused() throws {
    let golden = [UInt8](try Data(contentsOf: Golden.folder.appendingPathComponent("blob-log4.bin")))
    func found(_ bytes: [UInt8], _ expected: Int = 3) -> String {
      message { _ = try AdapterBlob(bytes: bytes, expecting: expected, name: "x.blob") }
    }
    #expect(found(Array(golden.dropLast())).contains("truncated"))
    #expect(found([UInt8](golden.prefix(8))).contains("not an adapter blob"))
    #expect(found(golden, 4).contains("fewer modules"))
    var damaged = golden
    damaged[44] = 9  // the first record's scale code
    #expect(found(damaged).contains("damaged record"))
  }

  @Test(arguments: [
    ("peft_type", JSONValue.string("LORA"), "python -m lordba.convert"),
    ("format_version", JSONValue.int(2), "format_version 2"),
    ("scale_code", JSONValue.string("log5"), "log5"),
    ("scale_code", JSONValue.string("fp16"), "does not match its configuration"),
  ])
  func aWrongConfigurationIsRefused(key: String, value: JSONValue, word: String) throws {
    let temporary = try TemporaryFolder()
    let folder = try temporary.copy("adapter-log4")
    let path = folder.appendingPathComponent(Adapter.configName)
    var config = try JSONDecoder().decode([String: JSONValue].self, from: Data(contentsOf: path))
    config[key] = value
    try JSONEncoder().encode(config).write(to: path)
    #expect(message { _ = try Adapter(folder: folder) }.contains(word))
  }

  @Test func aDamagedFileIsRefused() throws {
    let temporary = try TemporaryFolder()
    let folder = try temporary.copy("adapter-log4")
    let path = folder.appendingPathComponent(Adapter.weightsName)
    let whole = try Data(contentsOf: path)
    for bytes in [0, 7, 8, 300, whole.count - 1] {
      try whole.prefix(bytes).write(to: path)
      #expect(message { _ = try Adapter(folder: folder) }.contains(Adapter.weightsName))
    }
    let header = 8 + whole.prefix(8).reversed().reduce(0) { $0 << 8 | Int($1) }
    var dirty = whole
    for i in header..<whole.count { dirty[i] = 0xff }
    try dirty.write(to: path)
    #expect(message { _ = try Adapter(folder: folder) }.contains("padding bits"))
  }

  @Test func halvesAreRoundedAsTheHardwareDoes() {
    for bits in 0...UInt16.max where floatFromHalf(bits).isFinite {
      #expect(halfFromFloat(floatFromHalf(bits)) == bits)
    }
    #expect(halfFromFloat(1 + 0x1p-11) == halfFromFloat(1))  // a tie goes to even
    #expect(halfFromFloat(65520) == 0x7c00 && halfFromFloat(-65519) == 0xfbff)
    #expect(floatFromHalf(0x0001) == 0x1p-24 && floatFromHalf(halfFromFloat(.nan)).isNaN)
  }

  @Test func inputsOfAProgramAreFilled() throws {
    let blob = AdapterBlob(modules: try adapterModules())
    let parts = [blob.parts(0), nil, blob.parts(1)]
    let shapes = [
      "tokens": [1, 8], "a_13x10": [2, 20, 13], "b_13x10": [2, 10, 20], "a_8x9": [1, 20, 8], "b_8x9": [1, 9, 20],
    ]
    let inputs = try #require(AdapterInputs(shapes: shapes, modules: 3))
    let filled = try inputs.fill(parts)
    #expect(filled["a_13x10"]?.shape == [2, 20, 13] && filled["s_out_8x9"]?.shape == [1, 9])
    let a = filled["a_13x10"]!.values.map(floatFromHalf)
    #expect(Array(a[13..<26]) == parts[0]!.a[1])
    #expect(a[(3 * 13)...].allSatisfy { $0 == 0 })  // ranks, and the module, that the adapter lacks
    #expect(filled["s_in_13x10"]!.values.suffix(13).allSatisfy { $0 == 0 })
    let b = filled["b_8x9"]!.values.map(floatFromHalf)
    #expect(Array(b[20..<37]) == parts[2]!.b[1] && Array(b[37..<40]) == [0, 0, 0])
    #expect(
      filled["s_mid_8x9"]!.values.prefix(17).map(floatFromHalf)
        == parts[2]!.sMid.map { floatFromHalf(halfFromFloat($0)) })
    #expect(message { _ = try inputs.fill([parts[0], parts[2], nil]) }.contains("sizes"))
    #expect(AdapterInputs(shapes: ["tokens": [1, 8]], modules: 3) == nil)
  }

  private func adapterModules() throws -> [SignModule?] {
    let modules = try adapter(.log4).modules
    return [modules["layers.0.proj"], modules["layers.1.proj"]]
  }
}
