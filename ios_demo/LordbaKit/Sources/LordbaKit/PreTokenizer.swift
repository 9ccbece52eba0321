import Foundation

/// How a text is cut into words before merging: tokenizer.json's `pre_tokenizer`.
struct PreTokenizer: Sendable {
  indirect enum Step: Sendable {
    /// Every digit apart, or runs of digits apart.
    case digits(individual: Bool)
    /// Each match of a pattern is a word, and so is what lies between two.
    case pattern(NSRegularExpressionBox)
    case leadingSpace
  }

  struct Description: Decodable {
    struct Pattern: Decodable {
      let Regex: String?
      let String: String?
    }

    let type: String
    let individual_digits: Bool?
    let add_prefix_space: Bool?
    let use_regex: Bool?
    let pattern: Pattern?
    let behavior: String?
    let invert: Bool?
    let pretokenizers: [Description]?
  }

  /// NSRegularExpression is immutable and, as Foundation says, safe to use from several threads.
  struct NSRegularExpressionBox: @unchecked Sendable {
    let expression: NSRegularExpression
  }

  private static let gpt2 = #"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"#

  private var steps: [Step] = []

  init(_ description: Description?) throws {
    guard let description else { throw LordbaError("expected a byte-level pre_tokenizer, found none") }
    try add(description)
  }

  private mutating func add(_ description: Description) throws {
    switch description.type {
    case "Sequence": for part in description.pretokenizers ?? [] { try add(part) }
    case "Digits": steps.append(.digits(individual: description.individual_digits ?? false))
    case "ByteLevel":
      if description.add_prefix_space == true { steps.append(.leadingSpace) }
      if description.use_regex ?? true { steps.append(try Self.step(Self.gpt2)) }
    case "Split":
      guard let pattern = description.pattern?.Regex, description.behavior == "Isolated", description.invert != true
      else { throw LordbaError("a Split other than by an isolated Regex is not known here") }
      steps.append(try Self.step(pattern))
    default: throw LordbaError("the pre-tokenizer \(description.type) is not known here")
    }
  }

  private static func step(_ pattern: String) throws -> Step {
    // What the tokenizers library calls white space is Unicode's property; ICU's \s is a little less.
    let exact = pattern.replacingOccurrences(of: #"\s"#, with: #"\p{White_Space}"#)
      .replacingOccurrences(of: #"\S"#, with: #"\P{White_Space}"#)
    guard let expression = try? NSRegularExpression(pattern: exact) else {
      throw LordbaError("the pattern \(pattern) is not one that this system's regular expressions take")
    }
    return .pattern(NSRegularExpressionBox(expression: expression))
  }

  func split(_ text: String) -> [String] {
    steps.reduce(text.isEmpty ? [] : [text]) { words, step in words.flatMap { Self.apply(step, to: $0) } }
  }

  private static func apply(_ step: Step, to text: String) -> [String] {
    switch step {
    case .leadingSpace: return [text.hasPrefix(" ") ? text : " " + text]
    case .digits(let individual):
      var words: [(isDigit: Bool, scalars: String.UnicodeScalarView)] = []
      for scalar in text.unicodeScalars {
        let isDigit = [.decimalNumber, .letterNumber, .otherNumber].contains(scalar.properties.generalCategory)
        if let last = words.last, last.isDigit == isDigit, !(isDigit && individual) {
          words[words.count - 1].scalars.append(scalar)
        } else {
          words.append((isDigit, String.UnicodeScalarView([scalar])))
        }
      }
      return words.map { String($0.scalars) }
    case .pattern(let box):
      let whole = text as NSString
      var words: [String] = []
      var end = 0
      func addBetween(_ start: Int) {
        if end < start { words.append(whole.substring(with: NSRange(location: end, length: start - end))) }
      }
      for match in box.expression.matches(in: text, range: NSRange(location: 0, length: whole.length))
      where match.range.length > 0 {
        addBetween(match.range.location)
        words.append(whole.substring(with: match.range))
        end = match.range.location + match.range.length
      }
      addBetween(whole.length)
      return words
    }
  }
}
