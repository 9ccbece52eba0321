"""`lordba::sign_adapter`: the op's schemas, its eager oracle in plain PyTorch, fake kernels and `.out` variants.

Every backend is compared with the eager implementation here. Two overloads share one meaning:

- `sign_adapter`: one layer, canonical tensors (LoRDBA, arXiv 2605.24058): y = s_out * (B (s_mid * (A (s_in * x)))).
- `sign_adapter.blob`: one or several layers that share x, read from an adapter blob (lordba.blob), optionally added
  to `base`. What exported programs use: one constant or input holds the whole adapter.

`scale_code` says how s_in, s_mid and s_out are stored; int8 and log4 carry `s_ranges`, fp16 [3, 2] = (lo, hi) of each.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.library import Library

from lordba.blob import read_module
from lordba.errors import LordbaError
from lordba.scales import ScaleCode, decode_values
from lordba.signs import packed_width, unpack_signs

_ADAPTER = (
    "Tensor x, Tensor a_signs, Tensor b_signs, Tensor s_in, Tensor s_mid, Tensor s_out, "
    "Tensor? s_ranges=None, str scale_code='fp32'"
)
_BLOB = "Tensor x, Tensor blob, int first, int d_in, int[] d_outs, Tensor? base=None"

_library = Library("lordba", "DEF")
_library.define(f"sign_adapter({_ADAPTER}) -> Tensor")
_library.define(f"sign_adapter.out({_ADAPTER}, *, Tensor(a!) out) -> Tensor(a!)")
_library.define(f"sign_adapter.blob({_BLOB}) -> Tensor")
_library.define(f"sign_adapter.blob_out({_BLOB}, *, Tensor(a!) out) -> Tensor(a!)")


def sign_adapter(
    x: Tensor,
    a_signs: Tensor,
    b_signs: Tensor,
    s_in: Tensor,
    s_mid: Tensor,
    s_out: Tensor,
    s_ranges: Tensor | None = None,
    scale_code: str = "fp32",
) -> Tensor:
    """The adapter's term for one layer: x [..., d_in] fp16/bf16/fp32 -> [..., d_out] of the same dtype.

    a_signs uint8 [r, ceil(d_in/8)], b_signs uint8 [d_out, ceil(r/8)]. Sums run in float32, or in float64 for a
    float64 x (the oracle's oracle). An all-zero s_out means "no adapter": exact zeros, whatever x holds.
    Raises LordbaError on shapes or dtypes that do not fit.
    """
    _check(x, a_signs, b_signs, s_in, s_mid, s_out, s_ranges, scale_code)
    code, d_in, r, d_out = ScaleCode(scale_code), x.shape[-1], a_signs.shape[0], b_signs.shape[0]
    ranges: Sequence[Tensor | None] = (None, None, None) if s_ranges is None else s_ranges.unbind()
    decoded = [
        decode_values(code, values, scale_range, n)
        for values, scale_range, n in zip((s_in, s_mid, s_out), ranges, (d_in, r, d_out), strict=True)
    ]
    return _apply(x, a_signs, b_signs, *decoded)


def sign_adapter_blob(
    x: Tensor, blob: Tensor, first: int, d_in: int, d_outs: Sequence[int], base: Tensor | None = None
) -> Tensor:
    """Modules first, first+1, ... of a blob applied to one x, side by side: [..., sum(d_outs)], plus `base` if given.

    x is [..., d_in], or [..., heads, head_dim] with heads * head_dim = d_in as attention leaves it.
    """
    if x.shape[-1] != d_in:
        x = x.flatten(-2)
    if x.shape[-1] != d_in:
        raise LordbaError(f"sign_adapter.blob: x has {x.shape[-1]} channels, the layer takes {d_in}")
    parts = []
    for i, d_out in enumerate(d_outs):
        module = read_module(blob, first + i)
        if module is None:
            parts.append(x.new_zeros([*x.shape[:-1], d_out]))
            continue
        if (module[2].numel(), module[4].numel()) != (d_in, d_out):
            raise LordbaError(
                f"adapter blob: module {first + i} maps {module[2].numel()} to {module[4].numel()} channels, "
                f"the program's layer maps {d_in} to {d_out}; this adapter belongs to another base"
            )
        parts.append(_apply(x, *module))
    delta = torch.cat(parts, dim=-1)
    return delta if base is None else base + delta


def _apply(x: Tensor, a_signs: Tensor, b_signs: Tensor, s_in: Tensor, s_mid: Tensor, s_out: Tensor) -> Tensor:
    if not bool(s_out.any()):
        return x.new_zeros([*x.shape[:-1], b_signs.shape[0]])
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    a = unpack_signs(a_signs, s_in.numel(), dtype)
    b = unpack_signs(b_signs, s_mid.numel(), dtype)
    return signed_product(x, a, b, s_in, s_mid, s_out).to(x.dtype)


def signed_product(x: Tensor, a: Tensor, b: Tensor, s_in: Tensor, s_mid: Tensor, s_out: Tensor) -> Tensor:
    """The adapter's arithmetic in the dtype of the +-1 matrices a [r, d_in], b [d_out, r]: [..., d_in] -> [..., d_out].

    Training runs these very lines, so that a packed adapter repeats what was trained.
    """
    h = (x.to(a.dtype) * s_in) @ a.t() * s_mid
    return h @ b.t() * s_out


def _check(
    x: Tensor,
    a_signs: Tensor,
    b_signs: Tensor,
    s_in: Tensor,
    s_mid: Tensor,
    s_out: Tensor,
    s_ranges: Tensor | None,
    scale_code: str,
) -> None:
    if scale_code not in {code.value for code in ScaleCode}:
        raise LordbaError(
            f"sign_adapter: scale_code must be one of {[c.value for c in ScaleCode]}, found {scale_code!r}"
        )
    code = ScaleCode(scale_code)
    if x.dim() == 0 or not x.is_floating_point():
        raise LordbaError(f"sign_adapter: x must be a float tensor [..., d_in], found {x.dtype} {list(x.shape)}")
    if a_signs.dim() != 2 or b_signs.dim() != 2 or a_signs.dtype != torch.uint8 or b_signs.dtype != torch.uint8:
        raise LordbaError("sign_adapter: a_signs and b_signs must be uint8 matrices of packed signs")
    d_in, r, d_out = x.shape[-1], a_signs.shape[0], b_signs.shape[0]
    expected = {
        "a_signs": (a_signs, (r, packed_width(d_in))),
        "b_signs": (b_signs, (d_out, packed_width(r))),
        "s_in": (s_in, (code.stored_length(d_in),)),
        "s_mid": (s_mid, (code.stored_length(r),)),
        "s_out": (s_out, (code.stored_length(d_out),)),
    }
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise LordbaError(
                f"sign_adapter: {name} must be {list(shape)} for d_in={d_in}, r={r}, d_out={d_out}, "
                f"scale_code={scale_code}; found {list(tensor.shape)}"
            )
        if name.startswith("s_") and tensor.dtype != code.dtype:
            raise LordbaError(
                f"sign_adapter: {name} must be {code.dtype} for {scale_code} scales, found {tensor.dtype}"
            )
    if code.is_coded and (s_ranges is None or tuple(s_ranges.shape) != (3, 2)):
        raise LordbaError(f"sign_adapter: {scale_code} scales need s_ranges, fp16 [3, 2]")


def _fake(x, a_signs, b_signs, s_in, s_mid, s_out, s_ranges=None, scale_code="fp32"):
    _check(x, a_signs, b_signs, s_in, s_mid, s_out, s_ranges, scale_code)
    return x.new_empty([*x.shape[:-1], b_signs.shape[0]])


def _fake_blob(x, blob, first, d_in, d_outs, base=None):
    dims = list(x.shape[:-1]) if x.shape[-1] == d_in else list(x.shape[:-2])
    if math.prod(x.shape[len(dims) :]) != d_in:
        raise LordbaError(f"sign_adapter.blob: x is {list(x.shape)}, the layer takes {d_in} channels")
    return x.new_empty([*dims, sum(d_outs)])


def implement(
    library: Library, op: str, out: str, function: Callable[..., Tensor], fake: Callable[..., Tensor]
) -> None:
    """Give an op its eager implementation, its fake kernel, and the variant named `out`, which writes into `out=`."""

    def write(*args, out, **kwargs):
        result = function(*args, **kwargs)
        return out.resize_(result.shape).copy_(result)

    library.impl(op, function, "CompositeExplicitAutograd")
    library.impl(op, fake, "Meta")
    library.impl(out, write, "CompositeExplicitAutograd")


implement(_library, "sign_adapter", "sign_adapter.out", sign_adapter, _fake)
implement(_library, "sign_adapter.blob", "sign_adapter.blob_out", sign_adapter_blob, _fake_blob)
