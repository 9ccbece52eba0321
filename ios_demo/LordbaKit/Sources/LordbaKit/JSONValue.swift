import Foundation

/// Any JSON value; keeps what a program does not know when it changes the rest.
public enum JSONValue: Equatable, Sendable, Codable {
  case null
  case bool(Bool)
  case int(Int)
  case double(Double)
  case string(String)
  case array([JSONValue])
  case object([String: JSONValue])

  public init(from decoder: any Decoder) throws {
    let container = try decoder.singleValueContainer()
    if container.decodeNil() {
      self = .null
    } else if let value = try? container.decode(Bool.self) {
      self = .bool(value)
    } else if let value = try? container.decode(Int.self) {
      self = .int(value)
    } else if let value = try? container.decode(Double.self) {
      self = .double(value)
    } else if let value = try? container.decode(String.self) {
      self = .string(value)
    } else if let value = try? container.decode([JSONValue].self) {
      self = .array(value)
    } else {
      self = .object(try container.decode([String: JSONValue].self))
    }
  }

  public func encode(to encoder: any Encoder) throws {
    var container = encoder.singleValueContainer()
    switch self {
    case .null: try container.encodeNil()
    case .bool(let value): try container.encode(value)
    case .int(let value): try container.encode(value)
    case .double(let value): try container.encode(value)
    case .string(let value): try container.encode(value)
    case .array(let value): try container.encode(value)
    case .object(let value): try container.encode(value)
    }
  }

  /// The text of the profile file, which all languages write byte for byte alike: keys sorted by code point, one space
  /// per level, floats with at most three decimals, no escapes beyond those that JSON asks for.
  public var profileText: String {
    var text = ""
    write(to: &text, indent: 0)
    return text
  }

  private func write(to text: inout String, indent: Int) {
    switch self {
    case .null: text += "null"
    case .bool(let value): text += value ? "true" : "false"
    case .int(let value): text += String(value)
    case .double(let value): text += Self.threeDecimals(value)
    case .string(let value): Self.quote(value, to: &text)
    case .array(let items):
      Self.enclose("[", items, "]", &text, indent) { $0.write(to: &$1, indent: indent + 1) }
    case .object(let members):
      let sorted = members.sorted { $0.key.unicodeScalars.lexicographicallyPrecedes($1.key.unicodeScalars) }
      Self.enclose("{", sorted, "}", &text, indent) { member, text in
        Self.quote(member.key, to: &text)
        text += ": "
        member.value.write(to: &text, indent: indent + 1)
      }
    }
  }

  private static func enclose<Item>(
    _ open: String, _ items: [Item], _ close: String, _ text: inout String, _ indent: Int,
    _ write: (Item, inout String) -> Void
  ) {
    text += open
    for (i, item) in items.enumerated() {
      text += (i > 0 ? ",\n" : "\n") + String(repeating: " ", count: indent + 1)
      write(item, &text)
    }
    text += (items.isEmpty ? "" : "\n" + String(repeating: " ", count: indent)) + close
  }

  private static func threeDecimals(_ value: Double) -> String {
    (Double(String(format: "%.3f", value)) ?? value).description
  }

  private static func quote(_ value: String, to text: inout String) {
    text += "\""
    for scalar in value.unicodeScalars {
      switch scalar {
      case "\"": text += "\\\""
      case "\\": text += "\\\\"
      case "\n": text += "\\n"
      case "\r": text += "\\r"
      case "\t": text += "\\t"
      case "\u{8}": text += "\\b"
      case "\u{c}": text += "\\f"
      case _ where scalar.value < 0x20: text += String(format: "\\u%04x", scalar.value)
      default: text.unicodeScalars.append(scalar)
      }
    }
    text += "\""
  }
}
