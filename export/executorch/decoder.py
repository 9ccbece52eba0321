"""The fast path: one small decoder for Llama-like models, shaped so that it lowers into few delegate partitions.

Computes what transformers' Llama, Mistral, Qwen2 and Qwen3 compute, with their weights. What differs is form: q/k/v
and gate/up are one linear each, their adapters one op; rotation, KV cache and attention are ops that read packed rows,
because slicing and splitting with a symbolic length would cut the delegate (docs/executorch.md).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lordba.backends.executorch import ops  # noqa: F401 (registers lordba::rope_heads, swiglu)

from ..model import STATIC_ROPES, side_by_side
from .adapted import AdaptedLinear, AdapterSlot
from .attention import attend

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def why_not_fast(model: Any) -> str | None:
    """The reason why this decoder does not compute what the model does, or None if it does."""
    config = model.config
    if config.model_type not in FAMILIES:
        return f"its family {config.model_type} is none of {', '.join(FAMILIES)}"
    if config.hidden_act != "silu":
        return f"its activation is {config.hidden_act}, not silu"
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None) if config.model_type == "mistral" else None
    if layer_types != {"full_attention"} or window is not None:
        return "it uses sliding-window attention"
    rope = model.model.rotary_emb.rope_type
    if rope not in STATIC_ROPES:
        return f"its rotary embedding {rope} changes with the length of the text"
    return None


class RMSNorm(nn.Module):
    """Root mean square norm whose mean is a matrix product: mean over a symbolic shape would leave the delegate."""

    mean: Tensor

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight = norm.weight
        self.eps = norm.variance_epsilon
        size = norm.weight.numel()
        self.register_buffer("mean", torch.full((1, size), 1 / size))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(F.linear(x * x, self.mean) + self.eps))


class Attention(nn.Module):
    """Grouped-query attention over a static KV cache [1, max_seq_len, kv_heads, head_dim]."""

    k_cache: Tensor
    v_cache: Tensor

    def __init__(self, source: Any, max_seq_len: int) -> None:
        super().__init__()
        config, self.head_dim = source.config, source.head_dim
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.scale = source.scaling
        q, k, v, o = source.q_proj, source.k_proj, source.v_proj, source.o_proj
        d_outs = [q.out_features, k.out_features, v.out_features]
        self.qkv = AdaptedLinear(side_by_side(q, k, v), q.in_features, d_outs)
        self.o = AdaptedLinear(side_by_side(o), o.in_features, [o.out_features])
        self.q_norm = RMSNorm(source.q_norm) if hasattr(source, "q_norm") else None
        self.k_norm = RMSNorm(source.k_norm) if hasattr(source, "k_norm") else None
        cache = torch.zeros(1, max_seq_len, self.kv_heads, self.head_dim)
        self.register_buffer("k_cache", cache)
        self.register_buffer("v_cache", cache.clone())

    def forward(self, x: Tensor, residual: Tensor, cos: Tensor, sin: Tensor, start: int) -> Tensor:
        qkv = self.qkv(x)
        q = self._rotated(qkv, 0, self.heads, self.q_norm, cos, sin, start)
        k = self._rotated(qkv, self.heads, self.kv_heads, self.k_norm, cos, sin, start)
        v = torch.ops.lordba.rope_heads(qkv, cos, sin, start, self.heads + self.kv_heads, self.kv_heads, False)
        return self.o(attend(q, k, v, self.k_cache, self.v_cache, start, self.scale), residual)

    def _rotated(
        self, qkv: Tensor, first: int, heads: int, norm: RMSNorm | None, cos: Tensor, sin: Tensor, start: int
    ) -> Tensor:
        """Heads first, first+1, ... of the packed row [1, T, all * head_dim], rotated: [1, T, heads, head_dim]."""
        if norm is None:
            return torch.ops.lordba.rope_heads(qkv, cos, sin, start, first, heads, True)
        picked = norm(torch.ops.lordba.rope_heads(qkv, cos, sin, start, first, heads, False))
        return torch.ops.lordba.rope_heads(picked.view(1, -1, heads * self.head_dim), cos, sin, start, 0, heads, True)


class Layer(nn.Module):
    """One transformer block: attention and gated MLP, each behind a norm and added to the stream."""

    def __init__(self, source: Any, max_seq_len: int) -> None:
        super().__init__()
        mlp = source.mlp
        gate, up, down = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.attention_norm = RMSNorm(source.input_layernorm)
        self.attention = Attention(source.self_attn, max_seq_len)
        self.mlp_norm = RMSNorm(source.post_attention_layernorm)
        self.gate_up = AdaptedLinear(side_by_side(gate, up), gate.in_features, [gate.out_features, up.out_features])
        self.down = AdaptedLinear(side_by_side(down), down.in_features, [down.out_features])

    def adapt(self, slot: AdapterSlot, prefix: str, adapted: set[str]) -> None:
        attention = [f"{prefix}.self_attn.{name}_proj" for name in ("q", "k", "v", "o")]
        mlp = [f"{prefix}.mlp.{name}_proj" for name in ("gate", "up", "down")]
        self.attention.qkv.adapt(slot, attention[:3], adapted)
        self.attention.o.adapt(slot, attention[3:], adapted)
        self.gate_up.adapt(slot, mlp[:2], adapted)
        self.down.adapt(slot, mlp[2:], adapted)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, start: int) -> Tensor:
        x = self.attention(self.attention_norm(x), x, cos, sin, start)
        return self.down(torch.ops.lordba.swiglu(self.gate_up(self.mlp_norm(x))), x)


class Decoder(nn.Module):
    """tokens [1, T] at input_pos [1] -> logits of the last token [1, 1, vocabulary] (all tokens if `all_logits`)."""

    cos: Tensor
    sin: Tensor

    def __init__(self, model: Any, adapted: set[str], max_seq_len: int) -> None:
        super().__init__()
        self.all_logits = False
        self.max_seq_len = max_seq_len
        self.embedding = model.model.embed_tokens
        layers = [Layer(layer, max_seq_len) for layer in model.model.layers]
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(model.model.norm)
        head = model.lm_head
        self.head = AdaptedLinear(side_by_side(head), head.in_features, [head.out_features])
        self.slot = AdapterSlot()
        for i, layer in enumerate(layers):
            layer.adapt(self.slot, f"model.layers.{i}", adapted)
        self.head.adapt(self.slot, ["lm_head"], adapted)
        rotary = model.model.rotary_emb
        angles = torch.outer(torch.arange(max_seq_len).float(), rotary.inv_freq.float())
        cos, sin = angles.cos() * rotary.attention_scaling, angles.sin() * rotary.attention_scaling
        self.register_buffer("cos", torch.cat([cos, cos], -1))
        self.register_buffer("sin", torch.cat([-sin, sin], -1))  # the sign of rotate_half, folded in

    def forward(self, tokens: Tensor, input_pos: Tensor, adapter: Tensor | None = None) -> Tensor:
        if adapter is not None:
            self.slot.blob = adapter
        start = start_position(input_pos, tokens.shape[1], self.max_seq_len)
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin, start)
        if not self.all_logits:
            x = x[:, -1:]
        return self.head(self.norm(x))


def start_position(input_pos: Tensor, length: int, max_seq_len: int) -> int:
    """input_pos [1] as an integer that export knows to lie, with the tokens that follow, inside the cache."""
    start: int = input_pos[0].item()  # type: ignore[assignment]
    torch._check(start >= 0)
    torch._check(start < max_seq_len)
    torch._check(start + length <= max_seq_len)
    return start
