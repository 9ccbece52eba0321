"""What a Core ML program is made of beyond PyTorch's own operators, with its eager meaning.

Each op becomes a few MIL operations (coreml_lowering.py), so that codes reach the package as codes: the converter would
fold an ordinary dequantization into float weights, and it has no way to write a cache at a position that is data.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import Library

from lordba.scales import ScaleCode, levels

_library = Library("lordba", "FRAGMENT")
_library.define("scale_table(Tensor codes, Tensor ranges, str precision) -> Tensor")
_library.define("block_linear(Tensor x, Tensor codes, Tensor scale, Tensor? offset, Tensor? bias) -> Tensor")
_library.define("row_embedding(Tensor tokens, Tensor codes, Tensor scale) -> Tensor")
_library.define("update_cache(Tensor cache, Tensor new, Tensor start) -> Tensor")


def scale_table(codes: Tensor, ranges: Tensor, precision: str) -> Tensor:
    """Equally long vectors of log4 scales: codes uint8 [count * n], ranges fp16 [count, 2] -> float32 [count * n].

    `precision` fp16 rounds the levels to what a package of that precision stores.
    """
    vectors = codes.view(len(ranges), -1).long()
    table = torch.cat([levels(ScaleCode.LOG4, row)[vector] for row, vector in zip(ranges, vectors, strict=True)])
    return table.half().float() if precision == "fp16" else table


def dequantize(codes: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
    """scale * (code - offset): codes int8 or uint8 [n, k]; scale and offset [n, blocks] -> float32 [n, k]."""
    n, blocks = scale.shape
    values = codes.view(n, blocks, -1).float()
    if offset is not None:
        values = values - offset.float()[..., None]
    return (values * scale.float()[..., None]).view(n, -1)


def block_linear(x: Tensor, codes: Tensor, scale: Tensor, offset: Tensor | None, bias: Tensor | None) -> Tensor:
    """A linear layer of integer codes: x [..., k] -> [..., n]; codes, scale and offset as `dequantize` takes them."""
    return F.linear(x, dequantize(codes, scale, offset), bias)


def row_embedding(tokens: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """Rows of int8 codes [rows, width] with one scale each, [rows, 1]: tokens [...] -> float32 [..., width]."""
    return codes[tokens.long()].float() * scale.float()[tokens.long()]


def update_cache(cache: Tensor, new: Tensor, start: Tensor) -> Tensor:
    """A copy of cache [1, heads, S, width] with new [1, heads, T, width] from position start [1] on."""
    first = int(start)
    result = cache.clone()
    result[:, :, first : first + new.shape[2]] = new
    return result


def _fake_table(codes: Tensor, ranges: Tensor, precision: str) -> Tensor:
    return codes.new_empty(codes.shape, dtype=torch.float32)


def _fake_linear(x: Tensor, codes: Tensor, scale: Tensor, offset: Tensor | None, bias: Tensor | None) -> Tensor:
    return x.new_empty([*x.shape[:-1], codes.shape[0]])


def _fake_embedding(tokens: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    return tokens.new_empty([*tokens.shape, codes.shape[1]], dtype=torch.float32)


def _fake_cache(cache: Tensor, new: Tensor, start: Tensor) -> Tensor:
    return torch.empty_like(cache)


for _function, _fake in (
    (scale_table, _fake_table),
    (block_linear, _fake_linear),
    (row_embedding, _fake_embedding),
    (update_cache, _fake_cache),
):
    _library.impl(_function.__name__, _function, "CompositeExplicitAutograd")
    _library.impl(_function.__name__, _fake, "Meta")
