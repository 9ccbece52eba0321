import Foundation

/// A safetensors file: an 8-byte length, a JSON header, the tensors' bytes. Every offset and size is checked.
public struct SafetensorsFile: Sendable {
  public struct Tensor: Equatable, Sendable {
    public let dtype: String
    public let shape: [Int]
    let range: Range<Int>
  }

  public let path: URL
  public let metadata: [String: String]
  public private(set) var tensors: [String: Tensor]
  private let data: Data

  private static let elementBytes = ["U8": 1, "I8": 1, "BOOL": 1, "F16": 2, "BF16": 2, "F32": 4, "F64": 8, "I64": 8]

  private struct Entry: Decodable {
    let dtype: String
    let shape: [Int]
    let data_offsets: [Int]
  }

  public init(path: URL) throws {
    self.path = path
    func damaged(_ what: String) -> LordbaError {
      LordbaError("\(path.path): \(what); it is truncated or damaged, copy it anew")
    }
    guard let data = try? Data(contentsOf: path, options: .mappedIfSafe) else {
      throw LordbaError("\(path.path): not found or not readable")
    }
    self.data = data
    guard data.count >= 8 else { throw damaged("expected a header, found \(data.count) bytes") }
    let length = data.prefix(8).reversed().reduce(UInt64(0)) { $0 << 8 | UInt64($1) }
    guard length <= UInt64(data.count - 8) else {
      throw damaged("expected a header of \(length) bytes, found \(data.count - 8)")
    }
    let start = 8 + Int(length)
    guard let header = try? JSONDecoder().decode([String: JSONValue].self, from: data.subdata(in: 8..<start)) else {
      throw damaged("its header is not JSON")
    }
    var metadata: [String: String] = [:]
    var tensors: [String: Tensor] = [:]
    for (name, value) in header {
      if name == "__metadata__" {
        guard case .object(let members) = value else { throw damaged("its metadata is no object") }
        metadata = members.compactMapValues { if case .string(let text) = $0 { text } else { nil } }
        continue
      }
      guard let entry = try? JSONDecoder().decode(Entry.self, from: JSONEncoder().encode(value)),
        let size = Self.elementBytes[entry.dtype], entry.data_offsets.count == 2
      else { throw damaged("tensor \(name) has an unknown description") }
      let (begin, end) = (entry.data_offsets[0], entry.data_offsets[1])
      var expected = size
      for n in entry.shape {
        let (product, overflow) = expected.multipliedReportingOverflow(by: n)
        guard n >= 0, !overflow else { throw damaged("tensor \(name) has an impossible shape") }
        expected = product
      }
      guard 0 <= begin, begin <= end, end <= data.count - start, end - begin == expected else {
        throw damaged("tensor \(name): expected \(expected) bytes, found \(begin)..<\(end) of \(data.count - start)")
      }
      tensors[name] = Tensor(dtype: entry.dtype, shape: entry.shape, range: start + begin..<start + end)
    }
    self.metadata = metadata
    self.tensors = tensors
  }

  public func bytes(_ tensor: Tensor) -> [UInt8] { [UInt8](data[tensor.range]) }

  /// A tensor's elements; F32, F16 and BF16 alone.
  public func floats(_ name: String) throws -> [Float] {
    guard let tensor = tensors[name] else {
      throw LordbaError("\(path.path): tensor \(name) is missing; the file is incomplete, copy it anew")
    }
    let raw = bytes(tensor)
    switch tensor.dtype {
    case "F32": return littleEndianFloats(raw)
    case "F16": return littleEndianUInt16(raw).map(floatFromHalf)
    case "BF16": return littleEndianUInt16(raw).map { Float(bitPattern: UInt32($0) << 16) }
    default:
      throw LordbaError("\(path.path): tensor \(name): expected F32, F16 or BF16, found \(tensor.dtype)")
    }
  }

  /// Removes a tensor from the list and returns it, so that what remains is what nobody asked for.
  mutating func take(_ name: String) throws -> Tensor {
    guard let tensor = tensors.removeValue(forKey: name) else {
      throw LordbaError("\(path.path): tensor \(name) is missing; the file is incomplete, copy it anew")
    }
    return tensor
  }
}
