import Foundation
import LordbaDemo
import LordbaKit
import Observation

/// What the screens share: the library, and the bundle that is open. One program is loaded at a time.
@MainActor @Observable
final class AppModel {
  let library: BundleLibrary
  let latency: LatencyModel
  private(set) var chat: ChatModel?
  private(set) var isOpening = false
  var problem: String?
  private let runtimes: Runtimes

  init() {
    var runtimes = Runtimes()
    #if canImport(ExecuTorch)
      runtimes.add(ExecuTorchRunner.self)
    #endif
    self.runtimes = runtimes
    let documents = FileManager.default.urls(for: .documentDirectory, in: .userDomainMask)[0]
    library = BundleLibrary(folder: documents.appendingPathComponent("Bundles", isDirectory: true))
    latency = LatencyModel(runtimes: runtimes)
  }

  /// Opens a bundle for the chat, in place of the one that is open.
  func open(_ bundle: ModelBundle) async {
    guard !isOpening else { return }
    close()
    isOpening = true
    defer { isOpening = false }
    do {
      chat = try await ChatModel.open(bundle, in: runtimes)
    } catch {
      problem = error.localizedDescription
    }
  }

  func close() {
    chat?.stop()
    chat = nil
  }

  /// Measures a bundle with all its adapters. The chat's program is closed first: two would share memory and cores.
  func measure(_ bundle: ModelBundle) async {
    close()
    await latency.run(bundle, adapters: bundle.manifest.adapters.map(\.name))
  }
}
