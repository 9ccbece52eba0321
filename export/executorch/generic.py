"""The generic path: any transformers decoder, with its attention and cache replaced through transformers' registry."""

from typing import Any

import torch
from torch import Tensor, nn

from lordba.layers import linear_size

from ..model import cache_shape, check_plain_attention, with_attention
from .adapted import AdaptedLinear, AdapterSlot
from .attention import attend
from .decoder import start_position

ATTENTION_NAME = "lordba_static_cache"


class LayerCache(nn.Module):
    """The KV cache of one layer, [1, max_seq_len, kv_heads, head_dim]."""

    k: Tensor
    v: Tensor

    def __init__(self, max_seq_len: int, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.register_buffer("k", torch.zeros(1, max_seq_len, kv_heads, head_dim))
        self.register_buffer("v", torch.zeros(1, max_seq_len, kv_heads, head_dim))


def static_cache_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float | None = None,
    start: int = 0,
    caches: nn.ModuleList | None = None,
    **unsupported: object,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [1, heads, T, head_dim] -> [1, T, heads, head_dim]."""
    check_plain_attention(unsupported, "the generic path")
    assert caches is not None
    cache: Any = caches[module.layer_idx]
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend(q, k, v, cache.k, cache.v, start, scale), None


class GenericDecoder(nn.Module):
    """Same contract as decoder.Decoder, around the unmodified transformers model."""

    def __init__(self, model: Any, adapted: set[str], max_seq_len: int) -> None:
        super().__init__()
        self.all_logits = False
        self.max_seq_len = max_seq_len
        self.model = with_attention(model, ATTENTION_NAME, static_cache_attention)
        layers, kv_heads, head_dim = cache_shape(model.config)
        self.caches = nn.ModuleList([LayerCache(max_seq_len, kv_heads, head_dim) for _ in range(layers)])
        self.slot = AdapterSlot()
        for path, layer in list(self.model.named_modules()):
            if path in adapted:
                size = linear_size(layer)
                assert size is not None  # check_fits has seen to it
                wrapped = AdaptedLinear(layer, size[0], [size[1]])
                wrapped.adapt(self.slot, [path], adapted)
                self.model.set_submodule(path, wrapped)

    def forward(self, tokens: Tensor, input_pos: Tensor, adapter: Tensor | None = None) -> Tensor:
        if adapter is not None:
            self.slot.blob = adapter
        length = tokens.shape[1]
        start = start_position(input_pos, length, self.max_seq_len)
        positions = (torch.arange(length) + start)[None]
        return self.model(
            input_ids=tokens,
            position_ids=positions,
            use_cache=False,
            start=start,
            caches=self.caches,
            logits_to_keep=0 if self.all_logits else 1,
        ).logits
