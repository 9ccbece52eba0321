import Foundation

/// Where it was measured; memory in bytes.
public struct Device: Codable, Equatable, Sendable {
  public let device: String
  public let arch: String
  public let os: String
  public let totalMem: Int
  public let availMem: Int

  public init(device: String, arch: String, os: String, totalMem: Int, availMem: Int) {
    self.device = device
    self.arch = arch
    self.os = os
    self.totalMem = totalMem
    self.availMem = availMem
  }
}

/// The samples of one thing that was measured, in milliseconds, warm-up left out.
///
/// `adapter` is "none", "dense_lora" or "lordba"; `tokens` those of one run; `bits` those of one adapter weight.
public struct Series: Codable, Equatable, Sendable {
  public var target: String
  public var model: String
  public var baseQuant: String
  public var adapter: String
  public var phase: String
  public var tokens: Int
  public var threads: Int
  public var samples: [Double]
  public var adapterName: String?
  public var rank: Int?
  public var bits: Double?
  public var scaleCode: String?

  private enum CodingKeys: String, CodingKey {
    case target, model, adapter, phase, threads, samples, rank, bits
    case baseQuant = "base_quant"
    case tokens = "T"
    case adapterName = "adapter_name"
    case scaleCode = "scale_code"
  }

  public init(
    target: String, model: String, baseQuant: String, adapter: String, phase: String, tokens: Int, threads: Int,
    samples: [Double], adapterName: String? = nil, rank: Int? = nil, bits: Double? = nil, scaleCode: String? = nil
  ) {
    self.target = target
    self.model = model
    self.baseQuant = baseQuant
    self.adapter = adapter
    self.phase = phase
    self.tokens = tokens
    self.threads = threads
    self.samples = samples
    self.adapterName = adapterName
    self.rank = rank
    self.bits = bits
    self.scaleCode = scaleCode
  }

  /// Whether another series was measured under the same conditions, so that the two may be compared.
  func isComparable(to other: Series) -> Bool {
    (target, model, baseQuant) == (other.target, other.model, other.baseQuant)
      && (phase, tokens, threads) == (other.phase, other.tokens, other.threads)
  }
}

/// The profile file, byte for byte as lordba/profiling/record.py writes it.
public enum Profile {
  public static let formatVersion = 1

  /// One row per series, in their order; overheads are over the series of the same conditions without an adapter.
  public static func rows(_ all: [Series], device: Device) -> [JSONValue] {
    all.indices.map { i in
      let base = all.lastIndex { $0.adapter == "none" && $0.isComparable(to: all[i]) }
      return row(all[i], base: base == i ? nil : base.map { all[$0] }, device)
    }
  }

  public static func json(
    _ all: [Series], device: Device, machine: [String: JSONValue], conditions: [String: JSONValue]
  ) -> String {
    JSONValue.object([
      "format_version": .int(formatVersion),
      "machine": .object(machine),
      "conditions": .object(conditions),
      "rows": .array(rows(all, device: device)),
    ]).profileText + "\n"
  }

  /// How much longer than the base alone, and the noise of that difference, both in % of the base's median.
  ///
  /// The noise is twice the standard error of the medians' difference, from the median absolute deviations; a
  /// difference below it is not quoted (nil).
  public static func overhead(_ series: Series, over base: Series) -> (percent: Double?, noise: Double) {
    let median = Statistics.median(base.samples)
    let noise =
      100 * 2 * (Statistics.standardError(series.samples) + Statistics.standardError(base.samples)) / median
    let difference = 100 * (Statistics.median(series.samples) / median - 1)
    return (abs(difference) >= noise ? difference : nil, noise)
  }

  private static func row(_ series: Series, base: Series?, _ device: Device) -> JSONValue {
    func number(_ value: Double?) -> JSONValue { value.map { .double($0) } ?? .null }
    func text(_ value: String?) -> JSONValue { value.map { .string($0) } ?? .null }
    let over = base.map { overhead(series, over: $0) }
    let p50 = Statistics.percentile(series.samples, 50)
    return .object([
      "benchmarkModel": .object([
        "name": .string(series.model),
        "backend": .string(series.target),
        "quantization": .string(series.baseQuant),
      ]),
      "deviceInfo": .object([
        "device": .string(device.device),
        "arch": .string(device.arch),
        "os": .string(device.os),
        "totalMem": .int(device.totalMem),
        "availMem": .int(device.availMem),
      ]),
      "metric": .string("\(series.phase)_ms"),
      "actualValue": .double(p50),
      "targetValue": .double(0),
      "target": .string(series.target),
      "model": .string(series.model),
      "adapter": .string(series.adapter),
      "adapter_name": text(series.adapterName),
      "phase": .string(series.phase),
      "T": .int(series.tokens),
      "threads": .int(series.threads),
      "samples": .int(series.samples.count),
      "ms_p50": .double(p50),
      "ms_p90": .double(Statistics.percentile(series.samples, 90)),
      "ms_p99": .double(Statistics.percentile(series.samples, 99)),
      "overhead_pct": number(over?.percent),
      "noise_pct": number(over?.noise),
      "rank": series.rank.map { .int($0) } ?? .null,
      "bits": number(series.bits),
      "scale_code": text(series.scaleCode),
    ])
  }
}

/// As NumPy computes them, to the last bit.
public enum Statistics {
  /// A normal distribution's standard deviation over its median absolute deviation.
  static let normalMAD = 1.4826

  public static func median(_ values: [Double]) -> Double {
    let sorted = values.sorted()
    let middle = sorted.count / 2
    return sorted.count % 2 == 1 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2
  }

  /// Between two samples, linearly.
  public static func percentile(_ values: [Double], _ percent: Double) -> Double {
    let sorted = values.sorted()
    let place = percent / 100 * Double(sorted.count - 1)
    let below = Int(place)
    let (a, b) = (sorted[below], sorted[min(below + 1, sorted.count - 1)])
    let part = place - Double(below)
    return part < 0.5 ? a + (b - a) * part : b - (b - a) * (1 - part)
  }

  /// Of the median, from the median absolute deviation.
  static func standardError(_ values: [Double]) -> Double {
    let middle = median(values)
    return normalMAD * median(values.map { abs($0 - middle) }) / Double(values.count).squareRoot()
  }
}
