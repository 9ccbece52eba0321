"""Layers of a transformers decoder in a form that fp16 arithmetic holds: norms that do not overflow, rotary tables."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lordba.errors import LordbaError

from .decoder import STATIC_ROPES

SMALLEST_NORMAL = 2.0**-14  # of fp16


class RMSNorm(nn.Module):
    """Root mean square norm of x divided by its largest element first: squares of single activations exceed fp16.

    SmolLM2 has activations of some thousands; without this its fp16 program puts out noise.
    """

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        largest = x.abs().amax(-1, keepdim=True).clamp_min(SMALLEST_NORMAL)
        z = x / largest
        mean = (z * z).mean(-1, keepdim=True) + self.eps / largest / largest
        return self.weight * (z * torch.rsqrt(mean))


class RotaryTable(nn.Module):
    """The cosines and sines of a rotary embedding for every position, computed beforehand.

    Angles in fp16 would be off by up to a quarter radian at position 512.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, source: Any, max_seq_len: int) -> None:
        super().__init__()
        if source.rope_type not in STATIC_ROPES:
            raise LordbaError(
                f"the rotary embedding {source.rope_type} of {type(source).__name__} changes with the length of the "
                "text; the Core ML target has none of these"
            )
        cos, sin = source(torch.zeros(1), torch.arange(max_seq_len)[None])
        self.register_buffer("cos", cos[0])
        self.register_buffer("sin", sin[0])

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [1, T, width] of positions [1, T]."""
        return F.embedding(position_ids, self.cos), F.embedding(position_ids, self.sin)


def make_safe(model: nn.Module, max_seq_len: int) -> None:
    """Put these layers into a model that is a copy of our own, in place."""
    for path, module in list(model.named_modules()):
        source: Any = module
        kind = type(module).__name__
        if hasattr(module, "inv_freq"):
            model.set_submodule(path, RotaryTable(source, max_seq_len))
        elif kind.startswith("Gemma") and kind.endswith("RMSNorm"):
            model.set_submodule(path, RMSNorm(1 + source.weight.detach(), source.eps))
        elif kind.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            model.set_submodule(path, RMSNorm(source.weight.detach(), source.variance_epsilon))
