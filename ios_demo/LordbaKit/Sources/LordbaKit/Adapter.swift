import Foundation

/// The adapter of one linear layer: y += s_out * (B (s_mid * (A (s_in * x)))), A and B of +1 and -1.
public struct SignModule: Equatable, Sendable {
  /// [r][ceil(dIn/8)], least significant bit first, bit 1 = -1.
  public let aSigns: [UInt8]
  /// [dOut][ceil(r/8)].
  public let bSigns: [UInt8]
  public let sIn: EncodedScales
  public let sMid: EncodedScales
  public let sOut: EncodedScales

  public var rank: Int { sMid.count }
  public var dIn: Int { sIn.count }
  public var dOut: Int { sOut.count }
  public var scales: [EncodedScales] { [sIn, sMid, sOut] }

  /// Stored bytes: signs, scales and their ranges.
  public var bytes: Int { aSigns.count + bSigns.count + scales.reduce(0) { $0 + $1.bytes } }
}

/// Bytes per row of a packed sign matrix with that many columns.
func packedWidth(_ columns: Int) -> Int { (columns + 7) / 8 }

/// Rows of +1 and -1 out of packed signs.
public func unpackSigns(_ packed: [UInt8], columns: Int) -> [[Float]] {
  let width = packedWidth(columns)
  return (0..<packed.count / width).map { row in
    (0..<columns).map { (column: Int) -> Float in
      let byte = packed[row * width + column / 8]
      return isNegative(byte, column) ? -1 : 1
    }
  }
}

private func isNegative(_ byte: UInt8, _ column: Int) -> Bool { (byte >> UInt8(column % 8)) & 1 == 1 }

/// An adapter folder of PEFT's shape, read and checked (docs/format.md).
public struct Adapter: Equatable, Sendable {
  public static let formatVersion = 1
  public static let configName = "adapter_config.json"
  public static let weightsName = "adapter_model.safetensors"
  static let prefix = "base_model.model."

  public let modules: [String: SignModule]
  public let scaleCode: ScaleCode
  public let baseModel: String?
  public let baseFingerprint: String?

  /// The largest rank of any module.
  public var rank: Int { modules.values.map(\.rank).max() ?? 0 }
  /// Bytes of signs and scales as stored.
  public var bytes: Int { modules.values.reduce(0) { $0 + $1.bytes } }
  /// Bytes of an fp16 LoRA with the same ranks and modules.
  public var fp16LoRABytes: Int { modules.values.reduce(0) { $0 + 2 * $1.rank * ($1.dIn + $1.dOut) } }

  private struct Config: Decodable {
    let peft_type: String?
    let format_version: JSONValue?
    let scale_code: String?
    let base_model_name_or_path: String?
    let base_fingerprint: String?
  }

  private struct Shape: Decodable {
    let d_in: Int
    let d_out: Int
    let r: Int
  }

  public init(folder: URL) throws {
    let config = try Self.readConfig(folder.appendingPathComponent(Self.configName))
    guard let code = config.scale_code.flatMap(ScaleCode.init(rawValue:)) else {
      throw LordbaError(
        "\(folder.appendingPathComponent(Self.configName).path): scale_code must be one of "
          + "\(ScaleCode.allCases.map(\.rawValue)), found \(config.scale_code ?? "none")")
    }
    var file = try SafetensorsFile(path: folder.appendingPathComponent(Self.weightsName))
    var modules: [String: SignModule] = [:]
    for (key, shape) in try Self.readShapes(file) {
      modules[String(key.dropFirst(Self.prefix.count))] = try Self.takeModule(key, shape, code, &file)
    }
    if let left = file.tensors.keys.min() {
      throw LordbaError("\(file.path.path): unexpected tensor \(left) that its shapes metadata does not list")
    }
    self.modules = modules
    scaleCode = code
    baseModel = config.base_model_name_or_path
    baseFingerprint = config.base_fingerprint
  }

  private static func readConfig(_ path: URL) throws -> Config {
    guard let data = try? Data(contentsOf: path) else {
      throw LordbaError("\(path.path): not found; an adapter folder holds \(configName) and \(weightsName)")
    }
    guard let config = try? JSONDecoder().decode(Config.self, from: data) else {
      throw LordbaError("\(path.path): is not readable JSON; copy the adapter anew")
    }
    guard config.peft_type == "LORDBA" else {
      let hint = config.peft_type == "LORA" ? "; convert it first: python -m lordba.convert PEFT_DIR OUT" : ""
      throw LordbaError(
        "\(path.path): expected peft_type LORDBA, found \(config.peft_type ?? "none")\(hint)")
    }
    guard config.format_version == .int(formatVersion) else {
      throw LordbaError(
        "\(path.path): format_version \(config.format_version?.profileText ?? "none") is not known here (this app "
          + "reads \(formatVersion)); update the app or convert the adapter again")
    }
    return config
  }

