"""Each MIL operation of the interpreter, in programs that coremltools wrote, against PyTorch or plain loops."""

# ruff: noqa: E731 (a table of short functions reads best)

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from mil_programs import Cases, mb, on_macos
from torch import Tensor
from torch.nn import functional as F

from lordba.backends.coreml.interpreter import Package

CASES = Cases()
case = CASES.add
RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def positive(*shape: int) -> np.ndarray:
    return RNG.uniform(0.1, 3, shape).astype(np.float32)


def integers(low: int, high: int, *shape: int) -> np.ndarray:
    return RNG.integers(low, high, shape).astype(np.int32)


def elementwise() -> None:
    unary: dict[str, Callable[[Tensor], Tensor]] = {
        "abs": torch.abs,
        "ceil": torch.ceil,
        "cos": torch.cos,
        "exp": torch.exp,
        "exp2": torch.exp2,
        "floor": torch.floor,
        "identity": lambda x: x,
        "relu": torch.relu,
        "round": torch.round,
        "sigmoid": torch.sigmoid,
        "sign": torch.sign,
        "silu": F.silu,
        "sin": torch.sin,
        "softplus": F.softplus,
        "square": torch.square,
        "tanh": torch.tanh,
    }
    for name, function in unary.items():
        case(f"{name}.1", lambda x, name=name: getattr(mb, name)(x=x), function, 3 * normal(3, 5))
    case("sigmoid.large", lambda x: mb.sigmoid(x=x), torch.sigmoid, np.float32([-200, -90, 0, 90, 200]))
    case("silu.large", lambda x: mb.silu(x=x), F.silu, np.float32([-200, -90, 0, 90, 200]))
    case("round.ties", lambda x: mb.round(x=x), torch.round, np.float32([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5]))
    case("sqrt.1", lambda x: mb.sqrt(x=x), torch.sqrt, positive(7))
    case("erf.1", lambda x: mb.erf(x=x), np.vectorize(lambda x: math.erf(x)), normal(4, 6))
    eps = np.float32(0.25)
    case("rsqrt.1", lambda x: mb.rsqrt(x=x, epsilon=eps), lambda x: torch.rsqrt(x + 0.25), positive(2, 3))
    case("inverse.1", lambda x: mb.inverse(x=x, epsilon=eps), lambda x: 1 / (x + 0.25), positive(2, 3))
    case("log.1", lambda x: mb.log(x=x, epsilon=eps), lambda x: torch.log(x + 0.25), positive(2, 3))
    case("clip.1", lambda x: mb.clip(x=x, alpha=-0.5, beta=0.75), lambda x: x.clamp(-0.5, 0.75), normal(3, 4))
    gelu = {"EXACT": "none", "TANH_APPROXIMATION": "tanh"}
    for mode, theirs in gelu.items():
        approximate = lambda x, theirs=theirs: F.gelu(x, approximate=theirs)
        case(f"gelu.{mode}", lambda x, mode=mode: mb.gelu(x=x, mode=mode), approximate, 2 * normal(5, 7))
    quick = lambda x: x * torch.sigmoid(1.702 * x)
    case("gelu.SIGMOID", lambda x: mb.gelu(x=x, mode="SIGMOID_APPROXIMATION"), quick, normal(3, 3))

    binary: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "add": torch.add,
        "equal": torch.eq,
        "floor_div": torch.floor_divide,
        "greater": torch.gt,
        "greater_equal": torch.ge,
        "less": torch.lt,
        "less_equal": torch.le,
        "maximum": torch.maximum,
        "minimum": torch.minimum,
        "mod": torch.remainder,
        "mul": torch.mul,
        "not_equal": torch.ne,
        "sub": torch.sub,
    }
    for name, operation in binary.items():
        build = lambda x, y, name=name: getattr(mb, name)(x=x, y=y)
        y = np.where(RNG.random((4, 1)) < 0.5, -1, 1) * positive(4, 1)  # nothing is divided by 0
        case(f"{name}.float", build, operation, normal(2, 1, 5), y.astype(np.float32))
        case(f"{name}.int", build, operation, integers(-9, 9, 3, 4), integers(1, 5, 4))
    power = lambda x, y: mb.pow(x=x, y=y)
    case("pow.float", power, torch.pow, positive(3, 1), normal(4))
    case("pow.int", power, torch.pow, integers(-4, 4, 3, 4), integers(0, 4, 4))
    quotient = lambda x, y: mb.real_div(x=x, y=y)
    case("real_div.float", quotient, torch.true_divide, normal(3, 1), positive(4))
    logical = {"logical_and": torch.logical_and, "logical_or": torch.logical_or, "logical_xor": torch.logical_xor}
    for name, operation in logical.items():
        build = lambda x, y, name=name: getattr(mb, name)(x=mb.cast(x=x, dtype="bool"), y=mb.cast(x=y, dtype="bool"))
        case(f"{name}.1", build, operation, integers(-1, 2, 3, 4), integers(0, 2, 4))
    case("logical_not.1", lambda x: mb.logical_not(x=mb.cast(x=x, dtype="bool")), torch.logical_not, integers(0, 2, 9))
    chosen = lambda c, a, b: mb.select(cond=mb.cast(x=c, dtype="bool"), a=a, b=b)
    which = lambda c, a, b: torch.where(c.bool(), a, b)
    case("select.1", chosen, which, integers(0, 2, 3, 4), normal(3, 4), normal(3, 4))
    case("cast.int", lambda x: mb.cast(x=x, dtype="int32"), lambda x: x.to(torch.int32), 5 * normal(20))
    case("cast.float", lambda x: mb.cast(x=x, dtype="fp32"), lambda x: x.float(), integers(-9, 9, 5))
    half = lambda x: mb.cast(x=x, dtype="fp16")
    case("cast.half", half, lambda x: x.half(), np.float32([1e-9, 0.1, 70000, -1e-6, 2049]), tolerance=0)


