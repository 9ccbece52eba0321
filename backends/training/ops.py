"""The ops of training programs: schemas, eager implementations in plain PyTorch, and fake kernels.

Each layer of a decoder has an op for its forward pass and one for its backward pass; the latter gets what the former
got and computes again what it needs. docs/on-device-training.md.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import Library

from lordba.training.latents import direct_factors

GROUP = 32
IGNORED = -100
_WEIGHT = "Tensor codes, Tensor? scales, Tensor? offsets"
_ATTENTION = (
    "Tensor x, Tensor cos, Tensor sin, Tensor? q_norm, Tensor? k_norm, int heads, int kv_heads, float scale, float eps"
)
_LATENTS = "Tensor latents, int offset, int[] ranks, int[] d_outs"


def pack_int4(codes: Tensor) -> Tensor:
    """Codes 0..15 [n, k] as bytes [n, k/2]: of each group of 32, byte i holds code i (low) and 16 + i (high)."""
    n, k = codes.shape
    low, high = codes.to(torch.uint8).view(n, k // GROUP, 2, GROUP // 2).unbind(2)
    return (low | high << 4).reshape(n, k // 2)


def dense(codes: Tensor, scales: Tensor | None, offsets: Tensor | None) -> Tensor:
    """The frozen weight [n, k], float32, of float values, int8 codes with scales [n, groups], or packed int4 codes.

    int4: scale * (code - 8) + offset with bfloat16 scales and float offsets [n, k/32].
    """
    if scales is None:
        return codes
    if offsets is None:
        n, k = codes.shape
        return (codes.view(n, scales.shape[1], -1) * scales[..., None]).view(n, k)
    n, groups = scales.shape
    pairs = codes.view(n, groups, GROUP // 2)
    values = torch.cat([pairs & 15, pairs >> 4], -1).float() - 8
    return (values * scales.float()[..., None] + offsets[..., None]).view(n, groups * GROUP)


def frozen_rows(tokens: Tensor, codes: Tensor, scales: Tensor | None) -> Tensor:
    """Rows [1, T, k] of a weight [n, k] by tokens int64 [1, T]."""
    return dense(codes, scales, None)[tokens]


def frozen_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor | None,
    offsets: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """x [1, T, k] W^T + bias + residual: [1, T, n]."""
    y = F.linear(x, dense(codes, scales, offsets), bias)
    return y if residual is None else residual + y


def frozen_linear_backward(g: Tensor, codes: Tensor, scales: Tensor | None, offsets: Tensor | None) -> Tensor:
    """g [1, T, n] W: [1, T, k], W the weight with which the forward pass computed."""
    return g @ dense(codes, scales, offsets)


def head_loss(
    x: Tensor, codes: Tensor, scales: Tensor | None, bias: Tensor | None, targets: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """weight [1] * sum of the cross-entropies of x W^T + bias with targets int64 [1, T] (-100: not learned): [1].

    Also its gradient for x, [1, T, k].
    """
    w = dense(codes, scales, None)
    logits = F.linear(x[0], w, bias)
    learned = targets[0] != IGNORED
    loss = F.cross_entropy(logits[learned], targets[0, learned], reduction="sum") * weight
    g = logits.softmax(-1)
    g[learned, targets[0, learned]] -= 1
    return loss, ((g * learned[:, None]) @ w * weight)[None]


def _modules(x: Tensor, latents: Tensor, offset: int, ranks: Sequence[int], d_outs: Sequence[int]):
    """(columns of the output, env(A) [r, d_in], env(B) [d_out, r], places of A and B) of every adapted layer."""
    d_in, column = x.shape[-1], 0
    for r, d_out in zip(ranks, d_outs, strict=True):
        middle, end = offset + r * d_in, offset + r * (d_in + d_out)
        if r:
            a, b = latents[offset:middle].view(r, d_in), latents[middle:end].view(d_out, r)
            yield slice(column, column + d_out), *direct_factors(a, b), slice(offset, middle), slice(middle, end)
        offset, column = end, column + d_out


def latent_adapter(
    x: Tensor, latents: Tensor, offset: int, ranks: Sequence[int], d_outs: Sequence[int], base: Tensor
) -> Tensor:
    """base [1, T, sum(d_outs)] plus env(B) env(A) x [1, T, d_in] of the layers that share x, side by side.

    Latents are flat: A [r, d_in] and B [d_out, r] of each layer follow each other from `offset` on; r = 0 is a layer
    without adapter.
    """
    y = base.clone()
    for columns, a, b, _, _ in _modules(x, latents, offset, ranks, d_outs):
        y[..., columns] += x @ a.t() @ b.t()
    return y


def latent_adapter_backward(
    g: Tensor, x: Tensor, latents: Tensor, offset: int, ranks: Sequence[int], d_outs: Sequence[int], through: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients for x [1, T, d_in], `through` (that of the frozen layer) included, and for the latents, flat.

    env is the identity backward (straight-through, lordba/training/ste.py).
    """
    gx, gl = through.clone(), torch.zeros(_size(x, ranks, d_outs))
    for columns, a, b, of_a, of_b in _modules(x, latents, offset, ranks, d_outs):
        part = g[0, :, columns]
        gh = part @ b
        gx[0] += gh @ a
        gl[of_a.start - offset : of_a.stop - offset] = (gh.t() @ x[0]).flatten()
        gl[of_b.start - offset : of_b.stop - offset] = (part.t() @ (x[0] @ a.t())).flatten()
    return gx, gl


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps), row by row."""
    return weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps))


def rms_norm_backward(g: Tensor, x: Tensor, weight: Tensor, eps: float, add: Tensor | None) -> Tensor:
    """The gradient of x, plus `add`, the gradient that passed beside the norm."""
    gx = _gradient(lambda t: rms_norm(t, weight, eps), x, g)
    return gx if add is None else add + gx


def causal_attention(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    heads: int,
    kv_heads: int,
    scale: float,
    eps: float,
) -> Tensor:
    """Rows q | k | v [1, T, (heads + 2 kv_heads) dim] -> [1, T, heads dim]; head norms and rotation included.

    cos and sin are tables [max_len, dim], the first half of sin negated (see lordba::rope_heads).
    """
    tokens, dim = x.shape[1], cos.shape[1]
    rows = x.view(tokens, heads + 2 * kv_heads, dim).transpose(0, 1)

    def rotated(part: Tensor, norm: Tensor | None) -> Tensor:
        part = part if norm is None else rms_norm(part, norm, eps)
        return part * cos[:tokens] + part.roll(dim // 2, -1) * sin[:tokens]

    q, k, v = rows.split([heads, kv_heads, kv_heads])
    q, k = rotated(q, q_norm), rotated(k, k_norm)
    k, v = (part.repeat_interleave(heads // kv_heads, 0) for part in (k, v))
    hidden = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    weights = (q @ k.mT * scale).masked_fill(hidden, -torch.inf).softmax(-1)
    return (weights @ v).transpose(0, 1).reshape(1, tokens, heads * dim)


def causal_attention_backward(g: Tensor, x: Tensor, *arguments: Any) -> Tensor:
    """The gradient of the rows."""
    return _gradient(lambda t: causal_attention(t, *arguments), x, g)


def swiglu_backward(g: Tensor, gate_up: Tensor) -> Tensor:
    """The gradient of rows [gate | up] [1, T, 2 F] of lordba::swiglu."""
    gate, up = gate_up.chunk(2, -1)
    s = gate.sigmoid()
    return torch.cat([g * up * (s + gate * s * (1 - s)), g * gate * s], -1)


def _gradient(function: Callable[[Tensor], Tensor], x: Tensor, g: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(function(x), x, g)
    return gradient


def _size(x: Tensor, ranks: Sequence[int], d_outs: Sequence[int]) -> int:
    return sum(r * (x.shape[-1] + d_out) for r, d_out in zip(ranks, d_outs, strict=True))


def _rows(x: Tensor, width: int) -> Tensor:
    return x.new_empty([1, x.shape[1], width])


_library = Library("lordba", "FRAGMENT")


def _define(
    name: str, arguments: str, function: Callable[..., Any], fake: Callable[..., Any], outputs: int = 1
) -> None:
    """An op with its `.out` variant, which ExecuTorch's programs call."""
    names = ["out"] if outputs == 1 else [f"out{i}" for i in range(outputs)]
    aliases = [f"Tensor({letter}!)" for letter in "ab"[:outputs]]
    results = "Tensor" if outputs == 1 else "(" + ", ".join(["Tensor"] * outputs) + ")"
    written = aliases[0] if outputs == 1 else "(" + ", ".join(aliases) + ")"
    places = ", ".join(f"{alias} {out}" for alias, out in zip(aliases, names, strict=True))
    _library.define(f"{name}({arguments}) -> {results}")
    _library.define(f"{name}.out({arguments}, *, {places}) -> {written}")

    def write(*args: Any, **kwargs: Any) -> Any:
        outs = [kwargs.pop(out) for out in names]
        found = function(*args, **kwargs)
        made = [
            out.resize_(value.shape).copy_(value)
            for out, value in zip(outs, [found] if outputs == 1 else found, strict=True)
        ]
        return made[0] if outputs == 1 else tuple(made)

    _library.impl(name, function, "CompositeExplicitAutograd")
    _library.impl(name, fake, "Meta")
    _library.impl(f"{name}.out", write, "CompositeExplicitAutograd")


