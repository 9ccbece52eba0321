import Foundation

/// Byte-level BPE out of a tokenizer.json, the kind that Llama 3, SmolLM and Qwen have. What it does not know, it refuses.
public final class Tokenizer: Sendable {
  private let tokens: [[UInt8]?]
  private let idOfToken: [[UInt8]: Int32]
  private let idOfByte: [Int32]
  /// By the pair's ids: the merge's rank, the lowest first, and the id of what it makes.
  private let merges: [UInt64: (rank: Int, id: Int32)]
  private let ignoresMerges: Bool
  private let added: [AddedToken]
  private let special: Set<Int32>
  private let splitter: PreTokenizer
  private let normalizesToNFC: Bool
  private let before: [Int32]
  private let after: [Int32]

  struct AddedToken: Sendable {
    let id: Int32
    let bytes: [UInt8]
  }

  public var vocabularySize: Int { tokens.count }

  public init(file: URL) throws {
    func refuse(_ what: String) -> LordbaError { LordbaError("\(file.path): \(what)") }
    guard let data = try? Data(contentsOf: file) else { throw refuse("not found or not readable") }
    let record: TokenizerFile
    do {
      record = try JSONDecoder().decode(TokenizerFile.self, from: data)
    } catch {
      throw refuse("is not a tokenizer.json of the kind BPE (\(error))")
    }
    guard record.model.type == nil || record.model.type == "BPE" else {
      throw refuse("expected a model of type BPE, found \(record.model.type ?? "none")")
    }
    if record.model.byte_fallback == true { throw refuse("byte fallback is not known here, only byte-level BPE") }
    normalizesToNFC = record.normalizer?.type == "NFC"
    if let normalizer = record.normalizer, !normalizesToNFC {
      throw refuse("the normalizer \(normalizer.type) is not known here")
    }
    do {
      splitter = try PreTokenizer(record.pre_tokenizer)
    } catch let error as LordbaError {
      throw refuse(error.message)
    }

    var tokens = [[UInt8]?](repeating: nil, count: (record.model.vocab.values.max() ?? -1) + 1)
    var ids: [[UInt8]: Int32] = [:]
    for (text, id) in record.model.vocab {
      guard id >= 0, let bytes = ByteAlphabet.bytes(text) else { continue }  // a special token is no byte string
      tokens[id] = bytes
      ids[bytes] = Int32(id)
    }
    idOfByte = try (0...255).map { byte in
      guard let id = ids[[UInt8(byte)]] else { throw refuse("its vocabulary lacks byte \(byte)") }
      return id
    }
    var merges: [UInt64: (rank: Int, id: Int32)] = [:]
    for (rank, pair) in record.model.merges.enumerated() {
      guard let left = ByteAlphabet.bytes(pair.left), let right = ByteAlphabet.bytes(pair.right),
        let leftID = ids[left], let rightID = ids[right], let merged = ids[left + right]
      else { throw refuse("merge \(rank), \(pair.left) \(pair.right), names what the vocabulary lacks") }
      merges[Self.key(leftID, rightID)] = (rank, merged)
    }
    var special: Set<Int32> = []
    added = try (record.added_tokens ?? []).map { token in
      if token.single_word == true || token.lstrip == true || token.rstrip == true {
        throw refuse("the added token \(token.content) strips spaces or wants whole words, which is not known here")
      }
      if token.special { special.insert(Int32(token.id)) }
      while tokens.count <= token.id { tokens.append(nil) }
      tokens[token.id] = Array(token.content.utf8)
      return AddedToken(id: Int32(token.id), bytes: Array(token.content.utf8))
    }
    self.tokens = tokens
    idOfToken = ids
    self.merges = merges
    self.special = special
    ignoresMerges = record.model.ignore_merges ?? false
    (before, after) = try record.post_processor?.around() ?? ([], [])
  }

  /// The id of an added token, as `<|im_end|>`.
  public func id(ofAdded content: String) -> Int32? {
    added.first { $0.bytes == Array(content.utf8) }?.id
  }

  public func encode(_ text: String) -> [Int32] {
    before
      + parts(of: text).flatMap { part in
        switch part {
        case .added(let id): [id]
        case .text(let text):
          splitter.split(normalizesToNFC ? text.precomposedStringWithCanonicalMapping : text).flatMap(encodeWord)
        }
      } + after
  }

  /// The text of ids; bytes that are no UTF-8 become U+FFFD.
  public func decode(_ ids: some Sequence<Int32>, skippingSpecial: Bool = true) -> String {
    let bytes = ids.flatMap { id -> [UInt8] in
      guard tokens.indices.contains(Int(id)), !(skippingSpecial && special.contains(id)) else { return [] }
      return tokens[Int(id)] ?? []
    }
    return String(decoding: bytes, as: UTF8.self)
  }

  private enum Part {
    case text(String)
    case added(Int32)
  }

  /// Cuts the text at added tokens: the leftmost first, and of several there the longest.
  private func parts(of text: String) -> [Part] {
    let bytes = Array(text.utf8)
    var result: [Part] = []
    var start = 0
    var i = 0
    func endText(_ end: Int) {
      if start < end { result.append(.text(String(decoding: bytes[start..<end], as: UTF8.self))) }
    }
    while i < bytes.count {
      let here = added.filter { !$0.bytes.isEmpty && bytes[i...].starts(with: $0.bytes) }
      guard let longest = here.max(by: { $0.bytes.count < $1.bytes.count }) else {
        i += 1
        continue
      }
      endText(i)
      result.append(.added(longest.id))
      i += longest.bytes.count
      start = i
    }
    endText(bytes.count)
    return result
  }

  private func encodeWord(_ word: String) -> [Int32] {
    let bytes = Array(word.utf8)
    if ignoresMerges, let id = idOfToken[bytes] { return [id] }
    var ids = bytes.map { idOfByte[Int($0)] }
    while ids.count > 1 {
      var best: (rank: Int, id: Int32, at: Int)?
      for i in 0..<ids.count - 1 {
        if let merge = merges[Self.key(ids[i], ids[i + 1])], best.map({ merge.rank < $0.rank }) ?? true {
          best = (merge.rank, merge.id, i)
        }
      }
      guard let best else { break }
      ids.replaceSubrange(best.at...best.at + 1, with: CollectionOfOne(best.id))
    }
    return ids
  }

  private static func key(_ left: Int32, _ right: Int32) -> UInt64 {
    UInt64(UInt32(bitPattern: left)) << 32 | UInt64(UInt32(bitPattern: right))
  }
}

/// Text out of tokens as they come: what ends inside a character waits for the rest of it.
public struct TextStream: Sendable {
  private let tokenizer: Tokenizer
  private var ids: [Int32] = []
  private var shown = 0

  public init(_ tokenizer: Tokenizer) {
    self.tokenizer = tokenizer
  }

  /// What a further token adds to the text.
  public mutating func append(_ id: Int32) -> String {
    ids.append(id)
    return rest(tokenizer.decode(ids), holdsIncomplete: true)
  }

  /// What was held back, at the end.
  public mutating func finish() -> String { rest(tokenizer.decode(ids), holdsIncomplete: false) }

  private mutating func rest(_ text: String, holdsIncomplete: Bool) -> String {
    let scalars = text.unicodeScalars
    if holdsIncomplete, scalars.last == "\u{fffd}" { return "" }
    let new = scalars.dropFirst(shown)
    shown = scalars.count
    return String(String.UnicodeScalarView(new))
  }
}