def reductions() -> None:
    ours: dict[str, Callable[..., Tensor]] = {
        "reduce_l2_norm": lambda x, dim, keepdim: x.square().sum(dim, keepdim).sqrt(),
        "reduce_log_sum_exp": torch.logsumexp,
        "reduce_max": torch.amax,
        "reduce_mean": torch.mean,
        "reduce_min": torch.amin,
        "reduce_sum": torch.sum,
        "reduce_sum_square": lambda x, dim, keepdim: x.square().sum(dim, keepdim),
    }
    for name, function in ours.items():
        for axes, keep in (([-1], True), ([0, 2], False), ([1], False)):
            build = lambda x, name=name, axes=axes, keep=keep: getattr(mb, name)(x=x, axes=axes, keep_dims=keep)
            expected = lambda x, f=function, axes=axes, keep=keep: f(x, dim=axes, keepdim=keep)
            case(f"{name}.{axes}", build, expected, 3 * normal(3, 4, 5))
    case("reduce_prod.1", lambda x: mb.reduce_prod(x=x, axes=[1]), lambda x: x.prod(1), normal(3, 4))
    case("reduce_sum.int", lambda x: mb.reduce_sum(x=x, axes=[0]), lambda x: x.sum(0), integers(-5, 5, 4, 3))
    case("reduce_argmax.1", lambda x: mb.reduce_argmax(x=x, axis=1), lambda x: x.argmax(1), normal(3, 9))
    keep = lambda x: mb.reduce_argmin(x=x, axis=-1, keep_dims=True)
    case("reduce_argmin.1", keep, lambda x: x.argmin(-1, keepdim=True), normal(3, 9))
    for axis in (-1, 0, 1):
        case(
            f"softmax.{axis}",
            lambda x, a=axis: mb.softmax(x=x, axis=a),
            lambda x, a=axis: x.softmax(a),
            normal(3, 4, 5),
        )
    case("softmax.large", lambda x: mb.softmax(x=x), lambda x: x.softmax(-1), np.float32([[1e4, 1e4 - 1, -1e4]]))
    case("cumsum.1", lambda x: mb.cumsum(x=x, axis=1), lambda x: x.cumsum(1), normal(3, 6))
    case("cumsum.int", lambda x: mb.cumsum(x=x, axis=0), lambda x: x.cumsum(0), integers(-5, 5, 6, 2))
    back = lambda x: mb.cumsum(x=x, axis=-1, exclusive=True, reverse=True)
    case("cumsum.back", back, lambda x: x.flip(-1).cumsum(-1).flip(-1) - x, normal(3, 6))
    gamma, beta = normal(4, 5), normal(4, 5)
    norm = lambda x: mb.layer_norm(x=x, axes=[1, 2], gamma=gamma, beta=beta, epsilon=np.float32(1e-3))
    theirs = lambda x: F.layer_norm(x, (4, 5), torch.from_numpy(gamma), torch.from_numpy(beta), 1e-3)
    case("layer_norm.two", norm, theirs, 3 * normal(3, 4, 5) + 1)
    middle = lambda x: mb.layer_norm(x=x, axes=[1], gamma=gamma[:, 0])
    moved = lambda x: F.layer_norm(x.movedim(1, -1), (4,), torch.from_numpy(gamma[:, 0].copy())).movedim(-1, 1)
    case("layer_norm.middle", middle, moved, normal(3, 4, 5))


