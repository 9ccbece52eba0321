import Foundation
import LordbaKit
import Observation

/// One conversation with a bundle, in which each answer may come from another adapter.
@MainActor @Observable
public final class ChatModel {
  public struct Message: Identifiable, Equatable, Sendable {
    public let id = UUID()
    public let role: ChatSession.Role
    /// The adapter that answered; nil is the base alone.
    public let adapter: String?
    public internal(set) var text: String
  }

  public struct Speed: Equatable, Sendable {
    public var promptTokens = 0
    public var cachedTokens = 0
    public var promptMilliseconds = 0.0
    public var tokens = 0
    public var milliseconds = 0.0

    /// The first token belongs to the prompt.
    public var tokensPerSecond: Double? {
      tokens > 1 && milliseconds > 0 ? 1e3 * Double(tokens - 1) / milliseconds : nil
    }
  }

  public let bundle: ModelBundle
  public private(set) var messages: [Message] = []
  public private(set) var adapters: [String] = []
  public private(set) var isAnswering = false
  public private(set) var speed: Speed?
  public var problem: String?
  public var draft = ""
  /// Who answers next; nil is the base alone.
  public var adapter: String?
  public var sampler = Sampler(temperature: 0.7, topK: 40, topP: 0.95)
  public var maxNewTokens = 256
  /// Texts as they are, for adapters that continue a text; the conversation starts anew.
  public var writesPlainText = false {
    didSet { if writesPlainText != oldValue { reset() } }
  }

  private let bank: AdapterBank
  private let tokenizer: Tokenizer
  private var session: ChatSession
  private var answer: Task<Void, Never>?
  private var seed = UInt64.random(in: .min ... .max)

  /// Loads tokenizer and program, off the main thread.
  public static func open(_ bundle: ModelBundle, in runtimes: Runtimes) async throws -> ChatModel {
    let (bank, tokenizer) = try await Task.detached {
      guard let file = bundle.tokenizer else {
        throw LordbaError("\(bundle.folder.lastPathComponent): holds no tokenizer; export it again")
      }
      return (AdapterBank(bundle: bundle, runner: try runtimes.open(bundle)), try Tokenizer(file: file))
    }.value
    return ChatModel(bundle, bank, tokenizer)
  }

  init(_ bundle: ModelBundle, _ bank: AdapterBank, _ tokenizer: Tokenizer) {
    self.bundle = bundle
    self.bank = bank
    self.tokenizer = tokenizer
    session = ChatSession(tokenizer: tokenizer, maxTokens: bundle.manifest.maxSeqLen)
    adapters = bundle.manifest.adapters.map(\.name)
  }

  public func reset() {
    stop()
    messages = []
    speed = nil
    session = ChatSession(
      tokenizer: tokenizer, maxTokens: bundle.manifest.maxSeqLen, template: writesPlainText ? .plain : nil)
  }

  public func stop() { answer?.cancel() }

  /// Sends the draft, and streams the answer into the last message.
  public func send() {
    guard !isAnswering, !draft.isEmpty else { return }
    let text = draft
    draft = ""
    let before = session
    session.append(.init(.user, text))
    messages.append(Message(role: .user, adapter: nil, text: text))
    let prompt: [Int32]
    do {
      prompt = try session.prompt(reserving: min(32, bundle.manifest.maxSeqLen / 4))
    } catch {
      problem = error.localizedDescription
      session = before
      messages.removeLast()
      draft = text
      return
    }
    isAnswering = true
    speed = nil
    messages.append(Message(role: .assistant, adapter: adapter, text: ""))
    seed &+= 1
    let options = GenerationOptions(
      maxNewTokens: maxNewTokens, sampler: sampler, stopIDs: session.stopIDs, seed: seed)
    let events = bank.generate(adapter, prompt: prompt, options: options)
    answer = Task { await receive(events, into: messages.last!.id) }
  }

  /// Waits for the answer that is being written.
  public func finish() async { await answer?.value }

  /// Adds an adapter folder to the bundle.
  public func install(_ folder: URL) async {
    do {
      try await bank.install(folder.lastPathComponent, folder: folder)
      adapters = await bank.names
    } catch {
      problem = error.localizedDescription
    }
  }

  private func receive(_ events: AsyncThrowingStream<GenerationEvent, any Error>, into id: UUID) async {
    var stream = TextStream(tokenizer)
    var speed = Speed()
    do {
      for try await event in events {
        switch event {
        case .prompt(let ran, let cached, let milliseconds):
          (speed.promptTokens, speed.cachedTokens, speed.promptMilliseconds) = (ran, cached, milliseconds)
        case .token(let token, let milliseconds):
          if speed.tokens > 0 { speed.milliseconds += milliseconds }
          speed.tokens += 1
          append(stream.append(token), to: id)
        }
        self.speed = speed
      }
    } catch is CancellationError {
    } catch {
      problem = error.localizedDescription
    }
    append(stream.finish(), to: id)
    if let message = messages.first(where: { $0.id == id }) { session.append(.init(.assistant, message.text)) }
    isAnswering = false
  }

  private func append(_ text: String, to id: UUID) {
    if let i = messages.lastIndex(where: { $0.id == id }) { messages[i].text += text }
  }
}
