import CLordba
import Foundation

/// A Llama in fp32 with unmerged adapters: plain loops, and the C kernels for the adapters. It is a reference: the text
/// of the formulas, not a fast runtime.
final class LlamaModel {
  let config: LlamaConfig
  let contextLength: Int
  private let weights: [String: [Float]]
  private let kernel: SignAdapterKernel
  private var keys: [[Float]]  // per layer [position][kv head][head dim]
  private var values: [[Float]]

  /// The adapter's modules by their path; they must outlive their use.
  var adapter: [String: lordba_module] = [:]

  init(config: LlamaConfig, weights file: SafetensorsFile, contextLength: Int) throws {
    self.config = config
    self.contextLength = contextLength
    weights = try Dictionary(uniqueKeysWithValues: file.tensors.keys.map { ($0, try file.floats($0)) })
    kernel = try SignAdapterKernel()
    let row = config.kvHeads * config.headDim
    keys = Array(repeating: Array(repeating: 0, count: contextLength * row), count: config.num_hidden_layers)
    values = keys
    for (name, count) in expectedSizes where weights[name]?.count != count {
      throw LordbaError(
        "\(file.path.path): \(name): expected \(count) elements, found \(weights[name].map { String($0.count) } ?? "none")"
      )
    }
  }

  private var expectedSizes: [(String, Int)] {
    let (h, q, kv) = (config.hidden_size, config.num_attention_heads * config.headDim, config.kvHeads * config.headDim)
    var sizes = [("model.embed_tokens.weight", config.vocab_size * h), ("model.norm.weight", h)]
    if config.tie_word_embeddings != true { sizes.append(("lm_head.weight", config.vocab_size * h)) }
    for layer in 0..<config.num_hidden_layers {
      let own = [
        ("input_layernorm", h), ("post_attention_layernorm", h), ("self_attn.q_proj", q * h),
        ("self_attn.k_proj", kv * h),
        ("self_attn.v_proj", kv * h), ("self_attn.o_proj", h * q), ("mlp.gate_proj", config.intermediate_size * h),
        ("mlp.up_proj", config.intermediate_size * h), ("mlp.down_proj", h * config.intermediate_size),
      ]
      sizes += own.map { ("model.layers.\(layer).\($0).weight", $1) }
    }
    return sizes
  }

  /// Logits of the last of `tokens`, which follow the first `start` of the cache.
  func run(_ tokens: [Int32], start: Int) throws -> [Float] {
    let (h, count) = (config.hidden_size, tokens.count)
    guard start >= 0, start + count <= contextLength, tokens.allSatisfy({ (0..<config.vocab_size).contains(Int($0)) })
    else {
      throw LordbaError("\(count) tokens after \(start) do not fit \(contextLength), or are beyond the vocabulary")
    }
    let embedding = weights["model.embed_tokens.weight"]!
    var x = tokens.flatMap { embedding[Int($0) * h..<(Int($0) + 1) * h] }
    for layer in 0..<config.num_hidden_layers {
      let path = "model.layers.\(layer)"
      let mixed = try attend(normalized(x, "\(path).input_layernorm"), layer, path + ".self_attn", start, count)
      for i in x.indices { x[i] += mixed[i] }
      let inner = normalized(x, "\(path).post_attention_layernorm")
      let gate = try linear(inner, "\(path).mlp.gate_proj", count)
      var up = try linear(inner, "\(path).mlp.up_proj", count)
      for i in up.indices { up[i] *= gate[i] / (1 + exp(-gate[i])) }
      let down = try linear(up, "\(path).mlp.down_proj", count)
      for i in x.indices { x[i] += down[i] }
    }
    let last = normalized(Array(x.suffix(h)), "model.norm")
    let head = config.tie_word_embeddings == true ? "model.embed_tokens" : "lm_head"
    return try linear(last, head, 1)
  }

  private func normalized(_ x: [Float], _ path: String) -> [Float] {
    let (h, scale) = (config.hidden_size, weights["\(path).weight"]!)
    var result = x
    for row in stride(from: 0, to: x.count, by: h) {
      let squares = x[row..<row + h].reduce(Float(0)) { $0 + $1 * $1 }
      let factor = 1 / (squares / Float(h) + config.rms_norm_eps).squareRoot()
      for i in 0..<h { result[row + i] = x[row + i] * factor * scale[i] }
    }
    return result
  }

  /// x [count][d_in] by the layer's weight [d_out][d_in], plus its adapter.
  private func linear(_ x: [Float], _ path: String, _ count: Int) throws -> [Float] {
    let weight = weights["\(path).weight"]!
    let dIn = x.count / count
    let dOut = weight.count / dIn
    var y = [Float](repeating: 0, count: count * dOut)
    weight.withUnsafeBufferPointer { weight in
      x.withUnsafeBufferPointer { x in
        for t in 0..<count {
          for o in 0..<dOut {
            var sum: Float = 0
            for i in 0..<dIn { sum += weight[o * dIn + i] * x[t * dIn + i] }
            y[t * dOut + o] = sum
          }
        }
      }
    }
    if let module = adapter[path] { try kernel.add(module, x, tokens: count, to: &y) }
    return y
  }

  private func attend(_ x: [Float], _ layer: Int, _ path: String, _ start: Int, _ count: Int) throws -> [Float] {
    let (heads, kvHeads, dim) = (config.num_attention_heads, config.kvHeads, config.headDim)
    var q = try linear(x, "\(path).q_proj", count)
    var k = try linear(x, "\(path).k_proj", count)
    let v = try linear(x, "\(path).v_proj", count)
    for t in 0..<count {
      rotate(&q, t * heads * dim, heads, at: start + t)
      rotate(&k, t * kvHeads * dim, kvHeads, at: start + t)
    }
    let row = kvHeads * dim
    keys[layer].replaceSubrange(start * row..<(start + count) * row, with: k)
    values[layer].replaceSubrange(start * row..<(start + count) * row, with: v)
    let (allKeys, allValues) = (keys[layer], values[layer])
    var mixed = [Float](repeating: 0, count: count * heads * dim)
    for t in 0..<count {
      for head in 0..<heads {
        let own = (t * heads + head) * dim
        let shared = head / (heads / kvHeads) * dim
        var scores = [Float](repeating: 0, count: start + t + 1)
        for past in scores.indices {
          var sum: Float = 0
          for i in 0..<dim { sum += q[own + i] * allKeys[past * row + shared + i] }
          scores[past] = sum / Float(dim).squareRoot()
        }
        let highest = scores.max()!
        for i in scores.indices { scores[i] = exp(scores[i] - highest) }
        let total = scores.reduce(0, +)
        for (past, score) in scores.enumerated() {
          for i in 0..<dim { mixed[own + i] += score / total * allValues[past * row + shared + i] }
        }
      }
    }
    return try linear(mixed, "\(path).o_proj", count)
  }

  /// Rotary embeddings, in halves as Llama has them.
  private func rotate(_ x: inout [Float], _ offset: Int, _ heads: Int, at position: Int) {
    let half = config.headDim / 2
    for i in 0..<half {
      let angle = Float(Double(position) / pow(config.ropeTheta, Double(2 * i) / Double(config.headDim)))
      let (c, s) = (cos(angle), sin(angle))
      for head in 0..<heads {
        let at = offset + head * config.headDim + i
        let (a, b) = (x[at], x[at + half])
        x[at] = a * c - b * s
        x[at + half] = b * c + a * s
      }
    }
  }
}
