"""The last steps of a conversion, with the scale code known: gauge, refit of each scale vector, signs, stored form.

Each step but the last lowers (or keeps) the Frobenius error with all else fixed. Everything is float64.
"""

from dataclasses import replace

import torch
from torch import Tensor

from lordba.adapter import SignModule
from lordba.conversion.admm import LowRank, SignFactors, relative_error, signs
from lordba.scales import ScaleCode, decode_scales, encode_scales
from lordba.signs import pack_signs

ROUNDS = 2
# What the error's part outside the update's own row and column spaces counts for at the end: see docs/method.md.
NOISE_WEIGHT = 0.05
_TINY = torch.finfo(torch.float64).tiny
# What log4 may give up at the ends of a vector, as quantiles, so that the levels between lie closer together.
_LOWEST = (0.0, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15)
_HIGHEST = (1.0, 0.995, 0.98, 0.95)


def refit(target: LowRank, factors: SignFactors, code: ScaleCode, noise_weight: float = NOISE_WEIGHT) -> SignFactors:
    """Fit scales that the code can hold, and the signs once more to these scales; in the file's gauge.

    noise_weight in (0, 1]: what errors outside the update's row and column spaces count for in the last step.
    """
    factors = fix_gauge(_refit_scales(target, factors, code=None))
    for _ in range(ROUNDS):
        factors = _refit_scales(target, factors, code)
        factors = _refit_signs(target, factors)
        factors = _refit_signs(target.flipped, factors.flipped).flipped
    least = fix_gauge(_refit_scales(target, factors, code))
    found = fix_gauge(_unshrunk(target, least, code, noise_weight))
    useful = relative_error(target, found) < 1  # a rank that is far too low leaves little but noise to enlarge
    for name in SignFactors.__annotations__:
        getattr(found, name)[~useful] = getattr(least, name)[~useful]
    return found


def store(factors: SignFactors, code: ScaleCode) -> list[SignModule]:
    """The layers of a batch in the form that files hold."""
    return [
        SignModule(
            a_signs=pack_signs(right.mT),
            b_signs=pack_signs(left),
            s_in=encode_scales(s_in, code),
            s_mid=encode_scales(s_mid, code),
            s_out=encode_scales(s_out, code),
        )
        for left, right, s_out, s_mid, s_in in zip(
            factors.left, factors.right, factors.s_out, factors.s_mid, factors.s_in, strict=True
        )
    ]


def fix_gauge(factors: SignFactors) -> SignFactors:
    """Share the magnitude, so that fp16 holds it: the largest s_out and s_mid become one power of two, s_in's is near.

    Scaling one vector up and another down changes nothing in the product. Powers of two survive every scale code, so
    a LoRA written from an adapter converts back to the very same scales.
    """
    out, mid, within = (s.amax(-1, keepdim=True) for s in (factors.s_out, factors.s_mid, factors.s_in))
    zero = (out == 0) | (mid == 0) | (within == 0)
    out, mid, within = (torch.where(zero, 1.0, peak) for peak in (out, mid, within))
    peak = torch.exp2(((out.log2() + mid.log2() + within.log2()) / 3).round())
    return replace(
        factors,
        s_out=torch.where(zero, 0.0, factors.s_out / out * peak),
        s_mid=torch.where(zero, 0.0, factors.s_mid / mid * peak),
        s_in=torch.where(zero, 0.0, factors.s_in * (out / peak) * (mid / peak)),
    )


def _refit_scales(target: LowRank, factors: SignFactors, code: ScaleCode | None) -> SignFactors:
    """Least squares for s_mid, s_out and s_in in turn, each rounded to what the code holds before the next."""
    s_mid, weight = _best_mid(target, factors)
    factors = replace(
        factors, left=factors.left * signs(s_mid)[:, None], s_mid=_rounded(s_mid.abs(), weight, code, factors.s_mid)
    )
    s_out, weight = _best_rows(target, factors)
    factors = replace(
        factors, left=factors.left * signs(s_out)[..., None], s_out=_rounded(s_out.abs(), weight, code, factors.s_out)
    )
    s_in, weight = _best_rows(target.flipped, factors.flipped)
    return replace(factors, right=factors.right * signs(s_in)[..., None], s_in=_rounded(s_in.abs(), weight, code, None))


def _unshrunk(target: LowRank, factors: SignFactors, code: ScaleCode, noise_weight: float) -> SignFactors:
    """s_mid and the size of the whole once more, errors outside the target's row and column spaces counting little.

    Least squares shrinks what it cannot fit: with a relative error e, 1 - e^2 of the update's size is left. Shrinkage
    adds up over a model's layers, noise outside those spaces averages out.
    """
    gram, wanted = _normal_equations(target, factors, noise_weight)
    s_mid, weight = _solved(gram, wanted, factors.s_mid)
    factors = replace(
        factors, left=factors.left * signs(s_mid)[:, None], s_mid=_rounded(s_mid.abs(), weight, code, factors.s_mid)
    )
    gram, wanted = _normal_equations(target, factors, noise_weight)
    overlap = (factors.s_mid * wanted).sum(-1)
    size = (factors.s_mid * (gram @ factors.s_mid[..., None])[..., 0]).sum(-1)
    gain = torch.where((overlap > 0) & (size > 0), overlap / size.clamp_min(_TINY), 1.0)
    return replace(factors, s_in=_stored(factors.s_in * gain[:, None], code))


