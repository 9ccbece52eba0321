import Foundation

/// What config.json says of a Llama; what the reference runtime does not compute is refused.
struct LlamaConfig: Decodable {
  struct Rope: Decodable {
    let rope_theta: Double?
    let rope_type: String?
  }

  let model_type: String
  let hidden_size: Int
  let intermediate_size: Int
  let num_hidden_layers: Int
  let num_attention_heads: Int
  let num_key_value_heads: Int?
  let vocab_size: Int
  let rms_norm_eps: Float
  let tie_word_embeddings: Bool?
  let hidden_act: String
  let attention_bias: Bool?
  let mlp_bias: Bool?
  private let head_dim: Int?
  private let rope_theta: Double?
  private let rope_parameters: Rope?
  private let rope_scaling: Rope?

  var kvHeads: Int { num_key_value_heads ?? num_attention_heads }
  var headDim: Int { head_dim ?? hidden_size / num_attention_heads }
  var ropeTheta: Double { rope_parameters?.rope_theta ?? rope_theta ?? 10_000 }

  static func read(_ path: URL) throws -> LlamaConfig {
    guard let data = try? Data(contentsOf: path), let config = try? JSONDecoder().decode(LlamaConfig.self, from: data)
    else { throw LordbaError("\(path.path): not found, or not the configuration of a Llama") }
    let ropes = [config.rope_parameters?.rope_type, config.rope_scaling?.rope_type]
    guard config.model_type == "llama", config.hidden_act == "silu", config.attention_bias != true,
      config.mlp_bias != true, ropes.allSatisfy({ $0 == nil || $0 == "default" })
    else {
      throw LordbaError(
        "\(path.path): the reference runtime computes Llamas with silu, without biases and with plain rotary embeddings; "
          + "this is a \(config.model_type)")
    }
    return config
  }
}