  private static func readShapes(_ file: SafetensorsFile) throws -> [String: Shape] {
    guard file.metadata["format"] == "lordba", file.metadata["format_version"] == String(formatVersion) else {
      throw LordbaError(
        "\(file.path.path): safetensors metadata must say format=lordba, format_version=\(formatVersion)")
    }
    guard let text = file.metadata["shapes"],
      let shapes = try? JSONDecoder().decode([String: Shape].self, from: Data(text.utf8)),
      shapes.allSatisfy({ $0.key.hasPrefix(prefix) && $0.value.d_in > 0 && $0.value.d_out > 0 && $0.value.r > 0 })
    else { throw LordbaError("\(file.path.path): the shapes metadata is not usable; write the adapter anew") }
    guard !shapes.isEmpty else {
      throw LordbaError("\(file.path.path): holds no modules; there is nothing to adapt")
    }
    return shapes
  }

  private static func takeModule(
    _ key: String, _ shape: Shape, _ code: ScaleCode, _ file: inout SafetensorsFile
  ) throws -> SignModule {
    SignModule(
      aSigns: try takeSigns("\(key).lordba_A.signs", shape.r, shape.d_in, &file),
      bSigns: try takeSigns("\(key).lordba_B.signs", shape.d_out, shape.r, &file),
      sIn: try takeScales("\(key).lordba_scale_in", shape.d_in, code, &file),
      sMid: try takeScales("\(key).lordba_scale_mid", shape.r, code, &file),
      sOut: try takeScales("\(key).lordba_scale_out", shape.d_out, code, &file)
    )
  }

  private static func takeSigns(
    _ name: String, _ rows: Int, _ columns: Int, _ file: inout SafetensorsFile
  ) throws -> [UInt8] {
    let tensor = try file.take(name)
    let width = packedWidth(columns)
    guard tensor.dtype == "U8", tensor.shape == [rows, width] else {
      throw LordbaError(
        "\(file.path.path): \(name): expected U8 [\(rows), \(width)], found \(tensor.dtype) \(tensor.shape)")
    }
    let bytes = file.bytes(tensor)
    if columns % 8 != 0 {
      let padding = UInt8(truncatingIfNeeded: 0xff << (columns % 8))
      let isClean = stride(from: width - 1, to: bytes.count, by: width).allSatisfy { bytes[$0] & padding == 0 }
      guard isClean else {
        throw LordbaError("\(file.path.path): \(name) has padding bits that are not zero; the file is damaged")
      }
    }
    return bytes
  }

  private static func takeScales(
    _ name: String, _ n: Int, _ code: ScaleCode, _ file: inout SafetensorsFile
  ) throws -> EncodedScales {
    let tensor = try file.take(name)
    let length = code.storedLength(n)
    guard tensor.dtype == code.dtype, tensor.shape == [length] else {
      throw LordbaError(
        "\(file.path.path): \(name): \(code.rawValue) scales of \(n) channels are \(code.dtype) [\(length)], found "
          + "\(tensor.dtype) \(tensor.shape); the file does not match its configuration")
    }
    let values = file.bytes(tensor)
    guard code.isCoded else {
      let scales = EncodedScales(code: code, count: n, values: values, lo: 1, hi: 1)
      guard scales.decoded.allSatisfy({ $0.isFinite && $0 >= 0 }) else {
        throw LordbaError("\(file.path.path): \(name): scales must be finite and not negative; write the adapter anew")
      }
      return scales
    }
    let range = try file.take("\(name).range")
    guard range.dtype == "F16", range.shape == [2] else {
      throw LordbaError(
        "\(file.path.path): \(name): \(code.rawValue) scales need a range tensor, F16 [2] = (lo, hi), found "
          + "\(range.dtype) \(range.shape)")
    }
    let ends = littleEndianUInt16(file.bytes(range)).map(floatFromHalf)
    guard 0 < ends[0], ends[0] <= ends[1], ends[1].isFinite else {
      throw LordbaError(
        "\(file.path.path): \(name): the range must be 0 < lo <= hi and finite, found lo=\(ends[0]), hi=\(ends[1])")
    }
    return EncodedScales(code: code, count: n, values: values, lo: ends[0], hi: ends[1])
  }
}
