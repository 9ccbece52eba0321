"""Quantizing the frozen base: what the targets' quantized layers have in common, and putting them in."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from lordba.errors import LordbaError

BASE_QUANTS = ("int4", "int8", "none")
GROUP = 32


def group_codes(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """weight [n, k] as codes 0..15 (float) [n, k/32, 32], step and lowest value of each group [n, k/32, 1].

    weight = step * code + low; exact for weights that were made so, like those of Q4_1 GGUFs.
    """
    n, k = weight.shape
    groups = weight.reshape(n, k // GROUP, GROUP)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = ((high - low) / 15).clamp_min(torch.finfo(torch.bfloat16).tiny)
    return ((groups - low) / step).round(), step, low


class Int8Rows(nn.Module):
    """Rows of int8 codes with a float scale per group of 32 (exact for Q8_0 GGUFs) or per row."""

    codes: Tensor
    scales: Tensor

    def __init__(self, source: nn.Embedding) -> None:
        super().__init__()
        weight = source.weight.detach()
        rows, width = weight.shape
        group = GROUP if width % GROUP == 0 else width
        groups = weight.reshape(rows, width // group, group)
        scales = (groups.abs().amax(-1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
        self.register_buffer("codes", (groups / scales[..., None]).round().reshape(rows, width).to(torch.int8))
        self.register_buffer("scales", scales)


def replace_layers(
    module: nn.Module,
    head: nn.Module,
    base_quant: str,
    linear: Callable[[nn.Linear, int], nn.Module],
    embedding: Callable[[nn.Embedding], nn.Module],
) -> None:
    """Put a target's quantized layers into a captured decoder: linears in 4 or 8 bit, the head and embeddings in 8."""
    if base_quant not in BASE_QUANTS:
        raise LordbaError(f"--base-quant must be one of {', '.join(BASE_QUANTS)}, found {base_quant!r}")
    if base_quant == "none":
        return
    for path, layer in list(replaceable(module)):
        if isinstance(layer, nn.Embedding):
            module.set_submodule(path, embedding(layer))
        else:
            module.set_submodule(path, linear(layer, 4 if base_quant == "int4" and layer is not head else 8))


def replaceable(module: nn.Module) -> Iterator[tuple[str, nn.Linear | nn.Embedding]]:
    for path, layer in module.named_modules():
        if isinstance(layer, nn.Linear | nn.Embedding):
            yield path, layer
