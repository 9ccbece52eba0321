/// A conversation, and the prompt that it becomes.
public struct ChatSession: Sendable {
  public enum Role: String, Sendable {
    case system, user, assistant
  }

  public struct Turn: Equatable, Sendable {
    public let role: Role
    public var text: String

    public init(_ role: Role, _ text: String) {
      self.role = role
      self.text = text
    }
  }

  /// How turns become text.
  public enum Template: Equatable, Sendable {
    /// `<|im_start|>role`, the text, `<|im_end|>`: SmolLM's and Qwen's.
    case chatML
    /// The texts as they are, one after the other: the model goes on writing.
    case plain
  }

  public let template: Template
  public private(set) var turns: [Turn]
  private let tokenizer: Tokenizer
  private let maxTokens: Int

  /// `template` nil: chatML where the tokenizer knows its tokens, else plain. `maxTokens` is what the program takes.
  public init(tokenizer: Tokenizer, maxTokens: Int, template: Template? = nil, system: String? = nil) {
    self.tokenizer = tokenizer
    self.maxTokens = maxTokens
    let knowsChatML = tokenizer.id(ofAdded: "<|im_start|>") != nil && tokenizer.id(ofAdded: "<|im_end|>") != nil
    self.template = template ?? (knowsChatML ? .chatML : .plain)
    turns = system.map { [Turn(.system, $0)] } ?? []
  }

  /// Tokens that end an answer, besides those of the bundle.
  public var stopIDs: Set<Int32> {
    template == .chatML ? Set(tokenizer.id(ofAdded: "<|im_end|>").map { [$0] } ?? []) : []
  }

  public mutating func append(_ turn: Turn) { turns.append(turn) }

  public mutating func reset() { turns.removeAll { $0.role != .system } }

  /// The conversation as a prompt for the next answer, of at most `maxTokens - reserve` tokens: what is oldest is
  /// left out, but never the system's turn and the last one. Throws LordbaError where these alone are too long.
  public func prompt(reserving reserve: Int) throws -> [Int32] {
    let system = turns.prefix { $0.role == .system }
    var rest = turns.dropFirst(system.count)
    while true {
      let ids = tokenizer.encode(text(Array(system) + rest))
      if ids.count <= maxTokens - reserve { return ids }
      guard rest.count > 1 else {
        throw LordbaError(
          "the message takes \(ids.count) tokens, the program \(maxTokens) with \(reserve) for the answer; shorten it")
      }
      rest = rest.dropFirst()
      while rest.count > 1, rest.first?.role == .assistant { rest = rest.dropFirst() }  // nor its answer
    }
  }

  private func text(_ turns: [Turn]) -> String {
    switch template {
    case .plain: turns.map(\.text).joined()
    case .chatML:
      turns.map { "<|im_start|>\($0.role.rawValue)\n\($0.text)<|im_end|>\n" }.joined() + "<|im_start|>assistant\n"
    }
  }
}
