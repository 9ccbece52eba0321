/// Adapters as inputs of a Core ML program: layers of one size share five inputs, `a_<d_in>x<d_out>` [count, r, d_in] and
/// so on (docs/coreml.md). An adapter of a smaller rank, and a module that it lacks, is filled up with scales of zero.
public struct AdapterInputs: Equatable, Sendable {
  public struct Size: Hashable, Sendable {
    public let dIn: Int
    public let dOut: Int

    func name(_ part: String) -> String { "\(part)_\(dIn)x\(dOut)" }
  }

  public struct Array: Equatable, Sendable {
    public let shape: [Int]
    /// fp16 bits, row-major.
    public var values: [UInt16]
  }

  private static let parts = ["a", "b", "s_in", "s_mid", "s_out"]

  public let rank: Int
  private let counts: [Size: Int]
  private let modules: Int

  /// What a program takes, by its inputs' shapes. Other inputs are passed over. nil: it takes no adapter.
  public init?(shapes: [String: [Int]], modules: Int) {
    var counts: [Size: Int] = [:]
    var rank = 0
    for (name, shape) in shapes where name.hasPrefix("a_") && shape.count == 3 {
      let numbers = name.dropFirst(2).split(separator: "x").compactMap { Int($0) }
      guard numbers.count == 2, numbers[0] == shape[2] else { return nil }
      counts[Size(dIn: numbers[0], dOut: numbers[1])] = shape[0]
      rank = shape[1]
    }
    guard !counts.isEmpty, counts.values.reduce(0, +) == modules else { return nil }
    self.counts = counts
    self.rank = rank
    self.modules = modules
  }

  /// The inputs for an adapter, given module by module in the program's order; nil stands for no adapter.
  public func fill(_ given: [AdapterBlob.Parts?]) throws -> [String: Array] {
    var result: [String: Array] = [:]
    for (size, count) in counts {
      let shapes = [
        [count, rank, size.dIn], [count, size.dOut, rank], [count, size.dIn], [count, rank], [count, size.dOut],
      ]
      for (part, shape) in zip(Self.parts, shapes) {
        result[size.name(part)] = Array(shape: shape, values: .init(repeating: 0, count: shape.reduce(1, *)))
      }
    }
    let starts = try groupStarts(given)
    for (i, parts) in given.enumerated() {
      guard let parts else { continue }
      let size = Size(dIn: parts.sIn.count, dOut: parts.sOut.count)
      guard parts.sMid.count <= rank else {
        throw LordbaError("an adapter of rank \(parts.sMid.count) does not fit a program for ranks up to \(rank)")
      }
      let place = i - starts[size]!
      put(parts.a, width: size.dIn, at: place * rank, in: &result[size.name("a")]!)
      put(parts.b, width: rank, at: place * size.dOut, in: &result[size.name("b")]!)
      put([parts.sIn], width: size.dIn, at: place, in: &result[size.name("s_in")]!)
      put([parts.sMid], width: rank, at: place, in: &result[size.name("s_mid")]!)
      put([parts.sOut], width: size.dOut, at: place, in: &result[size.name("s_out")]!)
    }
    return result
  }

  private func put(_ rows: [[Float]], width: Int, at first: Int, in array: inout Array) {
    for (i, row) in rows.enumerated() {
      for (j, value) in row.enumerated() { array.values[(first + i) * width + j] = halfFromFloat(value) }
    }
  }

  /// Where the modules of each size begin: they lie together, and the adapter says which size some of them have.
  private func groupStarts(_ given: [AdapterBlob.Parts?]) throws -> [Size: Int] {
    guard given.count == modules else {
      throw LordbaError("the program has \(modules) adapted layers, the adapter's file \(given.count)")
    }
    var starts: [Size: Int] = [:]
    var begin = 0
    while begin < modules {
      guard let first = given[begin...].firstIndex(where: { $0 != nil }), let parts = given[first] else { break }
      let size = Size(dIn: parts.sIn.count, dOut: parts.sOut.count)
      guard let count = counts[size], starts[size] == nil, first < begin + count else {
        throw LordbaError(
          "the adapter maps \(size.dIn) to \(size.dOut) channels in layer \(first), where the program has other sizes or "
            + "the adapter leaves out all layers of one size; export a bundle with this adapter")
      }
      starts[size] = begin
      begin += count
    }
    let isTogether = given.enumerated().allSatisfy { i, parts in
      guard let parts else { return true }
      let size = Size(dIn: parts.sIn.count, dOut: parts.sOut.count)
      return starts[size].map { (0..<counts[size]!).contains(i - $0) } ?? false
    }
    guard isTogether else { throw LordbaError("the adapter's layers have other sizes than the program's") }
    return starts
  }
}
