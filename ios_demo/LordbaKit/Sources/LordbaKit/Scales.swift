import Foundation

/// How a vector of non-negative channel scales is stored (docs/format.md).
public enum ScaleCode: String, CaseIterable, Sendable {
  case fp32, fp16, int8, log4

  /// Whether the stored values are codes that need a range.
  public var isCoded: Bool { self == .int8 || self == .log4 }

  var dtype: String { self == .fp32 ? "F32" : self == .fp16 ? "F16" : "U8" }

  /// Elements that store n scales: two log4 codes share a byte.
  func storedLength(_ n: Int) -> Int { self == .log4 ? (n + 1) / 2 : n }

  /// The code's number in an adapter blob.
  var number: UInt32 {
    switch self {
    case .fp32: 0
    case .fp16: 1
    case .int8: 2
    case .log4: 3
    }
  }
}

/// One scale vector of length n as stored.
public struct EncodedScales: Equatable, Sendable {
  public let code: ScaleCode
  public let count: Int
  /// Codes, or little-endian floats.
  public let values: [UInt8]
  /// (lo, hi) of int8 and log4.
  public let lo: Float
  public let hi: Float

  /// Stored bytes, range included.
  public var bytes: Int { values.count + (code.isCoded ? 4 : 0) }

  /// What each code means: 16 floats for log4, 256 for int8; code 0 is exactly 0.
  var levels: [Float] {
    let steps = code == .log4 ? 14 : 254
    let (lo, hi) = (Double(lo), Double(hi))
    var result: [Float] = [0]
    for step in 0...steps {
      let part = Double(step) / Double(steps)
      let meaning: Double = code == .log4 ? lo * pow(hi / lo, part) : lo + (hi - lo) * part
      result.append(Float(meaning))
    }
    return result
  }

  public var decoded: [Float] {
    switch code {
    case .fp32: return littleEndianFloats(values)
    case .fp16: return littleEndianUInt16(values).map(floatFromHalf)
    case .int8:
      let levels = levels
      return values.map { levels[Int($0)] }
    case .log4:
      let levels = levels
      return (0..<count).map { levels[nibble(values[$0 / 2], $0)] }
    }
  }
}

/// The log4 code of scale i out of the byte that it shares, the even one in the lower half.
func nibble(_ byte: UInt8, _ i: Int) -> Int { i % 2 == 0 ? Int(byte & 15) : Int(byte >> 4) }
