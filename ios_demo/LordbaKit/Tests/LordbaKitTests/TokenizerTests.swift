import Foundation
import Testing

@testable import LordbaKit

struct TokenizerTests {
  struct Case: Decodable, Sendable, CustomTestStringConvertible {
    let text: String
    let ids: [Int32]
    let decoded: String

    var testDescription: String { text.debugDescription }
  }

  struct Named: Sendable, CustomTestStringConvertible {
    let folder: String
    let `case`: Case

    var testDescription: String { "\(folder) \(`case`.testDescription)" }

    static let all = ["tokenizer", "tokenizer-plain"].flatMap { folder in
      ((try? Golden.json([Case].self, "demo/\(folder)/cases.json")) ?? []).map { Named(folder: folder, case: $0) }
    }
  }

  static func tokenizer(_ folder: String = "tokenizer") throws -> Tokenizer {
    try Tokenizer(file: Golden.demo.appendingPathComponent("\(folder)/tokenizer.json"))
  }

  @Test(arguments: Named.all)
  func idsAndTextAreThoseOfTheTokenizersLibrary(_ named: Named) throws {
    let tokenizer = try Self.tokenizer(named.folder)
    #expect(tokenizer.encode(named.case.text) == named.case.ids)
    #expect(Array(tokenizer.decode(named.case.ids).unicodeScalars) == Array(named.case.decoded.unicodeScalars))
  }

  @Test func allCasesAreThere() { #expect(Named.all.count >= 16) }

  @Test func aStreamEndsAsTheWholeText() throws {
    let tokenizer = try Self.tokenizer()
    let text = "naïve 東京 👩‍👩‍👧!"
    var stream = TextStream(tokenizer)
    var pieces = tokenizer.encode(text).map { stream.append($0) }
    pieces.append(stream.finish())
    #expect(pieces.joined() == text)
    #expect(!pieces.contains { $0.unicodeScalars.contains("\u{fffd}") })
    var cut = TextStream(tokenizer)
    _ = cut.append(tokenizer.encode("東")[0])
    #expect(cut.finish() == "\u{fffd}")
  }

  @Test(arguments: [
    ("normalizer", "NFKC"), ("pre_tokenizer", "Metaspace"), ("model", "Unigram"),
  ])
  func aKindThatIsNotKnownIsRefused(key: String, type: String) throws {
    let temporary = try TemporaryFolder()
    let path = try temporary.copy("demo/tokenizer").appendingPathComponent("tokenizer.json")
    var record = try JSONDecoder().decode([String: JSONValue].self, from: Data(contentsOf: path))
    var members: [String: JSONValue] = [:]
    if case .object(let old) = record[key] { members = old }
    members["type"] = .string(type)
    record[key] = .object(members)
    try JSONEncoder().encode(record).write(to: path)
    #expect(message { _ = try Tokenizer(file: path) }.contains(type))
  }

  @Test func aConversationBecomesAPrompt() throws {
    let tokenizer = try Self.tokenizer()
    var chat = ChatSession(tokenizer: tokenizer, maxTokens: 60, system: "Be brief.")
    #expect(chat.template == .chatML && chat.stopIDs == [2])
    chat.append(.init(.user, "Hi!"))
    let expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi!<|im_end|>\n<|im_start|>assistant\n"
    #expect(tokenizer.decode(try chat.prompt(reserving: 4), skippingSpecial: false) == expected)
    chat.append(.init(.assistant, "Hello."))
    chat.append(.init(.user, "And who are you, please?"))
    let shortened = tokenizer.decode(try chat.prompt(reserving: 4), skippingSpecial: false)
    #expect(!shortened.contains("Hi!") && shortened.contains("Be brief.") && shortened.contains("please?"))
    #expect(message { _ = try chat.prompt(reserving: 50) }.contains("shorten it"))
    var plain = ChatSession(tokenizer: tokenizer, maxTokens: 60, template: .plain)
    plain.append(.init(.user, "Once upon"))
    #expect(tokenizer.decode(try plain.prompt(reserving: 0)) == "Once upon" && plain.stopIDs.isEmpty)
  }
}
