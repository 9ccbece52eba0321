"""An adapter as constants of a Core ML program: signs packed, and log4 scales as a few tables of codes with palettes.

There is one table per vector length: a vector by itself would cost a package a blob of 128 bytes for its palette and
one for its codes, which are hardly longer.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lordba.adapter import SignModule
from lordba.scales import EncodedScales, ScaleCode, decode_scales

from . import coreml_ops  # noqa: F401 (registers lordba::scale_table)

Parts = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""Of one module: signs A and B, packed, or +1 and -1 where they come as inputs; scales in, mid and out, decoded."""


def unpack_codes(scales: EncodedScales) -> Tensor:
    """The log4 codes of a vector, one per element, uint8 [n]."""
    return torch.stack([scales.values & 15, scales.values >> 4], -1).flatten()[: scales.n]


def rounded(scales: Tensor, precision: str) -> Tensor:
    """Float32 scales as a package of this precision holds them."""
    return scales.half().float() if precision == "fp16" else scales


class AdapterConstants(nn.Module):
    """The adapter in use. A package's constants have the names of these buffers, with something before and after.

    `a_<i>` and `b_<i>` are module i's signs; `codes_<n>` and `ranges_<n>` all log4 scales of length n; `scale<k>_<i>`
    other scales (k = 0, 1, 2: in, mid, out), and all of them if not `palettes`.
    """

    def __init__(self, paths: Sequence[str], precision: str, palettes: bool) -> None:
        super().__init__()
        self.paths = list(paths)
        self.precision = precision
        self.palettes = palettes
        self.places: dict[str, list[tuple[str, int]]] = {}
        """Of each table: module and which of its scales (0 in, 1 mid, 2 out) each vector is."""

    def load(self, modules: Mapping[str, SignModule]) -> None:
        """Hold these modules, instead of what was held before."""
        for name in list(self._buffers):
            delattr(self, name)
        self.places = {}
        groups: dict[int, list[tuple[str, int, EncodedScales]]] = defaultdict(list)
        for i, path in enumerate(self.paths):
            if path not in modules:
                continue
            module = modules[path]
            self.register_buffer(f"a_{i}", module.a_signs)
            self.register_buffer(f"b_{i}", module.b_signs)
            for which, scales in enumerate(module.scales):
                if self.palettes and scales.code is ScaleCode.LOG4:
                    groups[scales.n].append((path, which, scales))
                    continue
                self.places[f"scale{which}_{i}"] = [(path, which)]
                self.register_buffer(f"scale{which}_{i}", rounded(decode_scales(scales), self.precision))
        for n, group in groups.items():
            self.places[f"codes_{n}"] = [(path, which) for path, which, _ in group]
            self.register_buffer(f"codes_{n}", torch.cat([unpack_codes(scales) for _, _, scales in group]))
            ranges = torch.stack([scales.range for _, _, scales in group if scales.range is not None])
            self.register_buffer(f"ranges_{n}", ranges)

    def read(self) -> dict[str, Parts]:
        """Every module's parts by its path."""
        tables: dict[str, Tensor] = {}
        for name in self.places:
            table: Tensor = getattr(self, name)
            if name.startswith("codes"):
                table = torch.ops.lordba.scale_table(table, getattr(self, f"ranges_{name[6:]}"), self.precision)
            tables[name] = table
        vectors = self.vectors(tables)
        return {
            path: (getattr(self, f"a_{i}"), getattr(self, f"b_{i}"), *vectors[path])
            for i, path in enumerate(self.paths)
            if path in vectors
        }

    def vectors(self, tables: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """Scales in, mid and out of every module, out of decoded tables."""
        found: dict[str, dict[int, Tensor]] = defaultdict(dict)
        for name, places in self.places.items():
            if name not in tables:
                continue
            table = tables[name]
            vectors = table.split(len(table) // len(places)) if len(places) > 1 else [table]
            for (path, which), vector in zip(places, vectors, strict=True):
                found[path][which] = vector
        return {path: (parts[0], parts[1], parts[2]) for path, parts in found.items() if len(parts) == 3}
