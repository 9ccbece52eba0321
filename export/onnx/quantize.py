"""Quantized layers for ONNX Runtime: `MatMulNBits` of 4 and 8 bit, and an embedding of int8 rows.

Eager, they compute with the weights dequantized once, in float: what `accuracy_level` 0 computes too. At level 4 the
kernels round activations to int8 per group of 32, which is several times faster.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..quantize import GROUP, Int8Rows, group_codes, replace_layers
from .decoder import AdapterNode, OnnxDecoder

ACCURACY_LEVELS = (0, 4)


class NBitsLinear(nn.Module):
    """x W^T with W = scale * (code - 2^(bits-1)) per group of 32 inputs, as com.microsoft::MatMulNBits holds it.

    codes uint8 [n, k], each below 2^bits; scale float [n, k/32]. 4-bit codes share a byte, low half first.
    """

    packed: Tensor
    scale: Tensor

    def __init__(self, codes: Tensor, scale: Tensor, bits: int, accuracy_level: int) -> None:
        super().__init__()
        n, k = codes.shape
        blocks = codes.view(n, k // GROUP, GROUP)
        self.register_buffer("packed", blocks[..., 0::2] | (blocks[..., 1::2] << 4) if bits == 4 else blocks)
        self.register_buffer("scale", scale.contiguous())
        self.attributes: dict[str, int] = {
            "K": k,
            "N": n,
            "bits": bits,
            "block_size": GROUP,
            "accuracy_level": accuracy_level,
        }
        self._weight = ((blocks.float() - 2 ** (bits - 1)) * scale[..., None]).view(n, k)  # no buffer: eager only

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_exporting():
            return F.linear(x, self._weight)
        return torch.onnx.ops.symbolic(
            "com.microsoft::MatMulNBits",
            (x, self.packed, self.scale),
            {**self.attributes},
            dtype=x.dtype,
            shape=[*x.shape[:-1], self.attributes["N"]],
            version=1,
        )


class SplitInt4Linear(nn.Module):
    """W = scale * code + offset per group of 32 inputs, exact for Q4_1 GGUFs.

    The codes lie around 8, where MatMulNBits needs no zero points (float ones are slow), and
    x W^T = x (scale * codes)^T + (group sums of x) offset^T.
    """

    offset: Tensor

    def __init__(self, source: nn.Linear, accuracy_level: int) -> None:
        super().__init__()
        codes, step, low = group_codes(source.weight.detach())
        n, k = source.weight.shape
        self.codes = NBitsLinear(codes.view(n, k).to(torch.uint8), step[..., 0], 4, accuracy_level)
        self.register_buffer("offset", (low + 8 * step)[..., 0].t().contiguous())
        self.bias = source.bias

    def forward(self, x: Tensor) -> Tensor:
        sums = x.unflatten(-1, (-1, GROUP)).sum(-1)
        y = self.codes(x) + sums @ self.offset
        return y if self.bias is None else y + self.bias


class Int8Linear(nn.Module):
    """Symmetric int8 weights with a scale per group of 32 inputs (exact for Q8_0 GGUFs)."""

    def __init__(self, source: nn.Linear, accuracy_level: int) -> None:
        super().__init__()
        weight = source.weight.detach()
        n, k = weight.shape
        groups = weight.view(n, k // GROUP, GROUP)
        scale = (groups.abs().amax(-1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
        codes = (groups / scale[..., None]).round() + 128
        self.codes = NBitsLinear(codes.view(n, k).to(torch.uint8), scale, 8, accuracy_level)
        self.bias = source.bias

    def forward(self, x: Tensor) -> Tensor:
        y = self.codes(x)
        return y if self.bias is None else y + self.bias


class Int8Embedding(Int8Rows):
    """The embedding in standard operators: rows of codes and of scales are gathered, then multiplied."""

    def forward(self, tokens: Tensor) -> Tensor:
        scales = self.scales[tokens]
        codes = self.codes[tokens].unflatten(-1, (scales.shape[-1], -1))
        return (codes.to(scales.dtype) * scales[..., None]).flatten(-2)


def quantize_base(decoder: OnnxDecoder, base_quant: str, accuracy_level: int) -> None:
    """Quantize every linear and embedding of a decoder, in place; its adapters are not touched.

    A layer whose inputs are no multiple of 32 stays as it is.
    """

    def linear(layer: nn.Linear, bits: int) -> nn.Module:
        if layer.in_features % GROUP:
            return layer
        return SplitInt4Linear(layer, accuracy_level) if bits == 4 else Int8Linear(layer, accuracy_level)

    head = decoder.model.get_output_embeddings()
    replace_layers(decoder, head.linear if isinstance(head, AdapterNode) else head, base_quant, linear, Int8Embedding)
