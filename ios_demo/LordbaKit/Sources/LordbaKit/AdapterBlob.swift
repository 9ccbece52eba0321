import CLordba
import Foundation

/// The runtime's form of an adapter: one block of bytes that the kernels read in place (docs/format.md).
public final class AdapterBlob {
  static let version: UInt32 = 1
  private static let magic: [UInt8] = Array("LORDBA\0\0".utf8)
  private static let headerBytes = 32
  private static let recordBytes = 64

  public let bytes: [UInt8]
  private let memory: UnsafeMutableRawBufferPointer

  /// Lays modules out, in the program's order; nil stands for a layer without adapter.
  public init(modules: [SignModule?]) {
    var data: [UInt8] = []
    var records: [UInt8] = []
    let start = Self.headerBytes + Self.recordBytes * modules.count
    func place(_ section: [UInt8]) -> UInt64 {
      data.append(contentsOf: [UInt8](repeating: 0, count: (4 - (start + data.count) % 4) % 4))
      let offset = start + data.count
      data.append(contentsOf: section)
      return UInt64(offset)
    }
    for module in modules {
      guard let module else {
        records.append(contentsOf: [UInt8](repeating: 0, count: Self.recordBytes))
        continue
      }
      for number in [module.rank, module.dIn, module.dOut] { records.appendLittleEndian(UInt32(number)) }
      records.appendLittleEndian(module.sIn.code.number)
      for section in [module.aSigns, module.bSigns] + module.scales.map(Self.section) {
        records.appendLittleEndian(place(section))
      }
      records.appendLittleEndian(UInt64(0))
    }
    var header = Self.magic
    header.appendLittleEndian(Self.version)
    header.appendLittleEndian(UInt32(modules.count))
    header.appendLittleEndian(UInt64(start + data.count))
    header.appendLittleEndian(UInt64(0))
    bytes = header + records + data
    memory = Self.copy(bytes)
  }

  /// Reads a blob; what `expected` modules of it say is checked at once. Throws LordbaError.
  public init(bytes: [UInt8], expecting expected: Int, name: String) throws {
    self.bytes = bytes
    memory = Self.copy(bytes)
    for index in 0..<expected {
      var module = lordba_module()
      let status = lordba_blob_module(memory.baseAddress, memory.count, UInt64(index), &module)
      guard status == LORDBA_OK else {
        let why = String(cString: lordba_status_text(status))
        throw LordbaError("\(name): module \(index): \(why); copy or export the bundle again")
      }
    }
  }

  deinit { memory.deallocate() }

  /// A module as the kernels take it; it points into this blob. nil: no adapter.
  func module(_ index: Int) -> lordba_module? {
    var module = lordba_module()
    let status = lordba_blob_module(memory.baseAddress, memory.count, UInt64(index), &module)
    return status == LORDBA_OK && module.r != 0 ? module : nil
  }

  /// Inputs and outputs of a module; nil: no adapter.
  public func size(_ index: Int) -> (dIn: Int, dOut: Int)? {
    module(index).map { (Int($0.d_in), Int($0.d_out)) }
  }

  /// A module's factors, expanded: rows of +1 and -1, and scales.
  public struct Parts: Equatable, Sendable {
    public let a: [[Float]]
    public let b: [[Float]]
    public let sIn: [Float]
    public let sMid: [Float]
    public let sOut: [Float]
  }

  public func parts(_ index: Int) -> Parts? {
    guard let module = module(index) else { return nil }
    let (rank, dIn, dOut) = (Int(module.r), Int(module.d_in), Int(module.d_out))
    func signs(_ pointer: UnsafePointer<UInt8>, _ rows: Int, _ columns: Int) -> [[Float]] {
      unpackSigns(Array(UnsafeBufferPointer(start: pointer, count: rows * packedWidth(columns))), columns: columns)
    }
    return Parts(
      a: signs(module.a_signs, rank, dIn),
      b: signs(module.b_signs, dOut, rank),
      sIn: Self.decode(module.s_in, dIn),
      sMid: Self.decode(module.s_mid, rank),
      sOut: Self.decode(module.s_out, dOut)
    )
  }

  private static func copy(_ bytes: [UInt8]) -> UnsafeMutableRawBufferPointer {
    let memory = UnsafeMutableRawBufferPointer.allocate(byteCount: max(bytes.count, 1), alignment: 64)
    memory.copyBytes(from: bytes)
    return UnsafeMutableRawBufferPointer(rebasing: memory[..<bytes.count])
  }

  private static func section(_ scales: EncodedScales) -> [UInt8] {
    var result: [UInt8] = []
    switch scales.code {
    case .fp32, .fp16: break
    case .int8:
      result.appendFloat(scales.lo)
      result.appendFloat(Float((Double(scales.hi) - Double(scales.lo)) / 254))
    case .log4: for level in scales.levels { result.appendFloat(level) }
    }
    return result + scales.values
  }

  private static func decode(_ scales: lordba_scales, _ n: Int) -> [Float] {
    let values = scales.values!
    func floats(_ pointer: UnsafePointer<UInt8>, _ count: Int) -> [Float] {
      littleEndianFloats(Array(UnsafeBufferPointer(start: pointer, count: 4 * count)))
    }
    switch scales.code {
    case LORDBA_FP32: return floats(values, n)
    case LORDBA_FP16:
      return littleEndianUInt16(Array(UnsafeBufferPointer(start: values, count: 2 * n))).map(floatFromHalf)
    case LORDBA_INT8:
      let meaning = floats(scales.meaning, 2)
      return (0..<n).map { (i: Int) -> Float in
        values[i] == 0 ? 0 : meaning[0] + meaning[1] * Float(values[i] - 1)
      }
    default:
      let meaning = floats(scales.meaning, 16)
      return (0..<n).map { meaning[nibble(values[$0 / 2], $0)] }
    }
  }
}
