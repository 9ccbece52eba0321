"""What a written package holds of every adapter, compared with the adapter itself: signs and scales, on real inputs."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from lordba.adapter import Adapter, SignModule
from lordba.runtime.coreml_adapter import Parts
from lordba.scales import decode_scales
from lordba.signs import unpack_signs

from ..target import record_inputs
from .constants import rounded
from .decoder import CoremlDecoder


class CoremlProbe:
    """See target.Probe. The reference are the adapter's signs and its scales as the package's precision rounds them;
    terms are computed in float64 from both, so that the error is 0 unless a sign or a scale differs.
    """

    def __init__(
        self,
        decoder: CoremlDecoder,
        tokens: Tensor,
        adapters: Mapping[str, Adapter],
        stored: Callable[[str], Mapping[str, Parts]],
    ) -> None:
        self._precision = decoder.precision
        self._adapters = adapters
        self._stored = stored
        seen = record_inputs(list(decoder.layers.values()), decoder, tokens)
        self._inputs = {path: seen[layer][0].double() for path, layer in decoder.layers.items()}

    def worst_error(self, name: str) -> float:
        return self.error_of(self._adapters[name], self._stored(name))

    def error_of(self, adapter: Adapter, found: Mapping[str, Parts]) -> float:
        """The worst error against `adapter` of a package that holds `found`."""
        worst = 0.0
        for path, module in adapter.modules.items():
            if path not in found:
                return float("inf")
            expected = term(self._inputs[path], parts_of(module, self._precision))
            error = (term(self._inputs[path], found[path]) - expected).norm(dim=-1)
            worst = max(worst, (error / expected.norm(dim=-1).clamp_min(1e-30)).max().item())
        return worst


def parts_of(module: SignModule, precision: str) -> Parts:
    """Signs as +1 and -1 and scales of an adapter's module, as a package of this precision should hold them."""
    s_in, s_mid, s_out = (rounded(decode_scales(scales), precision) for scales in module.scales)
    return unpack_signs(module.a_signs, module.d_in), unpack_signs(module.b_signs, module.r), s_in, s_mid, s_out


def term(x: Tensor, parts: Parts) -> Tensor:
    """The adapter's term for x [T, d_in] in float64."""
    a, b, s_in, s_mid, s_out = (part.double() for part in parts)
    return (x * s_in) @ a.t() * s_mid @ b.t() * s_out


def stored_parts(decoder: CoremlDecoder, adapter: Adapter, constants: Mapping[str, np.ndarray]) -> dict[str, Parts]:
    """The adapter out of a program's decoded constants, by their names; modules that are not all there are left out."""
    decoder.use(adapter)
    held = decoder.adapter
    by_buffer = {buffer_of(name): torch.from_numpy(np.array(value)) for name, value in constants.items()}
    tables = {name: by_buffer[name] for name in held.places if name in by_buffer}
    vectors = held.vectors(tables)
    return {
        path: (by_buffer[f"a_{i}"], by_buffer[f"b_{i}"], *vectors[path])
        for i, path in enumerate(held.paths)
        if path in vectors and {f"a_{i}", f"b_{i}"} <= by_buffer.keys()
    }


def buffer_of(name: str) -> str:
    """A constant's name without what conversion puts around that of its buffer in `adapter`."""
    name = name.rpartition("adapter_")[2]
    return name.partition("_decoded")[0].partition("_to_fp16")[0]
