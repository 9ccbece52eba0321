import Foundation
import LordbaKit
import Observation

/// The bundles in the app's folder: each is checked, file by file, before it is offered.
@MainActor @Observable
public final class BundleLibrary {
  public enum State: Equatable, Sendable {
    case checking
    case ready(ModelBundle)
    case refused(String)
  }

  public struct Entry: Identifiable, Equatable, Sendable {
    public let folder: URL
    public fileprivate(set) var state: State

    public var id: URL { folder }
    public var name: String { folder.lastPathComponent }

    public var bundle: ModelBundle? {
      if case .ready(let bundle) = state { bundle } else { nil }
    }
  }

  public let folder: URL
  public private(set) var entries: [Entry] = []
  /// What went wrong last, in words for the user.
  public var problem: String?

  public init(folder: URL) {
    self.folder = folder
  }

  /// Lists the folder anew and checks what it holds.
  public func refresh() async {
    do {
      try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
      let found = try FileManager.default.contentsOfDirectory(
        at: folder, includingPropertiesForKeys: [.isDirectoryKey], options: .skipsHiddenFiles)
      let folders = found.filter { (try? $0.resourceValues(forKeys: [.isDirectoryKey]))?.isDirectory == true }
      entries = folders.sorted { $0.lastPathComponent < $1.lastPathComponent }.map {
        Entry(folder: $0, state: .checking)
      }
    } catch {
      problem = "\(folder.path): \(error.localizedDescription)"
    }
    for entry in entries { await check(entry.folder) }
  }

  /// Copies a bundle into the folder; one that is damaged is refused and leaves nothing behind.
  public func add(_ source: URL) async {
    let target = folder.appendingPathComponent(source.lastPathComponent)
    let temporary = folder.appendingPathComponent(".\(source.lastPathComponent).partial")
    do {
      if FileManager.default.fileExists(atPath: target.path) {
        throw LordbaError("\(target.lastPathComponent) is already here; delete it first")
      }
      try await Task.detached {
        try FileManager.default.createDirectory(
          at: temporary.deletingLastPathComponent(), withIntermediateDirectories: true)
        try? FileManager.default.removeItem(at: temporary)
        do {
          try FileManager.default.copyItem(at: source, to: temporary)
          _ = try ModelBundle(folder: temporary)
          try FileManager.default.moveItem(at: temporary, to: target)
        } catch {
          try? FileManager.default.removeItem(at: temporary)
          throw error
        }
      }.value
      await refresh()
    } catch {
      problem = error.localizedDescription
    }
  }

  public func delete(_ entry: Entry) {
    do {
      try FileManager.default.removeItem(at: entry.folder)
      entries.removeAll { $0.id == entry.id }
    } catch {
      problem = error.localizedDescription
    }
  }

  private func check(_ folder: URL) async {
    let state: State = await Task.detached {
      do {
        return .ready(try ModelBundle(folder: folder))
      } catch {
        return .refused(error.localizedDescription)
      }
    }.value
    guard let i = entries.firstIndex(where: { $0.folder == folder }) else { return }
    entries[i].state = state
  }
}
