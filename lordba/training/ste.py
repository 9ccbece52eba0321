"""Training through signs: latents of a LoRA's shape, the scales that they imply, and a backward pass that keeps only x.

The forward pass sees env(M) = sign(M) * p q^T / mean|M| in place of a latent M, with p and q the row and column means
of |M|; the backward pass treats env as the identity (straight-through). There is nothing to train beside A and B, and
env(M) = M where |M| has rank one, as for an M that was read from an adapter. LoRDBA (arXiv 2605.24058).
"""

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lordba.ops import signed_product


def envelope(latent: Tensor) -> tuple[Tensor, Tensor]:
    """(p, q) of a latent [n, k]: row means [n] and column means over the mean [k] of |latent|, at least float32.

    sign(latent) * p q^T is env(latent). A latent of zeros, a new adapter's B, has q = 0.
    """
    size = latent.detach().abs().to(torch.promote_types(latent.dtype, torch.float32))
    p, q = size.mean(1), size.mean(0)
    return p, q / p.mean().clamp_min(torch.finfo(q.dtype).tiny)


def with_signs(size: Tensor, latent: Tensor) -> Tensor:
    """size with the latent's signs, sign(0) = +1; adding 0 makes a negative zero positive."""
    return size.copysign((latent.detach() + 0.0).to(size.dtype))


def implied_scales(a: Tensor, b: Tensor, scaling: float) -> tuple[Tensor, Tensor, Tensor]:
    """s_in [d_in], s_mid [r], s_out [d_out] of latents A [r, d_in] and B [d_out, r]: what a packed adapter holds."""
    p_a, q_a = envelope(a)
    p_b, q_b = envelope(b)
    return q_a, p_a * q_b, p_b * scaling


def effective_factors(a: Tensor, b: Tensor, scaling: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """env(A) [r, d_in] and scaling * env(B) [d_out, r] in the dtype of the products that they are for."""
    p_a, q_a = envelope(a)
    p_b, q_b = envelope(b)
    right, left = with_signs(torch.outer(p_a, q_a), a), with_signs(torch.outer(p_b, q_b), b)
    return right.to(dtype), left.mul_(scaling).to(dtype)


class _AddSigned(Function):
    """base + scaling * env(B) env(A) x; the gradient is that of a LoRA whose factors are the envelopes.

    Saved for the backward pass: x itself, which layers with one input share, and references to the latents. The
    rank-r activations are computed again there: 1/6 of the adapter's products, against r / d_in of its memory.
    """

    @staticmethod
    def forward(ctx, base: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, a, b)
        ctx.scaling, ctx.dtype = scaling, dtype
        with torch.autocast(x.device.type, enabled=False):
            if dtype in (torch.float32, torch.float64):
                of_a, of_b = (with_signs(torch.ones_like(m, dtype=dtype), m) for m in (a, b))
                delta = signed_product(x, of_a, of_b, *implied_scales(a, b, scaling))
                return base + delta.to(base.dtype)
            right, left = effective_factors(a, b, scaling, dtype)
            h = x.reshape(-1, x.shape[-1]).to(dtype) @ right.t()
            flat = base.reshape(-1, base.shape[-1])
            return torch.addmm(flat, h.to(base.dtype), left.t().to(base.dtype)).view(base.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, a, b = ctx.saved_tensors
        dtype = ctx.dtype
        grad_x = grad_a = grad_b = None
        with torch.autocast(x.device.type, enabled=False):
            right, left = effective_factors(a, b, ctx.scaling, dtype)
            rows, grads = x.reshape(-1, x.shape[-1]).to(dtype), grad.reshape(-1, grad.shape[-1]).to(dtype)
            grad_h = grads @ left
            if ctx.needs_input_grad[1]:
                grad_x = (grad_h @ right).to(x.dtype).view(x.shape)
            if ctx.needs_input_grad[2]:
                grad_a = (grad_h.t() @ rows).to(a.dtype)
            if ctx.needs_input_grad[3]:
                grad_b = (grads.t() @ (rows @ right.t())).mul_(ctx.scaling).to(b.dtype)
        return grad, grad_x, grad_a, grad_b, None, None


def add_signed(base: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float, exact: bool) -> Tensor:
    """base [..., d_out] plus the term of latents A [r, d_in] and B [d_out, r] at x [..., d_in].

    exact: compute as lordba::sign_adapter does, in float32 (or x's float64), so that the result is bit for bit that of
    the packed adapter with fp32 scales. Otherwise products run in autocast's dtype or x's own.
    """
    dtype = torch.promote_types(x.dtype, torch.float32) if exact else x.dtype
    if not exact and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    return _AddSigned.apply(base, x, a, b, scaling, dtype)


class _Frozen(Function):
    """A frozen layer whose own backward pass is missing or wrong: the gradient goes through its weight."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: nn.Linear) -> Tensor:
        ctx.layer = layer
        return layer(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return grad @ dense_weight(ctx.layer, grad.dtype), None


def is_quantized(layer: nn.Module) -> bool:
    """True for a linear layer whose weight is one of torchao's quantized tensors."""
    return isinstance(layer, nn.Linear) and type(layer.weight).__module__.startswith("torchao.")


def frozen_linear(x: Tensor, layer: nn.Module) -> Tensor:
    """layer(x) of a quantized frozen layer with the gradient g W, W its weight [d_out, d_in] as it stands.

    torchao's int4 kernels have no backward pass, and rounding dynamic activations has a zero one.
    """
    return _Frozen.apply(x, layer)


@torch.no_grad()
def dense_weight(layer: nn.Linear, dtype: torch.dtype) -> Tensor:
    """The weight [d_out, d_in] that a quantized layer multiplies with; asked of the layer where torchao cannot say."""
    try:
        return layer.weight.dequantize().to(dtype)
    except (AttributeError, NotImplementedError, RuntimeError):
        one_hot = torch.eye(layer.in_features, dtype=layer.weight.dtype, device=layer.weight.device)
        rows = layer(one_hot) if layer.bias is None else layer(one_hot) - layer.bias
        return rows.t().to(dtype)
