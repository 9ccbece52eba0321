#if canImport(ExecuTorch)
  import ExecuTorch
  import Foundation
  import LordbaKit

  /// See LordbaKit's Runner: programs of `lordba.export --target executorch --delegate coreml`, whose methods are the base
  /// and its adapters over one Core ML package. Other ExecuTorch bundles need lordba's operators, which the stock
  /// frameworks lack.
  final class ExecuTorchRunner: Runner {
    static let target = "executorch"
    private static let baseMethod = "base"

    let longest: Int
    private let module: Module
    private var used: Method?

    init(_ bundle: ModelBundle) throws {
      guard bundle.manifest.target == Self.target, bundle.manifest.adapterMode == "methods" else {
        throw LordbaError(
          "\(bundle.folder.lastPathComponent): its adapters are \(bundle.manifest.adapterMode); this app runs ExecuTorch "
            + "programs made with --delegate coreml")
      }
      longest = bundle.manifest.maxSeqLen
      module = Module(filePath: bundle.program.path)
      try module.load()
    }

    func load(_ adapter: BundleAdapter?, of bundle: ModelBundle) throws -> LoadedAdapter {
      let name = adapter.map { $0.function ?? $0.name } ?? Self.baseMethod
      if !module.isLoaded(name) { try module.load(name) }
      return Method(name)
    }

    func use(_ adapter: LoadedAdapter) throws { used = adapter.of(Method.self) }

    func run(_ tokens: [Int32], start: Int) throws -> [Float] {
      guard let used else { throw LordbaError("no adapter is in use yet: call use(_:) first") }
      let outputs = try module.execute(
        used.name, [tensor(tokens, shape: [1, tokens.count]), tensor([Int32(start)], shape: [1])])
      guard let logits = outputs.first?.anyTensor else {
        throw LordbaError("the method \(used.name) gave no logits; export the bundle again")
      }
      return try floats(logits)
    }

    private func tensor(_ values: [Int32], shape: [Int]) -> AnyTensor {
      AnyTensor(data: values.withUnsafeBytes { Data($0) }, shape: shape, dataType: .int)
    }

    /// The Core ML backend puts logits out in fp16 (docs/coreml.md).
    private func floats(_ tensor: AnyTensor) throws -> [Float] {
      var result: [Float]?
      tensor.bytes { bytes, count, type in
        switch type {
        case .float: result = Array(UnsafeBufferPointer(start: bytes.assumingMemoryBound(to: Float.self), count: count))
        case .half:
          let halves = UnsafeBufferPointer(start: bytes.assumingMemoryBound(to: UInt16.self), count: count)
          result = halves.map(floatFromHalf)
        default: break
        }
      }
      guard let result else { throw LordbaError("logits are neither fp32 nor fp16; export the bundle again") }
      return result
    }
  }

  private final class Method: LoadedAdapter {
    let name: String

    init(_ name: String) { self.name = name }
  }
#endif
