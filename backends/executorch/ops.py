"""`lordba::rope_heads` and `lordba::swiglu`: what a decoder does with packed rows, as ops that no partitioner cuts."""

import torch.nn.functional as F
from torch import Tensor
from torch.library import Library

from lordba.errors import LordbaError
from lordba.ops import implement

_ARGUMENTS = "Tensor x, Tensor cos, Tensor sin, SymInt start, int first_head, int heads, bool rotate"

_library = Library("lordba", "FRAGMENT")
_library.define(f"rope_heads({_ARGUMENTS}) -> Tensor")
_library.define(f"rope_heads.out({_ARGUMENTS}, *, Tensor(a!) out) -> Tensor(a!)")
_library.define("swiglu(Tensor gate_up) -> Tensor")
_library.define("swiglu.out(Tensor gate_up, *, Tensor(a!) out) -> Tensor(a!)")


def rope_heads(x: Tensor, cos: Tensor, sin: Tensor, start: int, first_head: int, heads: int, rotate: bool) -> Tensor:
    """Heads first_head .. first_head + heads of x [1, T, W], rotated (RoPE, arXiv 2104.09864): [1, T, heads, D].

    cos and sin are tables [max_len, D], W a multiple of D; row start + t belongs to token t. The first half of sin is
    negated beforehand, so that out = x * cos + swap(x) * sin with swap exchanging the halves of a head.
    rotate=False copies the heads. Raises LordbaError on shapes or positions that do not fit.
    """
    _check_rope(x, cos, sin, first_head, heads)
    tokens, dim = x.shape[1], cos.shape[1]
    picked = x[..., first_head * dim : (first_head + heads) * dim].reshape(1, tokens, heads, dim)
    if not rotate:
        return picked.clone()
    if start < 0 or start + tokens > cos.shape[0]:
        raise LordbaError(f"rope_heads: positions {start} to {start + tokens} exceed the tables' {cos.shape[0]}")
    cos, sin = cos[start : start + tokens, None], sin[start : start + tokens, None]
    return picked * cos + picked.roll(dim // 2, -1) * sin


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up (GLU variants, arXiv 2002.05202) of packed rows [1, T, 2 F] = [gate | up]: [1, T, F]."""
    _check_swiglu(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def _check_rope(x: Tensor, cos: Tensor, sin: Tensor, first_head: int, heads: int) -> None:
    if x.dim() != 3 or x.shape[0] != 1 or cos.dim() != 2 or cos.shape != sin.shape or cos.shape[1] % 2:
        raise LordbaError(
            "rope_heads: x must be [1, T, W] and cos, sin tables [max_len, D] with D even; "
            f"found x {list(x.shape)}, cos {list(cos.shape)}, sin {list(sin.shape)}"
        )
    if first_head < 0 or heads < 1 or (first_head + heads) * cos.shape[1] > x.shape[2]:
        raise LordbaError(
            f"rope_heads: heads {first_head} to {first_head + heads} of {cos.shape[1]} channels "
            f"do not fit into x {list(x.shape)}"
        )


def _fake_rope(x, cos, sin, start, first_head, heads, rotate):
    _check_rope(x, cos, sin, first_head, heads)
    return x.new_empty([1, x.shape[1], heads, cos.shape[1]])


def _check_swiglu(gate_up: Tensor) -> None:
    if gate_up.dim() != 3 or gate_up.shape[2] % 2:
        raise LordbaError(f"swiglu: expected rows [1, T, 2 F], found {list(gate_up.shape)}")


def _fake_swiglu(gate_up):
    _check_swiglu(gate_up)
    return gate_up.new_empty([*gate_up.shape[:2], gate_up.shape[2] // 2])


implement(_library, "rope_heads", "rope_heads.out", rope_heads, _fake_rope)
implement(_library, "swiglu", "swiglu.out", swiglu, _fake_swiglu)
