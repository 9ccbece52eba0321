/// The runtimes that an app has, by the target of the bundles that they run.
public struct Runtimes: Sendable {
  private var known: [String: any Runner.Type] = [:]

  /// What comes with LordbaKit.
  public init() {
    add(ReferenceRunner.self)
    #if canImport(CoreML)
      add(CoreMLRunner.self)
    #endif
  }

  /// Adds a runtime of the app's own.
  public mutating func add(_ runner: any Runner.Type) { known[runner.target] = runner }

  /// Loads a bundle's program in the runtime that it was exported for.
  public func open(_ bundle: ModelBundle) throws -> sending any Runner {
    guard let runner = known[bundle.manifest.target] else {
      throw LordbaError(
        "\(bundle.folder.lastPathComponent): is a bundle for \(bundle.manifest.target); this app runs bundles for "
          + known.keys.sorted().joined(separator: ", "))
    }
    return try runner.init(bundle)
  }
}
