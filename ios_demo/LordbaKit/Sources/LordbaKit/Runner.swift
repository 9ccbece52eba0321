/// A loaded program with its KV cache, in its runtime. It is not Sendable: one AdapterBank owns it.
public protocol Runner: AnyObject {
  /// The target of the bundles that it runs.
  static var target: String { get }

  /// Loads a bundle's program.
  init(_ bundle: ModelBundle) throws

  /// How many tokens one run takes.
  var longest: Int { get }

  /// An adapter of the bundle in the runtime's own form; nil is the base alone.
  func load(_ adapter: BundleAdapter?, of bundle: ModelBundle) throws -> LoadedAdapter

  /// Switches to an adapter that `load` returned; the cache counts as empty afterwards.
  func use(_ adapter: LoadedAdapter) throws

  /// Runs tokens that follow the first `start` of the cache (0 forgets it): the logits of the last one.
  func run(_ tokens: [Int32], start: Int) throws -> [Float]
}

/// An adapter as its runtime holds it; each runtime has a class of its own.
open class LoadedAdapter {
  public init() {}

  /// As the class of the runtime that is asked to use it.
  public func of<Own: LoadedAdapter>(_ kind: Own.Type) -> Own {
    guard let own = self as? Own else { preconditionFailure("\(self) was loaded by another runtime than \(kind)") }
    return own
  }
}
