/// How a text is continued.
public struct GenerationOptions: Equatable, Sendable {
  public var maxNewTokens: Int
  public var sampler: Sampler
  /// Tokens that end the text, besides those of the bundle.
  public var stopIDs: Set<Int32>
  /// Makes the random numbers repeatable.
  public var seed: UInt64

  public init(maxNewTokens: Int = 256, sampler: Sampler = .greedy, stopIDs: Set<Int32> = [], seed: UInt64 = 0) {
    self.maxNewTokens = maxNewTokens
    self.sampler = sampler
    self.stopIDs = stopIDs
    self.seed = seed
  }
}

/// What a generation says as it goes on.
public enum GenerationEvent: Equatable, Sendable {
  /// The prompt was read: how many tokens of it had to run, and for how many the cache already stood.
  case prompt(ran: Int, cached: Int, milliseconds: Double)
  case token(Int32, milliseconds: Double)
}

/// SplitMix64: small, and the same everywhere.
struct SeededGenerator: RandomNumberGenerator {
  private var state: UInt64

  init(seed: UInt64) { state = seed }

  mutating func next() -> UInt64 {
    state &+= 0x9e37_79b9_7f4a_7c15
    var z = state
    z = (z ^ z >> 30) &* 0xbf58_476d_1ce4_e5b9
    z = (z ^ z >> 27) &* 0x94d0_49bb_1331_11eb
    return z ^ z >> 31
  }

  /// In [0, 1).
  mutating func uniform() -> Double { Double(next() >> 11) * 0x1p-53 }
}
