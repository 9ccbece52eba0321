"""Export chains of dense LoRA modules to XNNPACK: python benchmarks/contest/xnnpack.py FOLDER CHAIN MOST_TOKENS DxR ...

A process of its own, for the one that lowered a program runs it slower. Writes FOLDER/DxR.pte: x [T, D] and y [T, D],
T dynamic, through CHAIN modules with the same weights, which FOLDER/DxR.npz holds: a [R, D], b [D, R].
"""

import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from lordba.console import quiet_libraries


class Chain(nn.Module):
    """y + chain * B A x, one module after the other."""

    def __init__(self, a: Tensor, b: Tensor, chain: int) -> None:
        super().__init__()
        self.a, self.b, self.chain = nn.Parameter(a), nn.Parameter(b), chain

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for _ in range(self.chain):
            y = y + nn.functional.linear(nn.functional.linear(x, self.a), self.b)
        return y


def export(d: int, weights: dict[str, Tensor], chain: int, most_tokens: int) -> bytes:
    """The program's bytes."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    example = (torch.zeros(2, d), torch.zeros(2, d))
    tokens = torch.export.Dim("tokens", min=1, max=most_tokens)
    program = torch.export.export(
        Chain(weights["a"], weights["b"], chain).eval(), example, dynamic_shapes=({0: tokens}, {0: tokens})
    )
    return to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch().buffer


def main() -> None:
    folder, chain, most_tokens = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    for shape in sys.argv[4:]:
        d = int(shape.split("x")[0])
        weights = {name: torch.from_numpy(array) for name, array in np.load(folder / f"{shape}.npz").items()}
        (folder / f"{shape}.pte").write_bytes(export(d, weights, chain, most_tokens))


if __name__ == "__main__":
    quiet_libraries()
    main()
