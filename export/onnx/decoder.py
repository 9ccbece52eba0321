"""The ONNX decoder: any transformers decoder with the KV cache as inputs and outputs, and a node per adapted layer."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lordba.adapter import Adapter, SignModule
from lordba.blob import make_blob
from lordba.layers import LordbaLinear, linear_size
from lordba.runtime.onnx_adapter import no_adapter
from lordba.scales import ScaleCode

from ..model import cache_shape, check_plain_attention, with_attention
from .op import DOMAIN, NAME, VERSION

ATTENTION_NAME = "lordba_growing_cache"


class AdapterNode(nn.Module):
    """A linear layer with a place for an adapter: one `ai.lordba::SignAdapter` node in the exported model.

    `index` is its record in the adapter, which all nodes of a decoder share; `use` sets the adapter of eager calls.
    """

    def __init__(self, linear: nn.Module, index: int, adapter: "AdapterInput") -> None:
        super().__init__()
        self.linear = linear
        self.index = index
        self._adapted: LordbaLinear | None = None
        self._adapter: AdapterInput
        object.__setattr__(self, "_adapter", adapter)  # not a child: it belongs to the decoder

    def use(self, module: SignModule | None) -> None:
        """Compute with this adapter in eager calls; None is the linear layer alone."""
        adapted = None if module is None else LordbaLinear(self.linear, module)
        object.__setattr__(self, "_adapted", adapted)  # not a child: it must not reach the model

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_exporting():
            return self.linear(x) if self._adapted is None else self._adapted(x)
        base = self.linear(x)
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::{NAME}",
            (x, base, self._adapter.blob),
            {"module": self.index},
            dtype=x.dtype,
            shape=base.shape,
            version=VERSION,
        )


class AdapterInput(nn.Module):
    """What becomes the program's overridable input: the blob that stands for no adapter."""

    blob: Tensor

    def __init__(self, blob: Tensor) -> None:
        super().__init__()
        self.register_buffer("blob", blob)


def growing_cache_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float | None = None,
    past: Sequence[Tensor] = (),
    present: list[Tensor] | None = None,
    bias: Tensor | None = None,
    **unsupported: object,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [B, heads, T, head_dim] -> [B, T, heads, head_dim].

    Appends to layer i's past key and value, past[2i] and past[2i + 1], and to the list `present` what comes of it.
    """
    check_plain_attention(unsupported, "the ONNX target")
    assert present is not None
    keys, values = (
        torch.cat([old, new], 2) for old, new in zip(past[2 * module.layer_idx :], (key, value), strict=False)
    )
    present += [keys, values]
    y = F.scaled_dot_product_attention(query, keys, values, bias, scale=scaling, enable_gqa=True)
    return y.transpose(1, 2), None


class OnnxDecoder(nn.Module):
    """optimum's decoder with past: (input_ids, attention_mask, position_ids, past) -> (logits, *present).

    input_ids and position_ids int64 [B, T]; attention_mask int64 [B, P + T], 0 where a token is to be ignored; past and
    present: key and value of each layer in turn, float [B, kv_heads, P or P + T, head_dim]; logits [B, T, vocabulary].
    """

    def __init__(self, model: Any, adapted: set[str], code: ScaleCode) -> None:
        super().__init__()
        self.code = code
        self.model = with_attention(model, ATTENTION_NAME, growing_cache_attention)
        self.layers, self.kv_heads, self.head_dim = cache_shape(model.config)
        layers = {path: self.model.get_submodule(path) for path in sorted(adapted)}
        self.sizes = {path: size for path, layer in layers.items() if (size := linear_size(layer))}
        assert len(self.sizes) == len(layers)  # check_fits has seen to it
        self.adapter = AdapterInput(make_blob([no_adapter(*size, code) for size in self.sizes.values()]))
        self.nodes = {path: AdapterNode(layers[path], i, self.adapter) for i, path in enumerate(layers)}
        for path, node in self.nodes.items():
            self.model.set_submodule(path, node)

    def use(self, adapter: Adapter | None) -> None:
        """Compute with this adapter in eager calls; None is the base alone."""
        for path, node in self.nodes.items():
            node.use(adapter.modules.get(path) if adapter else None)

    def no_past(self, batch: int = 1, length: int = 0) -> list[Tensor]:
        """A past of that many tokens, all zero."""
        return [torch.zeros(batch, self.kv_heads, length, self.head_dim) for _ in range(2 * self.layers)]

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, ...]:
        length, total = input_ids.shape[1], attention_mask.shape[1]
        places = torch.arange(length)[:, None] + (total - length)
        visible = (torch.arange(total) <= places) & (attention_mask != 0)[:, None, None]
        bias = torch.where(visible, 0.0, torch.finfo(torch.float32).min)  # -inf would make a row of padding NaN
        present: list[Tensor] = []
        logits = self.model(
            input_ids=input_ids, position_ids=position_ids, use_cache=False, past=past, present=present, bias=bias
        ).logits
        return (logits, *present)
