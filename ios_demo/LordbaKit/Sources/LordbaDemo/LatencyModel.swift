import Foundation
import LordbaKit
import Observation

/// The latency of a bundle, with each adapter and without, and the profile file of it.
@MainActor @Observable
public final class LatencyModel {
  public struct Bar: Identifiable, Equatable, Sendable {
    public let id: Int
    public let phase: String
    /// "none" or the adapter's name.
    public let adapter: String
    public let median: Double
    public let p99: Double
    /// Over the base alone, where it is more than the noise.
    public let overheadPercent: Double?
  }

  public var benchmark = Benchmark()
  public private(set) var isRunning = false
  /// The share that is done.
  public private(set) var share = 0.0
  public private(set) var series: [Series] = []
  /// The profile file of the last run.
  public private(set) var file: URL?
  public var problem: String?

  private let runtimes: Runtimes
  private var task: Task<[Series], any Error>?

  public init(runtimes: Runtimes) {
    self.runtimes = runtimes
  }

  public var phases: [String] {
    series.map(\.phase).reduce(into: []) { all, phase in if !all.contains(phase) { all.append(phase) } }
  }

  public var bars: [Bar] {
    series.enumerated().map { i, one in
      let base = series.first { $0.adapter == "none" && $0.phase == one.phase }
      let over = one.adapter == "none" ? nil : base.flatMap { Profile.overhead(one, over: $0).percent }
      return Bar(
        id: i, phase: one.phase, adapter: one.adapterName ?? "none", median: Statistics.median(one.samples),
        p99: Statistics.percentile(one.samples, 99), overheadPercent: over)
    }
  }

  public func cancel() { task?.cancel() }

  /// Measures a bundle with some of its adapters; the program should not be loaded elsewhere meanwhile.
  public func run(_ bundle: ModelBundle, adapters: [String]) async {
    guard !isRunning else { return }
    (isRunning, share, series, file) = (true, 0, [], nil)
    defer { isRunning = false }
    let (shares, continuation) = AsyncStream.makeStream(of: Double.self, bufferingPolicy: .bufferingNewest(1))
    let (benchmark, runtimes) = (benchmark, runtimes)
    let task = Task.detached {
      defer { continuation.finish() }
      return try benchmark.run(bundle, adapters: adapters, runtimes: runtimes) { continuation.yield($0) }
    }
    self.task = task
    for await share in shares { self.share = share }
    do {
      series = try await task.value
      file = try write(bundle)
    } catch is CancellationError {
      share = 0
    } catch {
      problem = error.localizedDescription
    }
  }

  private func write(_ bundle: ModelBundle) throws -> URL {
    let machine: [String: JSONValue] = ["cores": .int(ProcessInfo.processInfo.activeProcessorCount)]
    let text = Profile.json(series, device: .current(), machine: machine, conditions: benchmark.conditions)
    let name = "profile-\(bundle.folder.lastPathComponent).json"
    let file = FileManager.default.temporaryDirectory.appendingPathComponent(name)
    try Data(text.utf8).write(to: file, options: .atomic)
    return file
  }
}