_define(
    "frozen_rows",
    "Tensor tokens, Tensor codes, Tensor? scales",
    frozen_rows,
    lambda tokens, codes, scales: codes.new_empty([1, tokens.shape[1], codes.shape[1]], dtype=torch.float32),
)
_define(
    "frozen_linear",
    f"Tensor x, {_WEIGHT}, Tensor? bias, Tensor? residual",
    frozen_linear,
    lambda x, codes, *_: _rows(x, codes.shape[0]),
)
_define(
    "frozen_linear_backward",
    f"Tensor g, {_WEIGHT}",
    frozen_linear_backward,
    lambda g, codes, scales, offsets: _rows(g, codes.shape[1] * (1 if offsets is None else 2)),
)
_define(
    "head_loss",
    "Tensor x, Tensor codes, Tensor? scales, Tensor? bias, Tensor targets, Tensor weight",
    head_loss,
    lambda x, *_: (x.new_empty([1]), torch.empty_like(x)),
    outputs=2,
)
_define(
    "latent_adapter", f"Tensor x, {_LATENTS}, Tensor base", latent_adapter, lambda *args: torch.empty_like(args[-1])
)
_define(
    "latent_adapter_backward",
    f"Tensor g, Tensor x, {_LATENTS}, Tensor through",
    latent_adapter_backward,
    lambda g, x, latents, offset, ranks, d_outs, through: (
        torch.empty_like(x),
        x.new_empty([_size(x, ranks, d_outs)]),
    ),
    outputs=2,
)
_define("rms_norm", "Tensor x, Tensor weight, float eps", rms_norm, lambda x, *_: torch.empty_like(x))
_define(
    "rms_norm_backward",
    "Tensor g, Tensor x, Tensor weight, float eps, Tensor? add",
    rms_norm_backward,
    lambda g, x, *_: torch.empty_like(x),
)
_define(
    "causal_attention",
    _ATTENTION,
    causal_attention,
    lambda x, cos, sin, q_norm, k_norm, heads, *_: _rows(x, heads * cos.shape[1]),
)
_define(
    "causal_attention_backward",
    f"Tensor g, {_ATTENTION}",
    causal_attention_backward,
    lambda g, x, *_: torch.empty_like(x),
)
_define("swiglu_backward", "Tensor g, Tensor gate_up", swiglu_backward, lambda g, gate_up: torch.empty_like(gate_up))
