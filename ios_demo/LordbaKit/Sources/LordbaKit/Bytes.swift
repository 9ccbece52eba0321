/// fp16 bits as a float. Swift's Float16 is missing on some of our platforms.
public func floatFromHalf(_ bits: UInt16) -> Float {
  let sign: Float = bits & 0x8000 == 0 ? 1 : -1
  let exponent = Int(bits >> 10 & 31)
  let mantissa = Float(bits & 1023)
  switch exponent {
  case 0: return sign * mantissa * 0x1p-24
  case 31: return mantissa == 0 ? sign * .infinity : .nan
  default: return sign * Float(sign: .plus, exponent: exponent - 15, significand: 1 + mantissa / 1024)
  }
}

/// The nearest fp16, ties to even.
func halfFromFloat(_ value: Float) -> UInt16 {
  let bits = value.bitPattern
  let high: UInt32 = bits >> 16
  let sign = UInt16(high & 0x8000)
  let magnitude: UInt32 = bits & 0x7fff_ffff
  if magnitude > 0x7f80_0000 { return sign | 0x7e00 }
  if magnitude >= 0x477f_f000 { return sign | 0x7c00 }
  if magnitude < 0x3880_0000 {  // subnormal: adding 0.5 leaves the rounded multiple of 2^-24 in the last bits
    let shifted: Float = Float(bitPattern: magnitude) + 0.5
    let half: Float = 0.5
    return sign | UInt16(shifted.bitPattern - half.bitPattern)
  }
  let odd: UInt32 = (magnitude >> 13) & 1
  let rounded: UInt32 = magnitude + 0xfff + odd
  return sign | UInt16((rounded - 0x3800_0000) >> 13)
}

func littleEndianUInt16(_ bytes: [UInt8]) -> [UInt16] {
  (0..<bytes.count / 2).map { (i: Int) -> UInt16 in
    let (low, high) = (UInt16(bytes[2 * i]), UInt16(bytes[2 * i + 1]))
    return low | high << 8
  }
}

func littleEndianFloats(_ bytes: [UInt8]) -> [Float] {
  [Float](unsafeUninitializedCapacity: bytes.count / 4) { floats, count in
    bytes.withUnsafeBytes { raw in
      for i in 0..<bytes.count / 4 {
        let bits = raw.loadUnaligned(fromByteOffset: 4 * i, as: UInt32.self)
        floats[i] = Float(bitPattern: UInt32(littleEndian: bits))
      }
    }
    count = bytes.count / 4
  }
}

extension [UInt8] {
  mutating func appendLittleEndian(_ value: some FixedWidthInteger) {
    Swift.withUnsafeBytes(of: value.littleEndian) { append(contentsOf: $0) }
  }

  mutating func appendFloat(_ value: Float) { appendLittleEndian(value.bitPattern) }
}
