import CLordba
import Foundation

/// See Runner: a Llama's own weights, as Hugging Face writes them, over the C kernels. It runs wherever Swift does.
///
/// Its bundles have the target "reference", the program `model.safetensors` with `config.json` beside it, and adapters
/// as blobs.
public final class ReferenceRunner: Runner {
  public static let target = "reference"
  private static let configName = "config.json"

  private let model: LlamaModel
  private var used: BlobAdapter?

  public let longest: Int

  public init(_ bundle: ModelBundle) throws {
    guard bundle.manifest.target == Self.target else {
      throw LordbaError("\(bundle.folder.path): is a bundle for \(bundle.manifest.target), not for \(Self.target)")
    }
    let config = try LlamaConfig.read(
      bundle.program.deletingLastPathComponent().appendingPathComponent(Self.configName))
    longest = bundle.manifest.maxSeqLen
    model = try LlamaModel(
      config: config, weights: try SafetensorsFile(path: bundle.program), contextLength: longest)
  }

  public func load(_ adapter: BundleAdapter?, of bundle: ModelBundle) throws -> LoadedAdapter {
    guard let adapter else { return BlobAdapter(nil, []) }
    return BlobAdapter(
      try bundle.readBlob(bundle.folder.appendingPathComponent(adapter.file)), bundle.manifest.modules)
  }

  public func use(_ adapter: LoadedAdapter) throws {
    let own = adapter.of(BlobAdapter.self)
    model.adapter = own.modules
    used = own  // the modules point into its blob
  }

  public func run(_ tokens: [Int32], start: Int) throws -> [Float] { try model.run(tokens, start: start) }
}

/// An adapter whose modules the kernels read out of its blob.
private final class BlobAdapter: LoadedAdapter {
  private let blob: AdapterBlob?
  let modules: [String: lordba_module]

  init(_ blob: AdapterBlob?, _ paths: [String?]) {
    self.blob = blob
    let found = paths.enumerated().compactMap { i, path in
      path.flatMap { path in blob?.module(i).map { (path, $0) } }
    }
    modules = Dictionary(uniqueKeysWithValues: found)
  }
}
