"""The Core ML decoder: any transformers decoder with its KV cache as states, and adapters as constants or as inputs."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lordba.adapter import Adapter
from lordba.errors import LordbaError
from lordba.layers import check_fits, linear_size
from lordba.runtime.coreml_adapter import AdapterInputs

from ..model import cache_shape, check_plain_attention, with_attention
from . import ops  # noqa: F401 (registers the ops that the decoder calls)
from .constants import AdapterConstants, Parts
from .layers import RotaryTable, make_safe

ATTENTION_NAME = "lordba_states"
HIDDEN = -1e4  # added to the score of a position that must not be seen: fp16 holds it, and exp() makes it 0


class InUse:
    """The adapter of the forward call that runs: an object, for torch.export copies plain dicts of modules."""

    def __init__(self) -> None:
        self.parts: dict[str, Parts] = {}


class AdaptedLayer(nn.Module):
    """A linear layer plus the term of an adapter, unmerged, where there is one for its path."""

    def __init__(self, linear: nn.Module, path: str, in_use: InUse) -> None:
        super().__init__()
        self.linear = linear
        self.path = path
        self._in_use = in_use

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if self.path not in self._in_use.parts:
            return y
        a, b, s_in, s_mid, s_out = self._in_use.parts[self.path]
        if a.dtype == torch.uint8:
            return y + torch.ops.lordba.sign_adapter(x, a, b, s_in, s_mid, s_out)
        return y + (x * s_in) @ a.t() * s_mid @ b.t() * s_out


class StateCache(nn.Module):
    """Keys and values of one layer, fp16 as Core ML's states are: [1, kv_heads, max_seq_len, head_dim]."""

    k: Tensor
    v: Tensor

    def __init__(self, kv_heads: int, max_seq_len: int, head_dim: int) -> None:
        super().__init__()
        self.register_buffer("k", torch.zeros(1, kv_heads, max_seq_len, head_dim, dtype=torch.float16))
        self.register_buffer("v", torch.zeros(1, kv_heads, max_seq_len, head_dim, dtype=torch.float16))

    def append(self, key: Tensor, value: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        """Write key and value [1, kv_heads, T, head_dim] at `start`; returns the whole caches as float32."""
        results = []
        for cache, new in ((self.k, key), (self.v, value)):
            updated = torch.ops.lordba.update_cache(cache, new.to(cache.dtype), start)
            cache.copy_(updated)
            results.append(updated.to(new.dtype))
        return results[0], results[1]


def state_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float | None = None,
    caches: nn.ModuleList | None = None,
    start: Tensor | None = None,
    bias: Tensor | None = None,
    **unsupported: object,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [1, heads, T, head_dim] -> [1, T, heads, head_dim].

    `bias` [T, S] hides positions.
    """
    check_plain_attention(unsupported, "the Core ML target")
    assert bias is not None
    if caches is not None:
        assert start is not None
        key, value = caches[module.layer_idx].append(key, value, start)
    heads, head_dim, kv_heads = query.shape[1], query.shape[3], key.shape[1]
    keys, values = (repeated(tensor, heads // kv_heads) for tensor in (key, value))
    scores = query @ keys.transpose(2, 3) * (head_dim**-0.5 if scaling is None else scaling) + bias
    return (scores.softmax(-1) @ values).transpose(1, 2), None


def repeated(tensor: Tensor, times: int) -> Tensor:
    """Each head of [1, kv_heads, S, head_dim] `times` times in a row, for the query heads that share it."""
    if times == 1:
        return tensor
    return torch.stack([tensor] * times, 2).flatten(1, 2)


class CoremlDecoder(nn.Module):
    """Tokens int32 [1, T] at position start int32 [1] -> logits of the last one, float [1, vocabulary].

    With caches, `start` tokens came before; without (`stateless`), every call takes the whole text and `start` is not
    an input. In inputs mode the adapter comes with each call (lordba.runtime.coreml_adapter).
    """

    def __init__(
        self,
        model: Any,
        adapters: Mapping[str, Adapter],
        max_seq_len: int,
        *,
        stateless: bool = False,
        precision: str = "fp16",
        palettes: bool = True,
    ) -> None:
        super().__init__()
        self.precision = precision
        for name, adapter in adapters.items():
            check_fits(adapter, model, f"adapter {name}")
        self.max_seq_len = max_seq_len
        self.all_logits = False
        self.model = with_attention(model, ATTENTION_NAME, state_attention)
        layers, kv_heads, head_dim = cache_shape(model.config)
        self.caches = None
        if not stateless:
            self.caches = nn.ModuleList([StateCache(kv_heads, max_seq_len, head_dim) for _ in range(layers)])
        make_safe(self.model, max_seq_len)
        self._in_use = InUse()
        self.layers: dict[str, AdaptedLayer] = {}
        adapted = {path for adapter in adapters.values() for path in adapter.modules}
        sizes: dict[str, tuple[int, int]] = {}
        for path, layer in list(self.model.named_modules()):
            if path in adapted:
                size = linear_size(layer)
                assert size is not None  # check_fits has seen to it
                sizes[path] = size
                self.layers[path] = AdaptedLayer(layer, path, self._in_use)
                self.model.set_submodule(path, self.layers[path])
        self.adapter = AdapterConstants(list(self.layers), precision, palettes)
        self.adapter_inputs = AdapterInputs(sizes, max((adapter.r for adapter in adapters.values()), default=0))

    def use(self, adapter: Adapter | None) -> None:
        """Make this adapter a constant of the decoder; None is the base alone."""
        self.adapter.load(adapter.modules if adapter else {})

    def forward(self, tokens: Tensor, start: Tensor | None = None, adapter: dict[str, Tensor] | None = None) -> Tensor:
        self._in_use.parts = self.adapter.read() if adapter is None else self.adapter_inputs.parts(adapter)
        positions = torch.arange(tokens.shape[1], dtype=torch.int32)
        caches = None
        if start is not None:
            positions = positions + start
            caches = self.caches
        columns = positions if caches is None else torch.arange(self.max_seq_len, dtype=torch.int32)
        bias = (columns[None] > positions[:, None]).float() * HIDDEN
        logits = self.model(
            input_ids=tokens,
            position_ids=positions[None],
            use_cache=False,
            caches=caches,
            start=start,
            bias=bias,
            logits_to_keep=0 if self.all_logits else 1,
        ).logits
        self._in_use.parts = {}
        return logits if self.all_logits else logits[:, 0]

    @torch.no_grad()
    def logits(self, tokens: Tensor, adapter: Adapter | None) -> Tensor:
        """See target.Captured. In one go and in float32, keys and values too, which states hold in fp16."""
        self.use(adapter)
        self.all_logits = True
        try:
            return self(tokens[None].int())[0]
        finally:
            self.all_logits = False

    def round_weights(self) -> None:
        """Round every float weight to fp16, as a package of that precision stores it; the base model keeps its own."""
        for module in self.modules():
            for name, weight in list(module.named_parameters(recurse=False)):
                rounded = weight.detach().half().float()
                if not bool(rounded.isfinite().all()):
                    raise LordbaError(
                        f"the weight {name} of {type(module).__name__} exceeds fp16, which Core ML computes in; "
                        "this model cannot be exported to Core ML"
                    )
                module.register_parameter(name, nn.Parameter(rounded, requires_grad=False))
            if isinstance(module, RotaryTable):
                module.cos, module.sin = module.cos.half().float(), module.sin.half().float()
