import Foundation

/// A bundle that was found complete and undamaged: a folder with program, adapters, tokenizer and manifest.
public struct ModelBundle: Equatable, Sendable {
  public let folder: URL
  public internal(set) var manifest: Manifest

  /// Reads a bundle and checks every file of it before anything runs. Throws LordbaError.
  public init(folder: URL, target: String? = nil) throws {
    self.folder = folder
    let path = folder.appendingPathComponent(Manifest.fileName)
    manifest = try Self.readManifest(path)
    if let target, manifest.target != target {
      throw LordbaError(
        "\(path.path): the bundle is for \(manifest.target), not for \(target); export it with --target \(target)")
    }
    try checkListed(path)
    for file in manifest.files { try check(file) }
  }

  public var program: URL { folder.appendingPathComponent(manifest.program) }

  public var tokenizer: URL? { manifest.tokenizer.map { folder.appendingPathComponent($0) } }

  /// What the manifest says of an adapter.
  public func adapter(_ name: String) throws -> BundleAdapter {
    if let found = manifest.adapters.first(where: { $0.name == name }) { return found }
    let known = (manifest.adapters.map(\.name) + ["none"]).joined(separator: ", ")
    throw LordbaError("\(folder.path): holds no adapter '\(name)'; it holds \(known)")
  }

  /// The runtime's file of an adapter; nil means the base alone, which may need a file too.
  public func adapterFile(_ name: String?) throws -> URL? {
    guard let name else { return manifest.noAdapter.map { folder.appendingPathComponent($0) } }
    return folder.appendingPathComponent(try adapter(name).file)
  }

  private static func readManifest(_ path: URL) throws -> Manifest {
    guard let data = try? Data(contentsOf: path) else {
      throw LordbaError("\(path.path): not found; a bundle is made by: python -m lordba.export")
    }
    struct Version: Decodable {
      let format_version: JSONValue
    }
    guard let version = try? JSONDecoder().decode(Version.self, from: data).format_version else {
      throw LordbaError("\(path.path): is not a readable manifest; copy or export the bundle again")
    }
    guard version == .int(Manifest.formatVersion) else {
      throw LordbaError(
        "\(path.path): format_version \(version.profileText) is not known here (this app reads "
          + "\(Manifest.formatVersion)); update the app or export the bundle again")
    }
    do {
      return try JSONDecoder().decode(Manifest.self, from: data)
    } catch let error as DecodingError {
      throw LordbaError(
        "\(path.path): lacks or misspells a key (\(describe(error))); export the bundle again")
    }
  }

  private static func describe(_ error: DecodingError) -> String {
    func name(_ keys: [any CodingKey]) -> String { keys.map(\.stringValue).joined(separator: ".") }
    switch error {
    case .keyNotFound(let key, let context): return name(context.codingPath + [key])
    case .typeMismatch(_, let context), .valueNotFound(_, let context), .dataCorrupted(let context):
      return "\(name(context.codingPath)): \(context.debugDescription)"
    @unknown default: return "\(error)"
    }
  }

  private func checkListed(_ path: URL) throws {
    let used = [manifest.program, manifest.tokenizer, manifest.noAdapter] + manifest.adapters.map(\.file)
    var listed: Set<String> = []
    for file in manifest.files {  // and the folders that hold it: a program may be one
      let parts = file.path.split(separator: "/", omittingEmptySubsequences: false)
      for n in 1...parts.count { listed.insert(parts[..<n].joined(separator: "/")) }
    }
    if let unlisted = used.compactMap({ $0 }).filter({ !listed.contains($0) }).min() {
      throw LordbaError("\(path.path): uses \(unlisted), which its files do not list; export the bundle again")
    }
  }

  private func check(_ file: BundleFile) throws {
    let path = folder.appendingPathComponent(file.path)
    let inside = folder.resolvingSymlinksInPath().standardizedFileURL.pathComponents
    let actual = path.resolvingSymlinksInPath().standardizedFileURL.pathComponents
    guard actual.count > inside.count, actual.starts(with: inside) else {
      throw LordbaError(
        "\(folder.appendingPathComponent(Manifest.fileName).path): names a file outside the bundle: \(file.path)")
    }
    let attributes = try? FileManager.default.attributesOfItem(atPath: path.resolvingSymlinksInPath().path)
    guard let attributes, attributes[.type] as? FileAttributeType == .typeRegular else {
      throw LordbaError("\(path.path): is missing although the manifest lists it; copy or export the bundle again")
    }
    let found = (attributes[.size] as? NSNumber)?.intValue ?? 0
    guard found == file.bytes else {
      throw LordbaError(
        "\(path.path): expected \(file.bytes) bytes, found \(found); copy or export the bundle again")
    }
    guard (try? sha256(of: path)) == file.sha256 else {
      throw LordbaError(
        "\(path.path): its contents do not match the manifest's sha256; copy or export the bundle again")
    }
  }
}
