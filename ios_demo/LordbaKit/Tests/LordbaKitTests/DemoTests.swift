import Foundation
import LordbaDemo
import LordbaKit
import Testing

/// The models behind the app's screens, over the reference runtime.
@MainActor
struct DemoTests {
  @Test func theLibraryChecksWhatItOffers() async throws {
    let model = try GoldenModel()
    let library = BundleLibrary(folder: model.folder.url.appendingPathComponent("library"))
    await library.refresh()
    #expect(library.entries.isEmpty && library.problem == nil)
    await library.add(model.bundle.folder)
    #expect(library.entries.map(\.name) == ["bundle"])
    #expect(library.entries.first?.bundle?.manifest == model.bundle.manifest)
    await library.add(model.bundle.folder)
    #expect(library.problem?.contains("already here") == true)

    let damaged = model.folder.url.appendingPathComponent("damaged")
    try FileManager.default.copyItem(at: model.bundle.folder, to: damaged)
    try Data().write(to: damaged.appendingPathComponent("config.json"))
    await library.add(damaged)
    #expect(library.problem?.contains("config.json") == true && library.entries.count == 1)
    try FileManager.default.copyItem(at: damaged, to: library.folder.appendingPathComponent("damaged"))
    await library.refresh()
    #expect(library.entries.count == 2 && library.entries[1].bundle == nil)
    library.delete(library.entries[1])
    #expect(library.entries.count == 1)
  }

  @Test func aChatStreamsAnswersOfTheAdapterThatIsChosen() async throws {
    let model = try GoldenModel()
    let chat = try await ChatModel.open(model.bundle, in: Runtimes())
    #expect(chat.adapters == ["adapter", "flipped"])
    (chat.sampler, chat.maxNewTokens, chat.writesPlainText) = (.greedy, 6, true)
    var answers: [String] = []
    for adapter in [nil, "adapter", nil] {
      chat.reset()
      (chat.adapter, chat.draft) = (adapter, "Once")
      chat.send()
      #expect(chat.isAnswering && chat.draft.isEmpty)
      await chat.finish()
      #expect(!chat.isAnswering && chat.problem == nil && chat.messages.count == 2)
      #expect(chat.messages.last?.adapter == adapter)
      answers.append(chat.messages.last!.text)
      #expect(chat.speed?.tokens == 6 && chat.speed?.tokensPerSecond != nil)
    }
    #expect(answers[0] == answers[2] && answers[0] != answers[1] && !answers[0].isEmpty)
    chat.draft = String(repeating: "too long ", count: 100)
    chat.send()
    #expect(chat.problem?.contains("shorten it") == true && !chat.isAnswering && chat.draft.hasPrefix("too long"))
  }

  @Test func theLatencyScreenWritesAProfile() async throws {
    let model = try GoldenModel()
    let latency = LatencyModel(runtimes: Runtimes())
    latency.benchmark.loads = 1
    (latency.benchmark.swaps, latency.benchmark.prefills, latency.benchmark.decodes) = (2, 2, 4)
    (latency.benchmark.prefillTokens, latency.benchmark.warmUp) = (8, 1)
    await latency.run(model.bundle, adapters: ["adapter"])
    #expect(latency.problem == nil && latency.share == 1 && !latency.isRunning)
    #expect(latency.phases == ["load", "swap", "prefill", "decode"] && latency.bars.count == 7)
    struct File: Decodable {
      let format_version: Int
      let rows: [[String: JSONValue]]
    }
    let file = try JSONDecoder().decode(File.self, from: Data(contentsOf: try #require(latency.file)))
    #expect(file.format_version == 1 && file.rows.count == 7)
    #expect(file.rows.last?["adapter_name"] == .string("adapter"))
  }

  @Test func aBundleForAnotherRuntimeIsRefused() async throws {
    let bundle = try ModelBundle(folder: Golden.demo.appendingPathComponent("bundle"))
    #expect(message { _ = try Runtimes().open(bundle) }.contains("for executorch"))
  }
}
