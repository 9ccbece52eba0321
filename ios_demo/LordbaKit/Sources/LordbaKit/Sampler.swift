import Foundation

/// How the next token is drawn from logits; temperature 0 takes the largest.
public struct Sampler: Equatable, Sendable {
  public var temperature: Double
  /// The most likely tokens that may be drawn; 0: all.
  public var topK: Int
  /// The share of probability that may be drawn, the most likely tokens first.
  public var topP: Double

  public static let greedy = Sampler(temperature: 0, topK: 0, topP: 1)

  public init(temperature: Double, topK: Int, topP: Double) {
    self.temperature = temperature
    self.topK = topK
    self.topP = topP
  }

  /// `uniform` is a random number in [0, 1). Equal logits keep their order.
  public func sample(_ logits: [Float], uniform: Double) -> Int {
    precondition(!logits.isEmpty)
    if temperature == 0 {
      return logits.indices.dropFirst().reduce(0) { logits[$1] > logits[$0] ? $1 : $0 }
    }
    let scaled = logits.map { Double($0) / temperature }
    let highest = scaled.max()!
    let weights = scaled.map { exp($0 - highest) }
    // By the index where weights are equal, for `sorted` promises no order of its own.
    var order = weights.indices.sorted { (weights[$1], $0) < (weights[$0], $1) }
    if topK > 0 { order = Array(order.prefix(topK)) }
    var chances = Self.normalized(order.map { weights[$0] })
    let kept = Self.cumulative(chances).firstIndex { $0 >= topP } ?? chances.count - 1
    chances = Self.normalized(Array(chances[...kept]))
    let drawn = Self.cumulative(chances).firstIndex { $0 > uniform } ?? chances.count - 1
    return order[drawn]
  }

  private static func normalized(_ values: [Double]) -> [Double] {
    let total = values.reduce(0, +)
    return values.map { $0 / total }
  }

  private static func cumulative(_ values: [Double]) -> [Double] {
    var total = 0.0
    return values.map { value in
      total += value
      return total
    }
  }
}
