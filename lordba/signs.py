"""Sign bits: 8 per byte, row-major, least significant bit first, bit 1 = -1, sign(0) = +1, padding bits 0."""

import torch
from torch import Tensor

from lordba.errors import LordbaError

_BIT = torch.arange(8, dtype=torch.uint8)


def packed_width(columns: int) -> int:
    """Bytes per row of a packed sign matrix with that many columns."""
    return (columns + 7) // 8


def pack_signs(matrix: Tensor) -> Tensor:
    """Pack the signs of a float matrix [n, k] into uint8 [n, ceil(k/8)]; NaN has no sign and is an error."""
    if matrix.isnan().any():
        raise LordbaError("cannot pack signs: the matrix holds NaN; check the training or conversion that made it")
    rows, columns = matrix.shape
    negative = (matrix < 0).to(torch.uint8)
    negative = torch.nn.functional.pad(negative, (0, 8 * packed_width(columns) - columns))
    return (negative.view(rows, -1, 8) << _BIT).sum(-1, dtype=torch.uint8)


def unpack_signs(packed: Tensor, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Expand uint8 [n, ceil(k/8)] into a [n, k] matrix of +1 and -1."""
    bits = (packed.unsqueeze(-1) >> _BIT.to(packed.device)) & 1
    return 1 - 2 * bits.reshape(packed.shape[0], -1)[:, :columns].to(dtype)


def has_clean_padding(packed: Tensor, columns: int) -> bool:
    """True if the bits past the last column are zero in every row, as the format demands."""
    used = columns % 8
    return used == 0 or packed.numel() == 0 or not bool((packed[:, -1] >> used).any())
