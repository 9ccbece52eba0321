import Foundation

#if canImport(CryptoKit)
  import CryptoKit
#endif

/// SHA-256 of a file, in lower-case hex, read piece by piece.
func sha256(of file: URL) throws -> String {
  let handle = try FileHandle(forReadingFrom: file)
  defer { try? handle.close() }
  #if canImport(CryptoKit)
    var hash = CryptoKit.SHA256()
  #else
    var hash = PortableSHA256()
  #endif
  while let piece = try handle.read(upToCount: 1 << 20), !piece.isEmpty {
    hash.update(data: piece)
  }
  return hex(hash.finalize())
}

func sha256(of data: Data) -> String {
  var hash = PortableSHA256()
  hash.update(data: data)
  return hex(hash.finalize())
}

private func hex(_ digest: some Sequence<UInt8>) -> String {
  digest.map { String(format: "%02x", $0) }.joined()
}

/// FIPS 180-4, for systems without CryptoKit: Foundation on Linux has no digest at all.
struct PortableSHA256 {
  private var state: [UInt32] = [
    0x6a09_e667, 0xbb67_ae85, 0x3c6e_f372, 0xa54f_f53a, 0x510e_527f, 0x9b05_688c, 0x1f83_d9ab, 0x5be0_cd19,
  ]
  private var rest: [UInt8] = []
  private var length: UInt64 = 0
  private var words = [UInt32](repeating: 0, count: 64)

  mutating func update(data: Data) {
    length += UInt64(data.count)
    rest.append(contentsOf: data)
    consume()
  }

  mutating func finalize() -> [UInt8] {
    let bits = length * 8
    rest.append(0x80)
    rest.append(contentsOf: [UInt8](repeating: 0, count: (120 - rest.count % 64) % 64))
    rest.append(contentsOf: (0..<8).map { UInt8(truncatingIfNeeded: bits >> (56 - 8 * $0)) })
    consume()
    return state.flatMap { word in (0..<4).map { UInt8(truncatingIfNeeded: word >> (24 - 8 * $0)) } }
  }

  private mutating func consume() {
    let whole = rest.count / 64 * 64
    rest.withUnsafeBufferPointer { bytes in
      for start in stride(from: 0, to: whole, by: 64) {
        Self.compress(bytes, start, &words, &state)
      }
    }
    rest.removeFirst(whole)
  }

  private static func compress(
    _ bytes: UnsafeBufferPointer<UInt8>, _ start: Int, _ w: inout [UInt32], _ state: inout [UInt32]
  ) {
    func turned(_ x: UInt32, _ n: UInt32) -> UInt32 { (x >> n) | (x << (32 - n)) }
    for i in 0..<16 {
      w[i] = (0..<4).reduce(UInt32(0)) { word, k in (word << 8) | UInt32(bytes[start + 4 * i + k]) }
    }
    for i in 16..<64 {
      let (x, y): (UInt32, UInt32) = (w[i - 15], w[i - 2])
      let s0: UInt32 = turned(x, 7) ^ turned(x, 18) ^ (x >> 3)
      let s1: UInt32 = turned(y, 17) ^ turned(y, 19) ^ (y >> 10)
      let sum: UInt32 = w[i - 16] &+ s0
      w[i] = sum &+ w[i - 7] &+ s1
    }
    var (a, b, c, d) = (state[0], state[1], state[2], state[3])
    var (e, f, g, h) = (state[4], state[5], state[6], state[7])
    for i in 0..<64 {
      let s1: UInt32 = turned(e, 6) ^ turned(e, 11) ^ turned(e, 25)
      let chosen: UInt32 = (e & f) ^ (~e & g)
      let first: UInt32 = h &+ s1 &+ chosen &+ constants[i] &+ w[i]
      let s0: UInt32 = turned(a, 2) ^ turned(a, 13) ^ turned(a, 22)
      let most: UInt32 = (a & b) ^ (a & c) ^ (b & c)
      (h, g, f, e, d, c, b, a) = (g, f, e, d &+ first, c, b, a, first &+ s0 &+ most)
    }
    for (i, value) in [a, b, c, d, e, f, g, h].enumerated() { state[i] &+= value }
  }

  /// The first 32 bits of the fractions of the cube roots of the first 64 primes.
  private static let constants: [UInt32] = [
    0x428a_2f98, 0x7137_4491, 0xb5c0_fbcf, 0xe9b5_dba5, 0x3956_c25b, 0x59f1_11f1, 0x923f_82a4, 0xab1c_5ed5,
    0xd807_aa98, 0x1283_5b01, 0x2431_85be, 0x550c_7dc3, 0x72be_5d74, 0x80de_b1fe, 0x9bdc_06a7, 0xc19b_f174,
    0xe49b_69c1, 0xefbe_4786, 0x0fc1_9dc6, 0x240c_a1cc, 0x2de9_2c6f, 0x4a74_84aa, 0x5cb0_a9dc, 0x76f9_88da,
    0x983e_5152, 0xa831_c66d, 0xb003_27c8, 0xbf59_7fc7, 0xc6e0_0bf3, 0xd5a7_9147, 0x06ca_6351, 0x1429_2967,
    0x27b7_0a85, 0x2e1b_2138, 0x4d2c_6dfc, 0x5338_0d13, 0x650a_7354, 0x766a_0abb, 0x81c2_c92e, 0x9272_2c85,
    0xa2bf_e8a1, 0xa81a_664b, 0xc24b_8b70, 0xc76c_51a3, 0xd192_e819, 0xd699_0624, 0xf40e_3585, 0x106a_a070,
    0x19a4_c116, 0x1e37_6c08, 0x2748_774c, 0x34b0_bcb5, 0x391c_0cb3, 0x4ed8_aa4a, 0x5b9c_ca4f, 0x682e_6ff3,
    0x748f_82ee, 0x78a5_636f, 0x84c8_7814, 0x8cc7_0208, 0x90be_fffa, 0xa450_6ceb, 0xbef9_a3f7, 0xc671_78f2,
  ]
}
