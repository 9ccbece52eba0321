"""Quantized layers for Core ML: weights of 4 bit per block of 32 inputs, or of 8 bit per output channel.

Eager, they compute with the weights dequantized once, from the very numbers that the package holds.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import coreml_ops
from .coreml_decoder import AdaptedLayer, CoremlDecoder
from .quantize import GROUP, group_codes, replace_layers

SMALLEST = 2.0**-24  # of fp16


class BlockLinear(nn.Module):
    """A linear layer with weight = scale * (code - offset), see coreml_ops.block_linear."""

    codes: Tensor
    scale: Tensor
    offset: Tensor | None

    def __init__(self, codes: Tensor, scale: Tensor, offset: Tensor | None, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale.half().float())
        self.register_buffer("offset", None if offset is None else offset.half().float())
        self.bias = bias
        self._weight = coreml_ops.dequantize(self.codes, self.scale, self.offset)  # no buffer: eager only

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_exporting():
            return F.linear(x, self._weight, self.bias)
        return torch.ops.lordba.block_linear(x, self.codes, self.scale, self.offset, self.bias)


def int4_linear(source: nn.Linear) -> BlockLinear:
    """Codes 0..15 with a scale and a real offset per block, which holds the minimum of Q4_1 GGUFs."""
    codes, step, low = group_codes(source.weight.detach())
    # A block of equal weights has no step of its own: then offset -1 or 1 and the codes 0 hold the value.
    equal = step < SMALLEST
    step = torch.where(equal, low.abs().clamp_min(SMALLEST), step).half().float()
    codes = torch.where(equal, 0.0, codes)
    offset = -low / step
    n, k = source.weight.shape
    return BlockLinear(codes.view(n, k).to(torch.uint8), step[..., 0], offset[..., 0], source.bias)


def int8_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 codes [n, k] and one scale per row [n, 1]."""
    scale = (weight.abs().amax(-1, keepdim=True) / 127).clamp_min(SMALLEST).half().float()
    return (weight / scale).round().clamp(-127, 127).to(torch.int8), scale


def int8_linear(source: nn.Linear) -> BlockLinear:
    codes, scale = int8_rows(source.weight.detach())
    return BlockLinear(codes, scale, None, source.bias)


class Int8Embedding(nn.Module):
    """Rows of int8 codes with one scale each."""

    codes: Tensor
    scale: Tensor

    def __init__(self, source: nn.Embedding) -> None:
        super().__init__()
        codes, scale = int8_rows(source.weight.detach())
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.ops.lordba.row_embedding(tokens, self.codes, self.scale)


def quantize_base(decoder: CoremlDecoder, base_quant: str) -> None:
    """Quantize every linear and embedding of a decoder, in place; its adapters are not touched."""

    def linear(layer: nn.Linear, bits: int) -> nn.Module:
        return int4_linear(layer) if bits == 4 and layer.in_features % GROUP == 0 else int8_linear(layer)

    head = decoder.model.get_output_embeddings()
    replace_layers(decoder, head.linear if isinstance(head, AdaptedLayer) else head, base_quant, linear, Int8Embedding)