def _normal_equations(target: LowRank, factors: SignFactors, noise_weight: float = 1.0) -> tuple[Tensor, Tensor]:
    """Gram matrix [m, k, k] and right side [m, k] of least squares for s_mid.

    noise_weight: what errors outside the target's row and column spaces count for.
    """
    left, right = factors.left * factors.s_out[..., None], factors.right * factors.s_in[..., None]
    gram = (left.mT @ left) * (right.mT @ right)
    wanted = ((left.mT @ target.left) * (right.mT @ target.right)).sum(-1)
    if noise_weight < 1:
        left, right = torch.linalg.qr(target.left)[0].mT @ left, torch.linalg.qr(target.right)[0].mT @ right
        gram = noise_weight * gram + (1 - noise_weight) * (left.mT @ left) * (right.mT @ right)
    return gram, wanted


def _best_mid(target: LowRank, factors: SignFactors) -> tuple[Tensor, Tensor]:
    """s_mid [m, k] that minimises the error, and the weight of each of its elements."""
    return _solved(*_normal_equations(target, factors), factors.s_mid)


def _solved(gram: Tensor, wanted: Tensor, s_mid: Tensor) -> tuple[Tensor, Tensor]:
    """The solution near the present s_mid, and the weight of each of its elements."""
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    # Equal or opposite columns make the Gram matrix singular; a ridge of 1e-9 shares the scale between them.
    ridge = (1e-9 * diagonal.mean(-1)).clamp_min(_TINY)[:, None, None] * torch.eye(gram.shape[-1], dtype=gram.dtype)
    # Correcting the present scales, not solving anew, leaves an exact fit exact in spite of the ridge.
    change = torch.linalg.solve(gram + ridge, wanted - (gram @ s_mid[..., None])[..., 0])
    return torch.where(diagonal > 0, s_mid + change, 0.0), diagonal


def _best_rows(target: LowRank, factors: SignFactors) -> tuple[Tensor, Tensor]:
    """s_out [m, d_out] that minimises the error, every row by itself, and the weight of each row."""
    right = factors.right * (factors.s_in[..., None] * factors.s_mid[:, None])
    wanted = (target.left @ (target.right.mT @ right) * factors.left).sum(-1)
    weight = (factors.left @ (right.mT @ right) * factors.left).sum(-1)
    return wanted / weight.clamp_min(_TINY), weight


def _refit_signs(target: LowRank, factors: SignFactors) -> SignFactors:
    """Set each column of the left signs to what is best with all others fixed."""
    right = factors.right * (factors.s_in[..., None] * factors.s_mid[:, None])
    gram = right.mT @ right
    wanted = target.left @ (target.right.mT @ right)
    left, scale = factors.left.clone(), factors.s_out
    for k in range(left.shape[-1]):
        own = left[..., k] * gram[:, k, k, None]
        left[..., k] = signs(wanted[..., k] - scale * ((left @ gram[:, :, k, None])[..., 0] - own))
    return replace(factors, left=left)


def _rounded(scales: Tensor, weight: Tensor, code: ScaleCode | None, before: Tensor | None) -> Tensor:
    """The scales [m, n] as the code holds them; their largest stays that of `before`, which the gauge fixed."""
    if code is None:
        return scales
    if code is ScaleCode.LOG4:
        scales = _clipped(scales, weight)
    if before is not None:
        largest = scales.amax(-1, keepdim=True)
        scales = scales / torch.where(largest > 0, largest, 1.0) * before.amax(-1, keepdim=True)
    return _stored(scales, code)


def _stored(scales: Tensor, code: ScaleCode) -> Tensor:
    """The scales [m, n] as they come back from a file."""
    return torch.stack([decode_scales(encode_scales(row, code)).double() for row in scales])


def _clipped(scales: Tensor, weight: Tensor) -> Tensor:
    """Pull outliers in where that lowers the weighted squared error of log4's 15 levels between lo and hi."""
    positive = torch.where(scales > 0, scales, torch.nan)
    log = positive.log()
    lowest, highest = (log.nanquantile(scales.new_tensor(q), dim=-1)[..., None] for q in (_LOWEST, _HIGHEST))
    best, best_error = scales, torch.full_like(scales[:, :1], torch.inf)
    for lo in lowest:
        for hi in highest:
            step = ((hi - lo) / 14).clamp_min(_TINY)
            level = ((log - lo) / step).round().clamp(0, 14)
            error = (weight * ((lo + level * step).exp() - positive).square()).nansum(-1, keepdim=True)
            clipped = log.clamp(lo, hi).exp()
            better = error < best_error
            best = torch.where(better & (scales > 0), clipped, best)
            best_error = torch.where(better, error, best_error)
    return best
