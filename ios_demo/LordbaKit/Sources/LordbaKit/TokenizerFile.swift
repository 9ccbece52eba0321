/// What tokenizer.json says, as far as it matters here.
struct TokenizerFile: Decodable {
  struct Model: Decodable {
    let type: String?
    let vocab: [String: Int]
    let merges: [Merge]
    let ignore_merges: Bool?
    let byte_fallback: Bool?
  }

  /// ["a", "b"], or "a b" in older files.
  struct Merge: Decodable {
    let left: String
    let right: String

    init(from decoder: any Decoder) throws {
      let container = try decoder.singleValueContainer()
      let pair =
        try (try? container.decode([String].self))
        ?? container.decode(String.self).split(separator: " ").map(String.init)
      guard pair.count == 2 else {
        throw DecodingError.dataCorruptedError(in: container, debugDescription: "a merge of \(pair.count) tokens")
      }
      (left, right) = (pair[0], pair[1])
    }
  }

  struct Added: Decodable {
    let id: Int
    let content: String
    let special: Bool
    let single_word: Bool?
    let lstrip: Bool?
    let rstrip: Bool?
  }

  struct Normalizer: Decodable {
    let type: String
  }

  let model: Model
  let added_tokens: [Added]?
  let normalizer: Normalizer?
  let pre_tokenizer: PreTokenizer.Description?
  let post_processor: PostProcessor?
}

/// What stands around an encoded text: the tokens of a TemplateProcessing; ByteLevel moves offsets alone.
struct PostProcessor: Decodable {
  private struct Piece: Decodable {
    struct Named: Decodable {
      let id: String
    }
    let SpecialToken: Named?
    let Sequence: Named?
  }

  private struct Special: Decodable {
    let ids: [Int32]
  }

  private let type: String
  private let single: [Piece]?
  private let special_tokens: [String: Special]?
  private let processors: [PostProcessor]?

  func around() throws -> ([Int32], [Int32]) {
    switch type {
    case "ByteLevel": return ([], [])
    case "Sequence":
      return try (processors ?? []).reduce(([], [])) { all, next in
        let (before, after) = try next.around()
        return (before + all.0, all.1 + after)
      }
    case "TemplateProcessing":
      let pieces = single ?? []
      let at = pieces.firstIndex { $0.Sequence != nil } ?? pieces.count
      func ids(_ pieces: some Swift.Sequence<Piece>) -> [Int32] {
        pieces.flatMap { $0.SpecialToken.flatMap { special_tokens?[$0.id]?.ids } ?? [] }
      }
      return (ids(pieces[..<at]), ids(pieces[at...]))
    default: throw LordbaError("tokenizer.json: the post-processor \(type) is not known here")
    }
  }
}

/// GPT-2's alphabet: a printable character for every byte.
enum ByteAlphabet {
  static let characters: [Unicode.Scalar] = {
    let printable = Array(0x21...0x7e) + Array(0xa1...0xac) + Array(0xae...0xff)
    var next = 256
    return (0...255).map { byte in
      if printable.contains(byte) { return Unicode.Scalar(UInt8(byte)) }
      defer { next += 1 }
      return Unicode.Scalar(UInt16(next))!
    }
  }()

  private static let byteOf: [Unicode.Scalar: UInt8] =
    Dictionary(uniqueKeysWithValues: characters.enumerated().map { ($1, UInt8($0)) })

  /// The bytes that a token of the vocabulary stands for; nil if it holds other characters.
  static func bytes(_ token: String) -> [UInt8]? {
    var result: [UInt8] = []
    for scalar in token.unicodeScalars {
      guard let byte = byteOf[scalar] else { return nil }
      result.append(byte)
    }
    return result
  }
}
