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
  let sign = UInt16(bits >> 16 & 0x8000)
  let magnitude = bits & 0x7fff_ffff
  if magnitude > 0x7f80_0000 { return sign | 0x7e00 }
  if magnitude >= 0x477f_f000 { return sign | 0x7c00 }
  if magnitude < 0x3880_0000 {  // subnormal: adding 0.5 leaves the rounded multiple of 2^-24 in the last bits
    return sign | UInt16((Float(bitPattern: magnitude) + 0.5).bitPattern - Float(0.5).bitPattern)
  }
  return sign | UInt16((magnitude + 0xfff + (magnitude >> 13 & 1) - 0x3800_0000) >> 13)
}

func littleEndianUInt16(_ bytes: [UInt8]) -> [UInt16] {
  stride(from: 0, to: bytes.count - 1, by: 2).map { UInt16(bytes[$0]) | UInt16(bytes[$0 + 1]) << 8 }
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
