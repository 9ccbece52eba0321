import Foundation

/// Latency of a bundle, base and adapters in turns, so that heat and clock speed hit all of them alike.
public struct Benchmark: Sendable {
  public var loads = 3
  public var swaps = 20
  public var prefillTokens = 128
  public var prefills = 10
  public var decodes = 64
  /// Runs of each thing that are not counted.
  public var warmUp = 2
  /// How many threads the runtime takes, as far as it is known; 0 if the system decides.
  public var threads = 0

  public init() {}

  /// What the profile says of how it was measured.
  public var conditions: [String: JSONValue] {
    ["warm_up": .int(warmUp), "interleaved": .bool(true), "prefill_tokens": .int(prefillTokens)]
  }

  /// Measures; `report` is called with the share that is done. Ends with CancellationError where the task is cancelled.
  public func run(
    _ bundle: ModelBundle, adapters: [String], runtimes: Runtimes = Runtimes(), report: (Double) -> Void = { _ in }
  ) throws -> [Series] {
    let clock = ContinuousClock()
    let names = [nil] + adapters.map(Optional.some)
    let entries = try names.map { try $0.map(bundle.adapter) }
    let length = min(prefillTokens, bundle.manifest.maxSeqLen - 1)
    guard length > 0 else { throw LordbaError("\(bundle.folder.path): takes no prompt at all") }
    let steps = Double(loads + (swaps + prefills + decodes + 3 * warmUp) * names.count)
    var done = 0.0
    func time(_ body: () throws -> Void) throws -> Double {
      try Task.checkCancellation()
      let start = clock.now
      try body()
      defer {
        done += 1
        report(min(done / steps, 1))
      }
      return milliseconds(clock.now - start)
    }

    var runner: (any Runner)?
    let loadTimes = try (0..<max(loads, 1)).map { _ in
      runner = nil  // two at once may not fit
      return try time {
        runner = try runtimes.open(bundle)
        try runner!.use(try runner!.load(nil, of: bundle))
      }
    }
    let loaded = runner!
    var series = [makeSeries(bundle, nil, "load", 0, loadTimes)]

    let forms = try entries.map { try loaded.load($0, of: bundle) }
    func measure(_ phase: String, _ tokens: Int, _ count: Int, _ body: (Int) throws -> Double) throws {
      var samples = [[Double]](repeating: [], count: names.count)
      for round in 0..<count + warmUp {
        for i in names.indices {
          let sample = try body(i)
          if round >= warmUp { samples[i].append(sample) }
        }
      }
      for i in names.indices where !samples[i].isEmpty {
        series.append(makeSeries(bundle, entries[i], phase, tokens, samples[i]))
      }
    }
    let prompt = (0..<length).map { Int32(3 + $0 % 200) }
    try measure("swap", 0, swaps) { i in try time { try loaded.use(forms[i]) } }
    try measure("prefill", length, prefills) { i in
      try loaded.use(forms[i])
      return try time {
        for begin in stride(from: 0, to: length, by: loaded.longest) {
          _ = try loaded.run(Array(prompt[begin..<min(begin + loaded.longest, length)]), start: begin)
        }
      }
    }
    // One text per adapter; its last position is computed again and again, so that every sample has the same length.
    var samples = [[Double]](repeating: [], count: names.count)
    let block = 8
    for round in stride(from: 0, to: decodes, by: block) {
      for i in names.indices {
        try loaded.use(forms[i])
        for begin in stride(from: 0, to: length, by: loaded.longest) {
          _ = try loaded.run(Array(prompt[begin..<min(begin + loaded.longest, length)]), start: begin)
        }
        for n in 0..<warmUp + min(block, decodes - round) {
          let sample = try time { _ = try loaded.run([prompt[0]], start: length) }
          if n >= warmUp { samples[i].append(sample) }
        }
      }
    }
    for i in names.indices where !samples[i].isEmpty {
      series.append(makeSeries(bundle, entries[i], "decode", 1, samples[i]))
    }
    report(1)
    return series
  }

  private func makeSeries(
    _ bundle: ModelBundle, _ adapter: BundleAdapter?, _ phase: String, _ tokens: Int, _ samples: [Double]
  ) -> Series {
    Series(
      target: bundle.manifest.target, model: bundle.manifest.base.name, baseQuant: bundle.manifest.baseQuant,
      adapter: adapter == nil ? "none" : "lordba", phase: phase, tokens: tokens, threads: threads, samples: samples,
      adapterName: adapter?.name, rank: adapter?.rank, bits: adapter?.bitsPerWeight, scaleCode: adapter?.scaleCode)
  }
}
