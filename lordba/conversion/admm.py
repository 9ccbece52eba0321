"""Low-rank factors to signs and scales: ADMM on the factors, a batch of equal-shaped layers at a time.

The target is left right^T with left = B [m, d_out, r] and right = A^T [m, d_in, r]; both factors are tall, and every
step is the same for either. The product, d_out x d_in, is never formed. A factor that LoRDBA can hold is
signs * p q^T: one scale per row, one per column (Double Binary Factorization, arXiv 2505.11076; LoRDBA, 2605.24058).
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

ITERATIONS = 250
# Penalty, in mean squared column norms of the fixed factor: small first to explore, then large to settle.
FIRST_PENALTY, LAST_PENALTY = 0.1, 1.0
# Factors this close to LoRDBA's form already need no search (which would crawl through denormal numbers for them).
_EXACT = 1e-3


@dataclass(frozen=True)
class LowRank:
    """Products left right^T of a batch of layers: left [m, d_out, k], right [m, d_in, k]."""

    left: Tensor
    right: Tensor

    @property
    def flipped(self) -> "LowRank":
        """The transposed products."""
        return LowRank(self.right, self.left)


@dataclass(frozen=True)
class SignFactors:
    """left [m, d_out, k] and right [m, d_in, k] of +1 and -1; s_out [m, d_out], s_mid [m, k], s_in [m, d_in] >= 0."""

    left: Tensor
    right: Tensor
    s_out: Tensor
    s_mid: Tensor
    s_in: Tensor

    @property
    def flipped(self) -> "SignFactors":
        """The transposed products: left and right, s_out and s_in change places."""
        return SignFactors(self.right, self.left, self.s_in, self.s_mid, self.s_out)

    @property
    def product(self) -> LowRank:
        """The factors with their scales applied."""
        return LowRank(self.left * self.s_out[..., None], self.right * (self.s_in[..., None] * self.s_mid[:, None]))


def to_signs(target: LowRank, rank: int, iterations: int = ITERATIONS) -> tuple[SignFactors, Tensor]:
    """Signs and float64 scales of the given rank near `target`, and the target's own rho [m, 2], of left and right.

    Where the target's factors as they stand (their own gauge) do better than ADMM's result, these are taken: a LoRA
    that already has LoRDBA's form comes out exact.
    """
    norms = [_norm(factor) for factor in (target.left, target.right)]
    unit = LowRank(target.left / norms[0], target.right / norms[1])
    best = round_factors(unit, rank)
    own_error = relative_error(unit, best)
    searched = (own_error > _EXACT).nonzero()[:, 0]
    if searched.numel():
        part = LowRank(unit.left[searched], unit.right[searched])
        found = _signs_of(_admm(LowRank(part.left.float(), part.right.float()), rank, iterations))
        better = relative_error(part, found) < own_error[searched]
        for name in SignFactors.__annotations__:
            getattr(best, name)[searched[better]] = getattr(found, name)[better]
    rho = torch.stack([_rho(unit.left), _rho(unit.right)], dim=-1)
    return replace(best, s_in=best.s_in * (norms[0] * norms[1])[..., 0]), rho


def round_factors(target: LowRank, rank: int) -> SignFactors:
    """The target's factors as they stand, cut or filled up to the rank and each rounded to signs * p q^T (SVID)."""
    factors = [torch.nn.functional.pad(f, (0, rank - f.shape[-1])) for f in (target.left, target.right)]
    return _signs_of(LowRank(*(_rounded(f) for f in factors)))


def relative_error(target: LowRank, factors: SignFactors) -> Tensor:
    """||target - factors||_F / ||target||_F of each layer [m], from k x k Gram matrices; 0 where both are 0."""
    product = factors.product
    size, overlap, found = (_inner(a, b) for a, b in ((target, target), (target, product), (product, product)))
    return ((size - 2 * overlap + found).clamp_min(0) / size.clamp_min(torch.finfo(size.dtype).tiny)).sqrt()


def signs(matrix: Tensor) -> Tensor:
    """+1 or -1 of the same dtype; sign(0) = +1, as in the format."""
    return torch.where(matrix < 0, -1.0, 1.0).to(matrix.dtype)


