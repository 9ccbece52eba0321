"""Capture: from a transformers model to the module that is exported, by the fast or the generic path."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lordba.adapter import Adapter
from lordba.errors import LordbaError
from lordba.layers import check_fits

from ..model import check_length
from .adapted import AdapterSlot
from .decoder import Decoder, why_not_fast
from .generic import GenericDecoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROUTES = ("auto", "fast", "generic")


@dataclass(frozen=True)
class Captured:
    """A decoder ready to be quantized and lowered.

    `module(tokens [1, T] int64, input_pos [1] int64[, adapter uint8 [n]])` writes its KV cache and returns the logits
    of the last token, [1, 1, vocabulary]; with `module.all_logits = True` those of every token.
    """

    module: Decoder | GenericDecoder
    slot: AdapterSlot
    route: str
    max_seq_len: int

    @torch.no_grad()
    def logits(self, tokens: Tensor, adapter: Adapter | None) -> Tensor:
        """Eager logits [T, vocabulary] of tokens int64 [T] from the start of the cache."""
        self.slot.blob = self.slot.blob_of(adapter)
        self.module.all_logits = True
        try:
            return self.module(tokens[None], torch.tensor([0]))[0]
        finally:
            self.module.all_logits = False


def capture(model: "PreTrainedModel", adapters: dict[str, Adapter], max_seq_len: int, route: str = "auto") -> Captured:
    """Build the exportable decoder with places for every module that one of the adapters adapts.

    The fast path is one small decoder for Llama-like models; the generic path takes any transformers decoder whose
    attention is configurable. `auto` prefers the fast one.
    """
    for name, adapter in adapters.items():
        check_fits(adapter, model, f"adapter {name}")
    check_length(model.config, max_seq_len)
    adapted = {path for adapter in adapters.values() for path in adapter.modules}
    reason = why_not_fast(model)
    if route == "fast" and reason:
        raise LordbaError(f"the fast path cannot take this model: {reason}; use --route generic")
    if route == "generic" or reason:
        module: Decoder | GenericDecoder = GenericDecoder(model, adapted, max_seq_len)
        return Captured(module, module.slot, "generic", max_seq_len)
    module = Decoder(model, adapted, max_seq_len)
    return Captured(module, module.slot, "fast", max_seq_len)
