#if canImport(CoreML)
  import CoreML
  import Foundation

  /// See Runner: Core ML bundles (docs/coreml.md). An adapter is a function of the program, a package of its own, or an
  /// input of every call; keys and values are states, or with stateless programs the whole text is given to every call.
  public final class CoreMLRunner: Runner {
    public static let target = "coreml"
    private static let baseFunction = "base"

    public let longest: Int
    private let units: MLComputeUnits
    private var used: CoreMLAdapter?
    private var cache: AnyObject?  // MLState, which systems before iOS 18 lack
    private var text: [Int32] = []

    public convenience init(_ bundle: ModelBundle) throws { try self.init(bundle, units: .all) }

    public init(_ bundle: ModelBundle, units: MLComputeUnits) throws {
      guard bundle.manifest.target == Self.target else {
        throw LordbaError("\(bundle.folder.path): is a bundle for \(bundle.manifest.target), not for \(Self.target)")
      }
      longest = bundle.manifest.maxSeqLen
      self.units = units
    }

    public func load(_ adapter: BundleAdapter?, of bundle: ModelBundle) throws -> LoadedAdapter {
      switch bundle.manifest.adapterMode {
      case "functions":
        let model = try open(
          bundle, bundle.manifest.program, adapter.map { $0.function ?? $0.name } ?? Self.baseFunction)
        return CoreMLAdapter(model, inputs: [:])
      case "packages":
        return CoreMLAdapter(try open(bundle, adapter?.file ?? bundle.manifest.program, nil), inputs: [:])
      case "inputs": return try loadInputs(adapter, bundle)
      case let mode:
        throw LordbaError("\(bundle.folder.path): adapters as \(mode) are not known here; update the app")
      }
    }

    public func use(_ adapter: LoadedAdapter) throws {
      used = adapter.of(CoreMLAdapter.self)
      cache = nil
      text = []
    }

    public func run(_ tokens: [Int32], start: Int) throws -> [Float] {
      guard let used else { throw LordbaError("no adapter is in use yet: call use(_:) first") }
      text = text.prefix(start) + tokens
      var inputs = used.inputs
      if used.isStateful {
        inputs["tokens"] = try Self.array(tokens)
        inputs["start"] = MLFeatureValue(multiArray: try Self.vector([Int32(start)]))
      } else {
        inputs["tokens"] = try Self.array(text)
      }
      let provider = try MLDictionaryFeatureProvider(dictionary: inputs)
      let result: any MLFeatureProvider
      if #available(iOS 18, macOS 15, *), used.isStateful {
        if start == 0 || cache == nil { cache = used.model.makeState() }
        guard let state = cache as? MLState else { throw LordbaError("the cache is of another program") }
        result = try used.model.prediction(from: provider, using: state)
      } else {
        result = try used.model.prediction(from: provider)
      }
      guard let logits = result.featureValue(for: "logits")?.multiArrayValue else {
        throw LordbaError("the program gave no output named logits; export the bundle again")
      }
      return try Self.floats(logits)
    }

    /// One model serves all adapters that are inputs.
    private var shared: MLModel?

    private func loadInputs(_ adapter: BundleAdapter?, _ bundle: ModelBundle) throws -> CoreMLAdapter {
      let model = try shared ?? open(bundle, bundle.manifest.program, nil)
      shared = model
      let shapes = model.modelDescription.inputDescriptionsByName.compactMapValues { description in
        description.multiArrayConstraint?.shape.map(\.intValue)
      }
      let paths = bundle.manifest.modules.compactMap { $0 }
      guard let inputs = AdapterInputs(shapes: shapes, modules: paths.count) else {
        throw LordbaError("\(bundle.program.path): takes other inputs than the manifest says; export the bundle again")
      }
      var parts = [AdapterBlob.Parts?](repeating: nil, count: paths.count)
      if let adapter {
        let blob = try bundle.readBlob(bundle.folder.appendingPathComponent(adapter.file))
        parts = paths.indices.map(blob.parts)
      }
      return CoreMLAdapter(model, inputs: try inputs.fill(parts).mapValues(Self.half))
    }

    private func open(_ bundle: ModelBundle, _ program: String, _ function: String?) throws -> MLModel {
      let configuration = MLModelConfiguration()
      configuration.computeUnits = units
      if let function {
        guard #available(iOS 18, macOS 15, *) else {
          throw LordbaError(
            "\(bundle.program.path): adapters as functions need iOS 18 or macOS 15; export with --ios 17 or "
              + "--adapter-mode inputs")
        }
        configuration.functionName = function
      }
      return try MLModel(contentsOf: try CompiledPrograms.compiled(program, of: bundle), configuration: configuration)
    }

    private static func vector(_ values: [Int32]) throws -> MLMultiArray {
      let array = try MLMultiArray(shape: [NSNumber(value: values.count)], dataType: .int32)
      fill(array, with: values)
      return array
    }

    private static func array(_ tokens: [Int32]) throws -> MLFeatureValue {
      let array = try MLMultiArray(shape: [1, NSNumber(value: tokens.count)], dataType: .int32)
      fill(array, with: tokens)
      return MLFeatureValue(multiArray: array)
    }

    private static func half(_ input: AdapterInputs.Array) throws -> MLFeatureValue {
      let array = try MLMultiArray(shape: input.shape.map { NSNumber(value: $0) }, dataType: .float16)
      fill(array, with: input.values)
      return MLFeatureValue(multiArray: array)
    }

    /// A new array is contiguous.
    private static func fill<Element>(_ array: MLMultiArray, with values: [Element]) {
      array.withUnsafeMutableBytes { bytes, _ in
        values.withUnsafeBytes { bytes.copyMemory(from: $0) }
      }
    }

    private static func floats(_ array: MLMultiArray) throws -> [Float] {
      guard array.strides.last?.intValue == 1, array.shape.dropLast().allSatisfy({ $0.intValue == 1 }) else {
        throw LordbaError("logits of shape \(array.shape) are not one contiguous row; export the bundle again")
      }
      return try array.withUnsafeBytes { bytes in
        switch array.dataType {
        case .float32: return Array(bytes.bindMemory(to: Float.self).prefix(array.count))
        case .float16: return bytes.bindMemory(to: UInt16.self).prefix(array.count).map(floatFromHalf)
        default: throw LordbaError("logits are neither fp32 nor fp16; export the bundle again")
        }
      }
    }
  }

  /// A function or package, loaded, with the inputs that do not change.
  private final class CoreMLAdapter: LoadedAdapter {
    let model: MLModel
    let inputs: [String: MLFeatureValue]
    let isStateful: Bool

    init(_ model: MLModel, inputs: [String: MLFeatureValue]) {
      self.model = model
      self.inputs = inputs
      if #available(iOS 18, macOS 15, *) {
        isStateful = !model.modelDescription.stateDescriptionsByName.isEmpty
      } else {
        isStateful = false
      }
    }
  }

  /// Packages compiled on this device, kept in the caches folder under the contents that they were made from.
  enum CompiledPrograms {
    static func compiled(_ program: String, of bundle: ModelBundle) throws -> URL {
      let source = bundle.folder.appendingPathComponent(program)
      if source.pathExtension == "mlmodelc" { return source }
      let parts = bundle.manifest.files.filter { $0.path == program || $0.path.hasPrefix(program + "/") }
      let key = sha256(of: Data(parts.map(\.sha256).joined().utf8))
      let caches = try FileManager.default.url(
        for: .cachesDirectory, in: .userDomainMask, appropriateFor: nil, create: true)
      let folder = caches.appendingPathComponent("lordba-programs")
      let target = folder.appendingPathComponent("\(key).mlmodelc")
      if FileManager.default.fileExists(atPath: target.path) { return target }
      try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
      let compiled = try MLModel.compileModel(at: source)
      do {
        try FileManager.default.moveItem(at: compiled, to: target)
      } catch {
        guard FileManager.default.fileExists(atPath: target.path) else { throw error }  // another call was faster
      }
      return target
    }
  }
#endif
