import Foundation
import Testing

@testable import LordbaKit

struct BankTests {
  private func bank(_ model: GoldenModel, budget: Int = AdapterBank.defaultBudget) throws -> AdapterBank {
    AdapterBank(bundle: model.bundle, runner: try ReferenceRunner(model.bundle), budget: budget)
  }

  private func text(
    _ bank: AdapterBank, _ name: String?, _ prompt: [Int32], _ options: GenerationOptions = .init(maxNewTokens: 12)
  ) async throws -> (tokens: [Int32], ran: Int, cached: Int) {
    var (tokens, ran, cached): ([Int32], Int, Int) = ([], 0, 0)
    for try await event in bank.generate(name, prompt: prompt, options: options) {
      switch event {
      case .prompt(let newRan, let newCached, _): (ran, cached) = (newRan, newCached)
      case .token(let token, _): tokens.append(token)
      }
    }
    return (tokens, ran, cached)
  }

  @Test func eachAdapterWritesItsOwnTextAndWritesItAgain() async throws {
    let model = try GoldenModel()
    let bank = try bank(model)
    let prompt = model.golden.tokens
    let base = try await text(bank, nil, prompt).tokens
    let adapted = try await text(bank, "adapter", prompt).tokens
    #expect(base != adapted && base.count == 12)
    #expect(try await text(bank, nil, prompt).tokens == base)
    #expect(await bank.loaded == ["adapter"])
    let first = model.golden.last_logits["adapter"]!
    #expect(adapted.first == Int32(first.firstIndex(of: first.max()!)!))
  }

  @Test func aPromptThatGoesOnRunsOnlyWhatIsNew() async throws {
    let model = try GoldenModel()
    let bank = try bank(model)
    let prompt = model.golden.tokens
    let first = try await text(bank, "adapter", prompt, .init(maxNewTokens: 4))
    let longer = prompt + first.tokens + [5, 6]
    let second = try await text(bank, "adapter", longer)
    #expect(second.cached == prompt.count + 3 && second.ran == 3)  // the last token of an answer was never run
    let anew = try self.bank(model)
    #expect(try await text(anew, "adapter", longer).tokens == second.tokens)
    let other = try await text(bank, nil, longer)
    #expect(other.cached == 0)  // another adapter's cache is of no use
  }

  @Test func samplingRepeatsWithItsSeed() async throws {
    let model = try GoldenModel()
    let bank = try bank(model)
    func draw(_ seed: UInt64) async throws -> [Int32] {
      let sampler = Sampler(temperature: 1.5, topK: 0, topP: 1)
      return try await text(bank, nil, model.golden.tokens, .init(maxNewTokens: 16, sampler: sampler, seed: seed))
        .tokens
    }
    let (one, again, two) = (try await draw(1), try await draw(1), try await draw(2))
    #expect(one == again && one != two)
  }

