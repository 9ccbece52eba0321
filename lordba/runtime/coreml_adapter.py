"""Adapters as inputs of a Core ML program: what they are called, and how an adapter fills them."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

Parts = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""Of one module: signs a [r, d_in] and b [d_out, r] as +1 and -1, scales s_in [d_in], s_mid [r], s_out [d_out]."""
NAMES = ("a", "b", "s_in", "s_mid", "s_out")


@dataclass(frozen=True)
class AdapterInputs:
    """Layers of one size share five inputs, in the order of `sizes`: `a_<d_in>x<d_out>` [count, r, d_in] and so on.

    An adapter of a smaller rank is filled up with scales of zero, and so is a module that it lacks.
    """

    sizes: Mapping[str, tuple[int, int]]
    rank: int

    @classmethod
    def of_program(cls, modules: Sequence[str], shapes: Mapping[str, tuple[int | None, ...]]) -> "AdapterInputs":
        """What a program takes, by its inputs' shapes and its modules in the order of its groups."""
        remaining = iter(modules)
        sizes: dict[str, tuple[int, int]] = {}
        rank = 0
        for name, shape in shapes.items():
            if name.startswith("a_"):
                count, rank, d_in = (size or 0 for size in shape)
                d_out = shapes[name.replace("a_", "b_", 1)][1] or 0
                sizes |= {next(remaining): (d_in, d_out) for _ in range(count)}
        return cls(sizes, rank)

    @property
    def modules(self) -> list[str]:
        """Module paths in the order of the groups."""
        return [path for paths in self.groups.values() for path in paths]

    @cached_property
    def groups(self) -> dict[tuple[int, int], list[str]]:
        """Module paths by (d_in, d_out)."""
        result: dict[tuple[int, int], list[str]] = defaultdict(list)
        for path, size in self.sizes.items():
            result[size].append(path)
        return dict(result)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every input's shape by its name."""
        result: dict[str, tuple[int, ...]] = {}
        for (d_in, d_out), paths in self.groups.items():
            n = len(paths)
            parts = ((n, self.rank, d_in), (n, d_out, self.rank), (n, d_in), (n, self.rank), (n, d_out))
            result |= {input_name(part, d_in, d_out): shape for part, shape in zip(NAMES, parts, strict=True)}
        return result

    def parts(self, inputs: Mapping[str, Tensor]) -> dict[str, Parts]:
        """The parts of every module out of the inputs."""
        result: dict[str, Parts] = {}
        for size, paths in self.groups.items():
            parts = [inputs[input_name(part, *size)].unbind(0) for part in NAMES]
            for path, *tensors in zip(paths, *parts, strict=True):
                a, b, s_in, s_mid, s_out = tensors
                result[path] = (a, b, s_in, s_mid, s_out)
        return result

    def fill(self, modules: Mapping[str, Parts], dtype: torch.dtype = torch.float16) -> dict[str, np.ndarray]:
        """The inputs for an adapter whose modules hold signs +1 and -1 and decoded scales."""
        result = {name: torch.zeros(shape, dtype=dtype) for name, shape in self.shapes.items()}
        for size, paths in self.groups.items():
            for place, path in enumerate(paths):
                for part, tensor in zip(NAMES, modules.get(path, ()), strict=False):
                    target = result[input_name(part, *size)][place]
                    target[tuple(slice(n) for n in tensor.shape)] = tensor.to(dtype)
        return {name: tensor.numpy() for name, tensor in result.items()}


def input_name(part: str, d_in: int, d_out: int) -> str:
    return f"{part}_{d_in}x{d_out}"
