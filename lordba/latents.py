"""Between latents, which are trained, and the signs and scales that an adapter folder holds."""

import torch
from torch import Tensor

from lordba.adapter import SignModule
from lordba.scales import ScaleCode, encode_scales
from lordba.signs import pack_signs
from lordba.ste import implied_scales


def to_module(a: Tensor, b: Tensor, scaling: float) -> SignModule:
    """What latents A [r, d_in] and B [d_out, r] compute, with fp32 scales: the same bits as the trained layer's."""
    a, b = a.detach().cpu(), b.detach().cpu()
    s_in, s_mid, s_out = (encode_scales(s, ScaleCode.FP32) for s in implied_scales(a, b, scaling))
    return SignModule(pack_signs(a), pack_signs(b), s_in, s_mid, s_out)


def to_latents(module: SignModule) -> tuple[Tensor, Tensor]:
    """Latents A [r, d_in] and B [d_out, r], float32, that compute with a scaling of 1 what the adapter computes.

    Both are of equal size in each rank, so that one learning rate suits both.
    """
    b, a = module.factors()
    of_b, of_a = b.norm(dim=0), a.norm(dim=1)
    balance = torch.where((of_a > 0) & (of_b > 0), (of_b / of_a).sqrt(), 1.0)
    return (a * balance[:, None]).float(), (b / balance).float()