  @Test func aStopTokenAndTheLengthOfTheProgramEndTheText() async throws {
    let model = try GoldenModel()
    let bank = try bank(model)
    let whole = try await text(bank, nil, model.golden.tokens, .init(maxNewTokens: 1000)).tokens
    #expect(model.golden.tokens.count + whole.count <= 48 + 1 && whole.count > 3)
    let stopped = try await text(bank, nil, model.golden.tokens, .init(maxNewTokens: 1000, stopIDs: [whole[3]])).tokens
    #expect(stopped == Array(whole.prefix { $0 != whole[3] }))
    await #expect(throws: LordbaError.self) {
      _ = try await self.text(bank, nil, Array(repeating: 3, count: 49))
    }
    await #expect(throws: LordbaError.self) { _ = try await self.text(bank, "unknown", [3]) }
  }

  @Test func manyTasksShareTheBank() async throws {
    let model = try GoldenModel()
    let bank = try bank(model)
    var alone: [String: [Int32]] = [:]
    for name in ["adapter", "flipped"] { alone[name] = try await text(bank, name, model.golden.tokens).tokens }
    let expected = alone
    try await withThrowingTaskGroup(of: Bool.self) { group in
      for i in 0..<12 {
        let name = i % 2 == 0 ? "adapter" : "flipped"
        let prompt = model.golden.tokens
        group.addTask { try await self.text(bank, name, prompt).tokens == expected[name] }
      }
      for try await isSame in group { #expect(isSame) }
    }
  }

  @Test func theBudgetHoldsWhatWasUsedLast() async throws {
    let model = try GoldenModel()
    let bank = try bank(model, budget: try model.bundle.adapter("adapter").fileBytes + 10)
    for name in ["adapter", "flipped"] { _ = try await text(bank, name, [3]) }
    #expect(await bank.loaded == ["flipped"])
  }

  @Test func adaptersComeAndGoWhileOthersGenerate() async throws {
    let model = try GoldenModel()
    let bank = try bank(model)
    let prompt = model.golden.tokens
    let folder = Golden.demo.appendingPathComponent("model/adapter")
    let expected = try await text(bank, "adapter", prompt).tokens
    let running = Task { try await self.text(bank, "adapter", prompt, .init(maxNewTokens: 30)).tokens }
    try await bank.install("new", folder: folder)
    #expect(try await text(bank, "new", prompt).tokens == expected)
    try await bank.remove("new")
    #expect(await bank.names == ["adapter", "flipped"])
    await #expect(throws: LordbaError.self) { _ = try await self.text(bank, "new", prompt) }
    #expect(try await running.value.starts(with: expected))
    #expect(try ModelBundle(folder: model.bundle.folder).manifest.adapters.count == 2)
  }

  @Test func aRemovalWaitsForThoseWhoUseTheAdapter() async throws {
    let model = try GoldenModel()
    let runs = Counter()
    let bank = AdapterBank(bundle: model.bundle, runner: try SlowRunner(model.bundle, counting: runs))
    var removal: Task<(runs: Int, names: [String]), any Error>?
    let events = bank.generate("flipped", prompt: model.golden.tokens, options: .init(maxNewTokens: 20))
    for try await event in events {
      guard case .token = event, removal == nil else { continue }
      removal = Task {
        try await bank.remove("flipped")
        return (runs.value, await bank.names)
      }
    }
    let atRemoval = try #require(try await removal?.value)
    #expect(atRemoval.runs == 20 && runs.value == 20)  // the prompt, and all tokens but the last
    #expect(atRemoval.names == ["adapter"])
  }

  @Test func aCancelledGenerationEndsAndLeavesTheBankUsable() async throws {
    let model = try GoldenModel()
    let bank = try bank(model)
    let expected = try await text(bank, nil, model.golden.tokens).tokens
    let task = Task {
      for try await _ in bank.generate("adapter", prompt: model.golden.tokens, options: .init(maxNewTokens: 30)) {
        break
      }
    }
    _ = await task.result
    #expect(try await text(bank, nil, model.golden.tokens).tokens == expected)
  }
}

final class Counter: @unchecked Sendable {
  private let lock = NSLock()
  private var count = 0

  var value: Int { lock.withLock { count } }

  func add() { lock.withLock { count += 1 } }
}

/// The reference runner, so slow that others have time to come in between.
final class SlowRunner: Runner {
  static let target = ReferenceRunner.target
  private let inner: ReferenceRunner
  private let runs: Counter

  var longest: Int { inner.longest }

  convenience init(_ bundle: ModelBundle) throws { try self.init(bundle, counting: Counter()) }

  init(_ bundle: ModelBundle, counting runs: Counter) throws {
    inner = try ReferenceRunner(bundle)
    self.runs = runs
  }

  func load(_ adapter: BundleAdapter?, of bundle: ModelBundle) throws -> LoadedAdapter {
    try inner.load(adapter, of: bundle)
  }

  func use(_ adapter: LoadedAdapter) throws { try inner.use(adapter) }

  func run(_ tokens: [Int32], start: Int) throws -> [Float] {
    runs.add()
    Thread.sleep(forTimeInterval: 0.005)
    return try inner.run(tokens, start: start)
  }
}
