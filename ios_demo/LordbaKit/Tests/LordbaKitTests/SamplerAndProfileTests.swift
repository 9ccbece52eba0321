import Foundation
import Testing

@testable import LordbaKit

struct SamplerTests {
  struct Case: Decodable, Sendable {
    let logits: [Float]
    let temperature: Double
    let top_k: Int
    let top_p: Double
    let uniform: Double
    let token: Int
  }

  @Test func tokensAreTheGoldenOnes() throws {
    let cases = try Golden.json([Case].self, "demo/sampling.json")
    #expect(cases.count >= 40)
    for one in cases {
      let sampler = Sampler(temperature: one.temperature, topK: one.top_k, topP: one.top_p)
      #expect(sampler.sample(one.logits, uniform: one.uniform) == one.token)
    }
  }

  @Test func drawsAreInProportion() {
    let (sampler, draws) = (Sampler(temperature: 0.5, topK: 2, topP: 1), 4000)
    var counts = [0, 0, 0]
    for i in 0..<draws {
      counts[sampler.sample([1, 0.5, 0.2], uniform: (Double(i) + 0.5) / Double(draws))] += 1
    }
    #expect(counts[2] == 0)
    #expect(abs(Double(counts[0]) / Double(draws) - 1 / (1 + exp(-1))) < 1e-3)
  }
}

struct ProfileTests {
  struct Given: Decodable {
    let device: Device
    let machine: [String: JSONValue]
    let conditions: [String: JSONValue]
    let series: [Series]
  }

  @Test func theFileIsTheGoldenOneByteForByte() throws {
    let given = try Golden.json(Given.self, "demo/profile/samples.json")
    let text = Profile.json(given.series, device: given.device, machine: given.machine, conditions: given.conditions)
    let golden = try String(contentsOf: Golden.demo.appendingPathComponent("profile/profile.json"), encoding: .utf8)
    #expect(Data(text.utf8) == Data(golden.utf8))
  }

  @Test func aDifferenceBelowTheNoiseIsNotQuoted() {
    func series(_ adapter: String, _ samples: [Double]) -> Series {
      Series(
        target: "coreml", model: "m", baseQuant: "int4", adapter: adapter, phase: "decode", tokens: 1, threads: 1,
        samples: samples)
    }
    let base = series("none", [10.0, 10.1, 9.9, 10.2, 9.8])
    #expect(Profile.overhead(series("lordba", [10.05, 10.15, 9.95, 10.25, 9.85]), over: base).percent == nil)
    let (quoted, noise) = Profile.overhead(series("lordba", [11.0, 11.1, 10.9, 11.2, 10.8]), over: base)
    #expect(abs((quoted ?? 0) - 10) < 1e-9)
    #expect(abs(noise - 100 * 2 * 2 * 1.4826 * 0.1 / 5.0.squareRoot() / 10) < 1e-9)
  }

  @Test func textIsWrittenAsPythonWritesIt() {
    let value = JSONValue.object([
      "b": .array([]), "a": .object([:]), "é": .string("\u{1}\n\"\\/\u{7f}"), "Z": .double(-0.0004),
      "z": .array([.double(1e16), .double(0.0625), .double(2.5), .bool(true), .null]),
    ])
    let expected = """
      {
       "Z": -0.0,
       "a": {},
       "b": [],
       "z": [
        1e+16,
        0.062,
        2.5,
        true,
        null
       ],
       "é": "\\u0001\\n\\"\\\\/\u{7f}"
      }
      """
    #expect(value.profileText == expected)
  }
}
