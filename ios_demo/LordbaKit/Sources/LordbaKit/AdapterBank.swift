import Foundation

/// Many adapters over one loaded program: which are loaded, who generates with which, and who may come or go.
///
/// The program has one KV cache, so one generation runs at a time, and others wait for it in their order. A prompt that
/// begins as the cache does, with the same adapter, runs only what is new. Adapters stay loaded, the last used first, up
/// to `budget` bytes of their files.
public actor AdapterBank {
  public static let defaultBudget = 64 << 20

  public private(set) var bundle: ModelBundle
  private let runner: any Runner
  private let budget: Int

  private var kept: [(name: String?, loaded: LoadedAdapter)] = []  // the last used one last
  private var current: LoadedAdapter?
  private var text: [Int32] = []  // what the cache holds, read with `current`

  private var isGenerating = false
  private var waiting: [CheckedContinuation<Void, Never>] = []
  private var users: [String: Int] = [:]
  private var leaving: Set<String> = []
  private var removers: [String: CheckedContinuation<Void, Never>] = [:]

  public init(bundle: ModelBundle, runner: sending any Runner, budget: Int = defaultBudget) {
    self.bundle = bundle
    self.runner = runner
    self.budget = budget
  }

  /// The adapters that can be used; nil, the base alone, comes besides.
  public var names: [String] { bundle.manifest.adapters.map(\.name).filter { !leaving.contains($0) } }

  /// The adapters in memory, the last used one last.
  public var loaded: [String] { kept.compactMap(\.name) }

  /// Continues a prompt with an adapter, or with the base alone (nil); ends early where the task is cancelled.
  public nonisolated func generate(
    _ name: String?, prompt: [Int32], options: GenerationOptions
  ) -> AsyncThrowingStream<GenerationEvent, any Error> {
    AsyncThrowingStream { continuation in
      let task = Task {
        do {
          try await self.run(name, prompt, options) { continuation.yield($0) }
          continuation.finish()
        } catch {
          continuation.finish(throwing: error)
        }
      }
      continuation.onTermination = { _ in task.cancel() }
    }
  }

  /// Adds an adapter folder, or replaces the adapter of that name, for the next generation.
  public func install(_ name: String, folder: URL) throws {
    if leaving.contains(name) { throw LordbaError("\(name): is being removed; wait for it") }
    bundle = try bundle.installing(name, try Adapter(folder: folder))
    kept.removeAll { $0.name == name }
  }

  /// Removes an adapter and its file, once nobody uses it any more; from now on nobody can begin to.
  public func remove(_ name: String) async throws {
    try check(name)
    leaving.insert(name)
    defer { leaving.remove(name) }
    if users[name, default: 0] > 0 {
      await withCheckedContinuation { removers[name] = $0 }
    }
    bundle = try bundle.removing(name)
    kept.removeAll { $0.name == name }
  }

  private func run(
    _ name: String?, _ prompt: [Int32], _ options: GenerationOptions, _ report: (GenerationEvent) -> Void
  ) async throws {
    if let name { try check(name) }
    enter(name)
    defer { leave(name) }
    await acquire()
    defer { release() }
    try Task.checkCancellation()

    let maximum = bundle.manifest.maxSeqLen
    guard !prompt.isEmpty, prompt.count <= maximum else {
      throw LordbaError(
        "a prompt of \(prompt.count) tokens does not fit the program, which was exported for \(maximum); shorten it or "
          + "export with a larger --max-seq-len")
    }
    let clock = ContinuousClock()
    var began = clock.now
    func lap() -> Double {
      defer { began = clock.now }
      return milliseconds(clock.now - began)
    }
    try swap(to: name)
    let cached = min(zip(text, prompt).prefix { $0 == $1 }.count, prompt.count - 1)
    var logits = try await feed(Array(prompt[cached...]), after: cached)
    report(.prompt(ran: prompt.count - cached, cached: cached, milliseconds: lap()))

    var random = SeededGenerator(seed: options.seed)
    let ends = options.stopIDs.union(bundle.manifest.eosIDs.map(Int32.init))
    for i in 0..<options.maxNewTokens {
      let token = Int32(options.sampler.sample(logits, uniform: random.uniform()))
      if ends.contains(token) { return }
      report(.token(token, milliseconds: lap()))
      if i + 1 == options.maxNewTokens || text.count >= maximum { return }
      logits = try await feed([token], after: text.count)
    }
  }

  private func swap(to name: String?) throws {
    let place = kept.firstIndex { $0.name == name }
    let next = try place.map { kept.remove(at: $0).loaded } ?? runner.load(try name.map(bundle.adapter), of: bundle)
    kept.append((name, next))
    let sizes = Dictionary(bundle.manifest.adapters.map { ($0.name, $0.fileBytes) }) { $1 }
    while kept.count > 1, kept.reduce(0, { $0 + (sizes[$1.name ?? ""] ?? 0) }) > budget { kept.removeFirst() }
    if current !== next {
      current = nil  // should the swap fail half way
      text = []
      try runner.use(next)
      current = next
    }
  }

  /// Appends tokens to the first `start` of the cache and returns the logits of what comes next.
  private func feed(_ tokens: [Int32], after start: Int) async throws -> [Float] {
    text.removeSubrange(start...)
    var logits: [Float] = []
    var begin = 0
    while begin < tokens.count {
      try Task.checkCancellation()
      let piece = Array(tokens[begin..<min(begin + runner.longest, tokens.count)])
      logits = try runner.run(piece, start: text.count)
      text += piece
      begin += piece.count
      await Task.yield()  // the actor answers others between two runs
    }
    return logits
  }

  private func check(_ name: String) throws {
    if leaving.contains(name) {
      throw LordbaError("\(bundle.folder.path): the adapter '\(name)' is being removed; use another")
    }
    _ = try bundle.adapter(name)
  }

  private func enter(_ name: String?) {
    if let name { users[name, default: 0] += 1 }
  }

  private func leave(_ name: String?) {
    guard let name else { return }
    users[name, default: 0] -= 1
    if users[name] == 0 { removers.removeValue(forKey: name)?.resume() }
  }

  private func acquire() async {
    if isGenerating {
      await withCheckedContinuation { waiting.append($0) }  // `release` hands the turn over
    } else {
      isGenerating = true
    }
  }

  private func release() {
    if waiting.isEmpty { isGenerating = false } else { waiting.removeFirst().resume() }
  }
}

func milliseconds(_ duration: Duration) -> Double {
  Double(duration.components.seconds) * 1e3 + Double(duration.components.attoseconds) * 1e-15
}
