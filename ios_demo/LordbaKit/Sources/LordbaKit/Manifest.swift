import Foundation

/// What manifest.json says, format version 1 (docs/format.md); lordba/runtime/bundle.py writes it.
public struct Manifest: Decodable, Equatable, Sendable {
  public static let formatVersion = 1
  public static let fileName = "manifest.json"

  public struct Base: Codable, Equatable, Sendable {
    public let name: String
    /// Hash of the base's weights before quantization.
    public let fingerprint: String
  }

  public let target: String
  public let program: String
  public let base: Base
  public let baseQuant: String
  public let toolchain: [String: String]
  public let requires: [String]
  public let adapterMode: String
  public let maxSeqLen: Int
  public let eosIDs: [Int]
  /// Paths of the adapted modules in the order of the program's blob; nil stands for a layer never adapted.
  public let modules: [String?]
  public internal(set) var files: [BundleFile]
  public internal(set) var adapters: [BundleAdapter]
  public let parity: [ParityCheck]
  public let tokenizer: String?
  /// The file that stands for "no adapter", where the program needs one.
  public let noAdapter: String?

  private enum Key: String, CodingKey {
    case target, program, base, toolchain, requires, modules, files, adapters, parity, tokenizer
    case baseQuant = "base_quant"
    case adapterMode = "adapter_mode"
    case maxSeqLen = "max_seq_len"
    case eosIDs = "eos_ids"
    case noAdapter = "no_adapter"
  }

  public init(from decoder: any Decoder) throws {
    let record = try decoder.container(keyedBy: Key.self)
    target = try record.decode(String.self, forKey: .target)
    program = try record.decode(String.self, forKey: .program)
    base = try record.decode(Base.self, forKey: .base)
    baseQuant = try record.decode(String.self, forKey: .baseQuant)
    toolchain = try record.decode([String: String].self, forKey: .toolchain)
    requires = try record.decode([String].self, forKey: .requires)
    adapterMode = try record.decode(String.self, forKey: .adapterMode)
    maxSeqLen = try record.decode(Int.self, forKey: .maxSeqLen)
    eosIDs = try record.decode([Int].self, forKey: .eosIDs)
    modules = try record.decode([String?].self, forKey: .modules)
    files = try record.decode([BundleFile].self, forKey: .files)
    adapters = try record.decode([BundleAdapter].self, forKey: .adapters)
    parity = try record.decode([ParityCheck].self, forKey: .parity)
    tokenizer = try record.decode(String?.self, forKey: .tokenizer)  // null is allowed, absence is not
    noAdapter = try record.decode(String?.self, forKey: .noAdapter)
  }
}

/// A file of the bundle, relative to its folder.
public struct BundleFile: Codable, Equatable, Sendable {
  public let path: String
  public let bytes: Int
  public let sha256: String
}

/// An adapter of the bundle: `bytes` are signs and scales as stored, `fileBytes` the runtime's file.
///
/// An adapter that is a function of the program has the program as its file; `fileBytes` is what it adds to it.
public struct BundleAdapter: Codable, Equatable, Sendable {
  public let name: String
  public let file: String
  public let rank: Int
  public let scaleCode: String
  public let modules: Int
  public let bytes: Int
  public let fp16LoRABytes: Int
  public let fileBytes: Int
  /// The program's function that holds this adapter, where adapters are functions.
  public let function: String?

  private enum CodingKeys: String, CodingKey {
    case name, file, modules, bytes, function
    case rank = "r"
    case scaleCode = "scale_code"
    case fp16LoRABytes = "fp16_lora_bytes"
    case fileBytes = "file_bytes"
  }

  public init(
    name: String, file: String, rank: Int, scaleCode: String, modules: Int, bytes: Int, fp16LoRABytes: Int,
    fileBytes: Int, function: String? = nil
  ) {
    self.name = name
    self.file = file
    self.rank = rank
    self.scaleCode = scaleCode
    self.modules = modules
    self.bytes = bytes
    self.fp16LoRABytes = fp16LoRABytes
    self.fileBytes = fileBytes
    self.function = function
  }

  /// Stored bits per element of A and B.
  public var bitsPerWeight: Double { 16 * Double(bytes) / Double(fp16LoRABytes) }
}

/// One measured figure of the export with its limit.
public struct ParityCheck: Codable, Equatable, Sendable {
  public let check: String
  public let adapter: String?
  public let metric: String
  public let value: Double
  public let limit: Double
  public let passed: Bool
}
