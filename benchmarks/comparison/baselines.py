"""Other ways to store a LoRA in few bits, each as the tensors that a file would hold and the factors decoded from them.

Groups run along the long side of a factor: the rows of A, the columns of B (LoRAQuant's choice, and the better one).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from lordba.lora import LoraModule

GROUP = 64
LORAQUANT_GROUP, LORAQUANT_RATIO, LORAQUANT_BITS = 128, 0.8, 2
ROUNDS = 10


@dataclass(frozen=True)
class Compressed:
    """One module: what is stored, and what it stands for: b [d_out, k] and a [k, d_in], float64, with the scaling."""

    stored: dict[str, Tensor]
    b: Tensor
    a: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(tensor.nbytes for tensor in self.stored.values())


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes below 2^bits, bits in 1, 2, 4, 8, to uint8, the first in the lowest bits; padded with zeros to a byte."""
    per_byte = 8 // bits
    flat = codes.flatten().to(torch.int32)
    groups = pad(flat, (0, -len(flat) % per_byte)).view(-1, per_byte)
    return (groups << (bits * torch.arange(per_byte, dtype=torch.int32))).sum(1).to(torch.uint8)


def unpack_codes(packed: Tensor, bits: int, n: int) -> Tensor:
    """The first n codes, int64."""
    shifts = bits * torch.arange(8 // bits, dtype=torch.int32)
    return ((packed.to(torch.int32)[:, None] >> shifts) & (2**bits - 1)).flatten()[:n].long()


def round_to_nearest(matrix: Tensor, bits: int, group: int = GROUP) -> tuple[dict[str, Tensor], Tensor]:
    """Rows [k, n] in groups: what is stored and its value, float64.

    1 bit: signs times the group's mean magnitude. More: levels between the group's least and largest value. Scales (and
    least values) are fp16.
    """
    k, n = matrix.shape
    width = -(-n // group) * group
    # A short last group repeats its last value, which changes neither its least nor its largest one.
    groups = pad(matrix[:, None].double(), (0, width - n), mode="replicate")[:, 0].view(-1, group)
    if bits == 1:
        counted = pad(torch.ones(k, n, dtype=torch.float64), (0, width - n)).view(-1, group)
        scale = ((groups.abs() * counted).sum(1, keepdim=True) / counted.sum(1, keepdim=True)).half()
        codes, least = (groups < 0).long(), None
    else:
        least = groups.amin(1, keepdim=True).half()
        step = (groups.amax(1, keepdim=True) - least.double()) / (2**bits - 1)
        scale = step.half()
        safe = torch.where(scale > 0, scale.double(), 1.0)
        codes = ((groups - least.double()) / safe).round().clamp(0, 2**bits - 1).long()
    stored = {"codes": pack_codes(codes.view(k, width)[:, :n], bits), "scale": scale.flatten()}
    if least is not None:
        stored["least"] = least.flatten()
    value = scale.double() * (1 - 2 * codes) if least is None else scale.double() * codes + least.double()
    return stored, value.view(k, width)[:, :n]


def rtn(module: LoraModule, bits: int, group: int = GROUP) -> Compressed:
    """Round to nearest in groups, both factors with the same bits, the scaling in B."""
    b, a = module.factors()
    of_b, left = round_to_nearest(b.T, bits, group)
    of_a, right = round_to_nearest(a, bits, group)
    return Compressed(_named(b=of_b, a=of_a), left.T, right)


def loraquant(
    module: LoraModule, ratio: float = LORAQUANT_RATIO, bits: int = LORAQUANT_BITS, group: int = LORAQUANT_GROUP
) -> Compressed:
    """LoRAQuant (arXiv 2510.26690): the SVD's first components in `bits`, the others in one bit.

    The first h explain `ratio` of the squared singular values. Each of them is refined so that the product of its
    rounded vectors nears the component; here by alternating least squares, in the paper by gradient steps.
    """
    b, a = svd_gauge(*module.factors())
    energy = (b.norm(dim=0) * a.norm(dim=1)).square()
    share = energy.cumsum(0) / energy.sum().clamp_min(torch.finfo(energy.dtype).tiny)
    high = min(int((share < ratio).sum()) + 1, len(energy))
    of_b, left, of_a, right = _refined(b[:, :high].T, a[:high], bits, group)
    stored, lefts, rights = _named(high_b=of_b, high_a=of_a), [left], [right]
    if high < len(energy):
        of_b, left = round_to_nearest(b[:, high:].T, 1, group)
        of_a, right = round_to_nearest(a[high:], 1, group)
        stored |= _named(low_b=of_b, low_a=of_a)
        lefts, rights = [*lefts, left], [*rights, right]
    return Compressed(stored, torch.cat(lefts).T, torch.cat(rights))


def svd_gauge(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """B [d_out, r] and A [r, d_in] as U sqrt(S) and sqrt(S) V^T of their product, largest first."""
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T)
    return q_b @ u * s.sqrt(), (q_a @ vh.T * s.sqrt()).T


def _refined(
    b: Tensor, a: Tensor, bits: int, group: int
) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor], Tensor]:
    """Pairs of rows b [h, d_out] and a [h, d_in] rounded, each given the other; the best of all rounds by pair."""

    def rounding(matrix: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        return round_to_nearest(matrix, bits, group)

    wanted_b, wanted_a = b.clone(), a.clone()
    best_b, best_a = b.clone(), a.clone()
    best = torch.full((len(b),), torch.inf, dtype=b.dtype)
    (_, left), (_, right) = rounding(b), rounding(a)
    for _ in range(ROUNDS):
        overlap = (b * left).sum(1) * (a * right).sum(1)
        size = left.square().sum(1) * right.square().sum(1)
        error = b.square().sum(1) * a.square().sum(1) - 2 * overlap + size
        better = error < best
        best = torch.where(better, error, best)
        best_b[better], best_a[better] = wanted_b[better], wanted_a[better]
        wanted_a = a * ((b * left).sum(1) / left.square().sum(1).clamp_min(1e-300))[:, None]
        right = rounding(wanted_a)[1]
        wanted_b = b * ((a * right).sum(1) / right.square().sum(1).clamp_min(1e-300))[:, None]
        left = rounding(wanted_b)[1]
    return *rounding(best_b), *rounding(best_a)


def _named(**parts: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}
