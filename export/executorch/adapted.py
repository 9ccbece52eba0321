"""Linear layers with a place for an adapter: what a captured program is made of."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from lordba import ops  # noqa: F401 (registers lordba::sign_adapter)
from lordba.adapter import Adapter, SignModule
from lordba.blob import blob_bytes, make_blob

BLOB_ALIGNMENT = 64


class AdapterSlot(nn.Module):
    """Where a program finds its adapter: a constant of its own, or an input of this forward call.

    `paths` is the order of modules in the blob; None marks a layer that shares an op with an adapted one.
    """

    blob: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.paths: list[str | None] = []
        self.register_buffer("blob", None)

    def register(self, paths: Iterable[str | None]) -> int:
        """Reserve places for the layers of one op; returns the first place."""
        first = len(self.paths)
        self.paths += paths
        return first

    def arrange(self, adapter: Adapter | None) -> list[SignModule | None]:
        """An adapter's modules in the program's order; no adapter is None everywhere."""
        return [adapter.modules.get(path) if adapter and path else None for path in self.paths]

    def size_for(self, adapters: Sequence[Adapter | None]) -> int:
        """Bytes of the largest blob among these adapters, rounded up to the alignment."""
        largest = max(blob_bytes(self.arrange(adapter)) for adapter in adapters)
        return -(-largest // BLOB_ALIGNMENT) * BLOB_ALIGNMENT

    def blob_of(self, adapter: Adapter | None, size: int | None = None) -> Tensor:
        """The adapter as this program reads it, uint8 [size]; without `size`, just as long as it needs to be."""
        if size is None:
            size = self.size_for([adapter])
        return make_blob(self.arrange(adapter), size)


class AdaptedLinear(nn.Module):
    """One linear layer, or several that share x with their outputs side by side, plus their adapters in one op.

    The op adds to the linear's output where more custom ops follow (q/k/v, gate/up). Where the result is added to a
    residual stream, the op adds to that, before the linear: the delegate then adds two tensors, as it does without
    an adapter, and no partition is cut.
    """

    def __init__(self, linear: nn.Module, d_in: int, d_outs: Sequence[int]) -> None:
        super().__init__()
        self.linear = linear
        self.d_in = d_in
        self.d_outs = list(d_outs)
        self._slot: AdapterSlot | None = None
        self._first = 0

    def adapt(self, slot: AdapterSlot, paths: Sequence[str], adapted: set[str]) -> None:
        """Take places in the slot if any of the layers, named by path, is to be adapted."""
        if adapted.intersection(paths):
            object.__setattr__(self, "_slot", slot)  # not a child: the slot belongs to the whole program
            self._first = slot.register(path if path in adapted else None for path in paths)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [1, T, d_in], or [1, T, heads, head_dim] as attention leaves it -> [1, T, sum(d_outs)], plus `residual`."""
        rows = x if x.shape[-1] == self.d_in else x.view(1, -1, self.d_in)
        if self._slot is None:
            return self.linear(rows) if residual is None else residual + self.linear(rows)
        arguments = (self._slot.blob, self._first, self.d_in, self.d_outs)
        if residual is None:
            return torch.ops.lordba.sign_adapter.blob(x, *arguments, self.linear(rows))
        return torch.ops.lordba.sign_adapter.blob(x, *arguments, residual) + self.linear(rows)
