import Foundation

/// Adapters that come to a bundle after its export, and leave it. What counts is the manifest: replacing it is the one
/// step in which an adapter appears or disappears.
extension ModelBundle {
  /// The bundle with one adapter more, or with another one of this name. Throws, and changes nothing, where the adapter
  /// is not one for this base and program.
  func installing(_ name: String, _ adapter: Adapter) throws -> ModelBundle {
    try checkInstallable(name, adapter)
    let blob = AdapterBlob(modules: manifest.modules.map { $0.flatMap { adapter.modules[$0] } })
    try checkSizes(blob)
    let file = unusedFile(name)
    let path = folder.appendingPathComponent(file)
    try FileManager.default.createDirectory(at: path.deletingLastPathComponent(), withIntermediateDirectories: true)
    try Data(blob.bytes).write(to: path, options: .atomic)
    let entry = BundleAdapter(
      name: name, file: file, rank: adapter.rank, scaleCode: adapter.scaleCode.rawValue, modules: adapter.modules.count,
      bytes: adapter.bytes, fp16LoRABytes: adapter.fp16LoRABytes, fileBytes: blob.bytes.count)
    do {
      let listed = BundleFile(path: file, bytes: blob.bytes.count, sha256: try sha256(of: path))
      return try changed(name, adding: (entry, listed))
    } catch {
      try? FileManager.default.removeItem(at: path)
      throw error
    }
  }

  /// The bundle without an adapter; its file is deleted.
  func removing(_ name: String) throws -> ModelBundle {
    _ = try adapter(name)
    return try changed(name, adding: nil)
  }

  /// Whether an adapter may be called so: it does as a file's name, and does not stand for the base alone.
  static func isAdapterName(_ name: String) -> Bool {
    guard let first = name.first, first.isLetter || first.isNumber, name != "none" else { return false }
    return name.allSatisfy { $0.isLetter || $0.isNumber || "-_.".contains($0) }
  }

  private func checkInstallable(_ name: String, _ adapter: Adapter) throws {
    guard Self.isAdapterName(name) else {
      throw LordbaError("the adapter's name '\(name)' is no usable file name; take letters, digits, - _ and .")
    }
    guard ["input", "inputs"].contains(manifest.adapterMode) else {
      throw LordbaError(
        "\(folder.path): its adapters are \(manifest.adapterMode), which only an export can change; export it with the "
          + "adapters that you want, or with --adapter-mode input (Core ML: inputs)")
    }
    guard adapter.baseFingerprint == nil || adapter.baseFingerprint == manifest.base.fingerprint else {
      throw LordbaError(
        "adapter \(name): was made for the base \(adapter.baseModel ?? "unknown") with fingerprint "
          + "\(adapter.baseFingerprint ?? "none"), but \(folder.path) holds \(manifest.base.name) with "
          + "\(manifest.base.fingerprint); install it into a bundle of its own base")
    }
    let places = Set(manifest.modules.compactMap { $0 })
    if let unknown = adapter.modules.keys.filter({ !places.contains($0) }).min() {
      throw LordbaError(
        "adapter \(name): adapts \(unknown), for which the program of \(folder.path) has no place; export a bundle with "
          + "this adapter")
    }
  }

  /// Refuses modules of other sizes than those of an adapter that came with the program.
  private func checkSizes(_ blob: AdapterBlob) throws {
    let known = try manifest.adapters.map { try readBlob(folder.appendingPathComponent($0.file)) }
    for (i, module) in manifest.modules.enumerated() {
      guard let found = blob.size(i), let expected = known.lazy.compactMap({ $0.size(i) }).first else { continue }
      guard found == expected else {
        throw LordbaError(
          "the adapter maps \(found.dIn) to \(found.dOut) channels in \(module ?? "?"), the program \(expected.dIn) to "
            + "\(expected.dOut); it is for another model")
      }
    }
  }

  /// The blob that an adapter's file is, with every module of the program in it.
  public func readBlob(_ path: URL) throws -> AdapterBlob {
    guard let data = try? Data(contentsOf: path) else { throw LordbaError("\(path.path): not found or not readable") }
    return try AdapterBlob(bytes: [UInt8](data), expecting: manifest.modules.count, name: path.path)
  }

  private func unusedFile(_ name: String) -> String {
    var i = 1
    while FileManager.default.fileExists(atPath: folder.appendingPathComponent("adapters/\(name).\(i)").path) { i += 1 }
    return "adapters/\(name).\(i)"
  }

  private func changed(_ name: String, adding new: (BundleAdapter, BundleFile)?) throws -> ModelBundle {
    var result = self
    result.manifest.adapters.removeAll { $0.name == name }
    let kept = Set(result.manifest.adapters.map(\.file))
    let unused = manifest.adapters.filter { $0.name == name && !kept.contains($0.file) }.map(\.file)
    result.manifest.files.removeAll { unused.contains($0.path) }
    if let (adapter, file) = new {
      result.manifest.adapters.append(adapter)
      result.manifest.files.append(file)
    }
    try result.writeAdapters()
    for file in unused {
      try? FileManager.default.removeItem(at: folder.appendingPathComponent(file))  // it only takes room
    }
    return result
  }

  /// Replaces manifest.json in one step; what this program does not know of it stays.
  private func writeAdapters() throws {
    let path = folder.appendingPathComponent(Manifest.fileName)
    guard case .object(var record) = try JSONDecoder().decode(JSONValue.self, from: Data(contentsOf: path)) else {
      throw LordbaError("\(path.path): is not a readable manifest; copy or export the bundle again")
    }
    func value(_ encodable: some Encodable) throws -> JSONValue {
      try JSONDecoder().decode(JSONValue.self, from: JSONEncoder().encode(encodable))
    }
    record["adapters"] = try value(manifest.adapters)
    record["files"] = try value(manifest.files)
    let encoder = JSONEncoder()
    encoder.outputFormatting = [.prettyPrinted, .sortedKeys, .withoutEscapingSlashes]
    try encoder.encode(JSONValue.object(record)).write(to: path, options: .atomic)
  }
}