def products() -> None:
    weight, bias = normal(7, 5), normal(7)
    dense = lambda x: mb.linear(x=x, weight=weight, bias=bias)
    case("linear.bias", dense, lambda x: F.linear(x, torch.from_numpy(weight), torch.from_numpy(bias)), normal(2, 3, 5))
    plain = lambda x: mb.linear(x=x, weight=weight)
    case("linear.plain", plain, lambda x: F.linear(x, torch.from_numpy(weight)), normal(4, 5))
    for tx in (False, True):
        for ty in (False, True):
            build = lambda x, y, tx=tx, ty=ty: mb.matmul(x=x, y=y, transpose_x=tx, transpose_y=ty)
            expected = lambda x, y, tx=tx, ty=ty: (x.mT if tx else x) @ (y.mT if ty else y)
            x = normal(2, 1, 6, 4) if tx else normal(2, 1, 4, 6)
            case(f"matmul.{tx}{ty}", build, expected, x, normal(3, 5, 6) if ty else normal(3, 6, 5))
    equation = "nchw,nwhu->nchu"
    summed = lambda x, y: mb.einsum(values=(x, y), equation=equation)
    case("einsum.1", summed, lambda x, y: torch.einsum(equation, x, y), normal(2, 3, 4, 5), normal(2, 5, 4, 6))
    q, k, v = normal(2, 3, 4, 8), normal(2, 3, 6, 8), normal(2, 3, 6, 5)
    attend = lambda q, k, v: mb.scaled_dot_product_attention(query=q, key=k, value=v)
    case("scaled_dot_product_attention.1", attend, F.scaled_dot_product_attention, q, k, v)
    masked = lambda q, k, v, m: mb.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=m)
    case("scaled_dot_product_attention.float", masked, F.scaled_dot_product_attention, q, k, v, normal(1, 1, 4, 6))
    mask = np.tril(np.ones((4, 6), np.int32))
    some = lambda q, k, v, m: masked(q, k, v, mb.cast(x=m, dtype="bool"))
    theirs = lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m.bool())
    case("scaled_dot_product_attention.bool", some, theirs, q, k, v, mask)


elementwise()
reductions()
products()


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Package:
    return CASES.saved(tmp_path_factory.mktemp("ops"))


@pytest.mark.parametrize("name", CASES.all)
def test_operation_computes_what_torch_does(package: Package, name: str) -> None:
    CASES.check(package, name)


@on_macos
@pytest.mark.parametrize("name", CASES.all)
def test_operation_computes_what_core_ml_does(package: Package, name: str) -> None:
    CASES.check_on_macos(package, name)
