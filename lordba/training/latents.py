"""Between latents, which are trained, and the signs and scales that an adapter folder holds."""

import torch
from torch import Tensor

from lordba.adapter import SignModule
from lordba.lora import LoraModule
from lordba.scales import ScaleCode, encode_scales
from lordba.signs import pack_signs
from lordba.training.ste import implied_scales, with_signs

# Of a latent that starts from a LoRA, in envelopes: no sign is free, none is fixed.
SIZES = (0.05, 3.0)
_ENVELOPE_STEPS = 50
_TINY = torch.finfo(torch.float32).tiny


def to_module(a: Tensor, b: Tensor, scaling: float) -> SignModule:
    """What latents A [r, d_in] and B [d_out, r] compute, with fp32 scales: the same bits as the trained layer's."""
    a, b = a.detach().cpu(), b.detach().cpu()
    s_in, s_mid, s_out = (encode_scales(s, ScaleCode.FP32) for s in implied_scales(a, b, scaling))
    return SignModule(pack_signs(a), pack_signs(b), s_in, s_mid, s_out)


def to_stored(a: Tensor, b: Tensor, code: ScaleCode) -> SignModule:
    """The direct form: the latents' own signs, and their implied scales as the code holds them, with no refit.

    What a device packs (backends/training/pack.c), bit for bit. A [r, d_in], B [d_out, r], scaling 1.
    """
    (p_a, q_a), (p_b, q_b) = direct_envelope(a), direct_envelope(b)
    s_in, s_mid, s_out = (encode_scales(s, code) for s in (q_a, p_a * q_b, p_b))
    return SignModule(pack_signs(a), pack_signs(b), s_in, s_mid, s_out)


def direct_envelope(latent: Tensor) -> tuple[Tensor, Tensor]:
    """ste.envelope in float32, by float64 sums in the order of their indices, which every language can repeat."""
    size = latent.detach().cpu().float().abs().double()
    rows, columns = size.shape
    of_rows, of_columns, total = torch.zeros(rows).double(), torch.zeros(columns).double(), 0.0
    for column in size.T.contiguous():
        of_rows += column
    for row in size:
        of_columns += row
    for value in of_rows.tolist():
        total += value
    mean = max(total / (rows * columns), _TINY)
    return (of_rows / columns).float(), (of_columns / rows / mean).float()


def direct_factors(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """env(A) [r, d_in] and env(B) [d_out, r] by `direct_envelope`, with which a device trains."""
    (p_a, q_a), (p_b, q_b) = direct_envelope(a), direct_envelope(b)
    return with_signs(torch.outer(p_a, q_a), a), with_signs(torch.outer(p_b, q_b), b)


def to_latents(module: SignModule, lora: LoraModule | None = None) -> tuple[Tensor, Tensor]:
    """Latents A [r, d_in] and B [d_out, r], float32, that compute with a scaling of 1 what the adapter computes.

    Both are of equal size in each rank, so that one learning rate suits both. All signs of a factor are equally far
    from a flip, but with the LoRA that the adapter was made of the nearer, the less its update needs them
    (docs/method.md, section 5).
    """
    b, a = module.factors()
    of_b, of_a = b.norm(dim=0), a.norm(dim=1)
    balance = torch.where((of_a > 0) & (of_b > 0), (of_b / of_a).sqrt(), 1.0)
    a, b = a * balance[:, None], b / balance
    if lora is not None:
        left, right = lora.factors()
        a, b = _sized(a.T, b, right.T, left).T, _sized(b, a.T, left, right.T)
    return a.float().contiguous(), b.float()


def _sized(factor: Tensor, other: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """A factor [n, k] of equal sizes p q^T with sizes of its own for each sign, and the same envelope.

    In envelopes, a size is what the element would be that brings factor other^T nearest to left right^T, all others
    kept, within SIZES.
    """
    size = factor.abs()
    missing = left @ (right.T @ other) - factor @ (other.T @ other)
    change = missing / other.square().sum(0).clamp_min(_TINY)
    weight = ((factor + change) * factor.sign() / size.clamp_min(_TINY)).clamp(*SIZES)
    for _ in range(_ENVELOPE_STEPS):
        for dim in (0, 1):
            means = size.sum(dim, keepdim=True) / (size * weight).sum(dim, keepdim=True).clamp_min(_TINY)
            weight = weight * means
    return factor * weight