def _admm(target: LowRank, rank: int, iterations: int) -> LowRank:
    """The nearest products found whose factors have the form signs * p q^T."""
    z = _balanced(target, rank)
    q_left = q_right = z.left.new_ones(z.left.shape[0], rank)
    left, _, q_left = _project(z.left, q_left, power_steps=3)
    right, _, q_right = _project(z.right, q_right, power_steps=3)
    u_left, u_right = torch.zeros_like(left), torch.zeros_like(right)
    for i in range(iterations):
        penalty = FIRST_PENALTY + (LAST_PENALTY - FIRST_PENALTY) * i / iterations
        left, u_left, q_left = _step(target, left, u_left, right, q_left, penalty)
        right, u_right, q_right = _step(target.flipped, right, u_right, left, q_right, penalty)
    return LowRank(left, right)


def _step(
    target: LowRank, z: Tensor, u: Tensor, fixed: Tensor, q: Tensor, penalty: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One ADMM step on the left factor: least squares against the fixed right one, projection, dual update."""
    gram = fixed.mT @ fixed
    weight = penalty * gram.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None].clamp_min(torch.finfo(z.dtype).tiny)
    inverse = torch.linalg.inv(gram + weight * torch.eye(gram.shape[-1], dtype=z.dtype))
    x = target.left @ (target.right.mT @ fixed @ inverse) + (z - u) @ (weight * inverse) + u
    projected, _, q = _project(x, q, power_steps=1)
    return projected, x - projected, q


def _project(matrix: Tensor, q: Tensor, power_steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """(signs * p q^T, p, q): the nearest such matrix in the limit of many power steps, which start from q [m, k]."""
    size = matrix.abs()
    for _ in range(power_steps):
        p = size @ q[..., None]
        p = p / p.norm(dim=-2, keepdim=True).clamp_min(torch.finfo(p.dtype).tiny)
        q = (size.mT @ p)[..., 0]
    p = p[..., 0]
    return torch.copysign(p[..., None] * q[:, None], matrix), p, q


def _balanced(target: LowRank, rank: int) -> LowRank:
    """The best approximation of that rank, its singular values shared by both factors and mixed over all columns."""
    q_left, r_left = torch.linalg.qr(target.left)
    q_right, r_right = torch.linalg.qr(target.right)
    u, s, vh = torch.linalg.svd(r_left @ r_right.mT, full_matrices=False)
    k = min(rank, s.shape[-1])
    mix = s[:, :k, None].sqrt() * cosines(rank, k)
    return LowRank(q_left @ (u[..., :k] @ mix), q_right @ (vh[:, :k].mT @ mix))


def cosines(n: int, rows: int) -> Tensor:
    """The first rows of the orthonormal DCT-II matrix of size n: a rotation that spreads every direction evenly."""
    matrix = torch.cos(math.pi / n * torch.arange(rows)[:, None] * (torch.arange(n) + 0.5)) * math.sqrt(2 / n)
    matrix[0] /= math.sqrt(2)
    return matrix


def _rho(factor: Tensor) -> Tensor:
    """|| |M| - p q^T ||_F / ||M||_F of factors with norm 1 (or 0): [m]."""
    return (factor - _rounded(factor)).flatten(1).norm(dim=1)


def _rounded(factor: Tensor) -> Tensor:
    return _project(factor, factor.new_ones(factor.shape[0], factor.shape[-1]), power_steps=30)[0]


def _signs_of(product: LowRank) -> SignFactors:
    """Signs and scales of factors that have the form signs * p q^T, in float64."""
    left, right = product.left.double(), product.right.double()
    ones = left.new_ones(left.shape[0], left.shape[-1])
    _, p_left, q_left = _project(left, ones, power_steps=5)
    _, p_right, q_right = _project(right, ones, power_steps=5)
    return SignFactors(signs(left), signs(right), p_left, q_left * q_right, p_right)


def _norm(factor: Tensor) -> Tensor:
    """Frobenius norms [m, 1, 1], 1 in place of 0."""
    norm = factor.flatten(1).norm(dim=1)[:, None, None]
    return torch.where(norm > 0, norm, torch.ones_like(norm))


def _inner(a: LowRank, b: LowRank) -> Tensor:
    return ((a.left.mT @ b.left) * (a.right.mT @ b.right)).sum((-1, -2))
