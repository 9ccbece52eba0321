"""Any shape, rank, dtype, scale code, number of tokens and threads: the C kernels give what the eager op gives."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_kernels import FLAGS, KERNELS, SOURCES, STRICT
from torch import Tensor

from lordba.adapter import SignModule
from lordba.blob import make_blob
from lordba.scales import ScaleCode, decode_scales, encode_scales
from lordba.signs import pack_signs, unpack_signs

COMPILER = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="NO C COMPILER: the kernels' properties are not checked")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ISAS = ["scalar", "avx2", "avx512", "neon", "dotprod", "i8mm"]
ALIGNMENT = 64


class Scales(ctypes.Structure):
    _fields_ = [("code", ctypes.c_int), ("meaning", ctypes.c_void_p), ("values", ctypes.c_void_p)]


class Module(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_uint32) for name in ("r", "d_in", "d_out")),
        *((name, ctypes.c_void_p) for name in ("a_signs", "b_signs", "a_words")),
        *((name, Scales) for name in ("s_in", "s_mid", "s_out")),
    ]


class Call(ctypes.Structure):
    _fields_ = [
        ("modules", ctypes.POINTER(Module)),
        ("count", ctypes.c_size_t),
        ("dtype", ctypes.c_int),
        ("tokens", ctypes.c_size_t),
        *(
            field
            for name in ("x", "base", "y")
            for field in ((name, ctypes.c_void_p), (f"{name}_stride", ctypes.c_size_t))
        ),
    ]


class Plan(ctypes.Structure):
    _fields_ = [
        ("threads", ctypes.c_size_t),
        ("stages", ctypes.c_size_t),
        ("tiles", ctypes.c_size_t * 2),
        ("workspace", ctypes.c_size_t),
        *((name, ctypes.c_size_t) for name in ("token_tiles", "input_tiles", "tile_tokens")),
        ("token_lanes", ctypes.c_bool),
    ]


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> ctypes.CDLL:
    folder: Path = tmp_path_factory.mktemp("properties")
    objects = []
    for name in SOURCES:
        objects.append(folder / f"{name}.o")
        command = [COMPILER, *STRICT, "-O2", "-fPIC", *FLAGS[name], "-c", KERNELS / name, "-o", objects[-1]]
        subprocess.run(command, check=True)
    subprocess.run([COMPILER, "-shared", *objects, "-o", folder / "kernels.so"], check=True)
    loaded = ctypes.CDLL(str(folder / "kernels.so"))
    loaded.lordba_select.restype = ctypes.c_void_p
    loaded.lordba_select.argtypes = [ctypes.c_char_p]
    return loaded


def random_module(r: int, d_in: int, d_out: int, code: ScaleCode, generator: torch.Generator) -> SignModule:
    def signs(rows: int, columns: int) -> Tensor:
        return pack_signs(torch.randn(rows, columns, generator=generator))

    s_in, s_mid, s_out = (encode_scales(0.05 + torch.rand(n, generator=generator), code) for n in (d_in, r, d_out))
    return SignModule(signs(r, d_in), signs(d_out, r), s_in, s_mid, s_out)


def eager(module: SignModule, x: Tensor, base: Tensor | None) -> Tensor:
    """In float64, from the scales as stored."""
    s_in, s_mid, s_out = (decode_scales(s).double() for s in (module.s_in, module.s_mid, module.s_out))
    a = unpack_signs(module.a_signs, module.d_in, torch.float64)
    b = unpack_signs(module.b_signs, module.r, torch.float64)
    y = s_out * ((s_mid * ((s_in * x.double()) @ a.T)) @ b.T)
    return y if base is None else base.double() + y


def magnitude(module: SignModule, x: Tensor) -> Tensor:
    """What outputs of random signs have on average, [tokens, d_out]: a sum may cancel, its terms' errors do not."""
    s_in, s_mid, s_out = (decode_scales(s).double() for s in (module.s_in, module.s_mid, module.s_out))
    return torch.outer((s_in * x.double()).norm(dim=-1) * s_mid.norm(), s_out)


def native(
    library: ctypes.CDLL, isa: int, module: SignModule, x: Tensor, base: Tensor | None, in_place: bool, threads: int
) -> Tensor:
    """The same by the C library, its tiles run from last to first."""
    blob = make_blob([module])
    found = Module()
    assert (
        library.lordba_blob_module(
            ctypes.c_void_p(blob.data_ptr()), ctypes.c_size_t(blob.numel()), ctypes.c_uint64(0), ctypes.byref(found)
        )
        == 0
    )
    y = base.clone() if base is not None and in_place else x.new_full((x.shape[0], module.d_out), float("nan"))
    start = y if base is not None and in_place else base
    call = Call(
        ctypes.pointer(found),
        1,
        DTYPES.index(x.dtype),
        x.shape[0],
        x.data_ptr(),
        x.stride(0),
        None if start is None else start.data_ptr(),
        module.d_out,
        y.data_ptr(),
        module.d_out,
    )
    plan = Plan()
    kernels = ctypes.c_void_p(isa)
    assert library.lordba_plan_call(kernels, ctypes.byref(call), ctypes.c_size_t(threads), ctypes.byref(plan)) == 0
    memory = ctypes.create_string_buffer(plan.workspace + ALIGNMENT)
    workspace = ctypes.c_void_p(-(-ctypes.addressof(memory) // ALIGNMENT) * ALIGNMENT)
    for stage in range(plan.stages):
        for tile in reversed(range(plan.tiles[stage])):
            library.lordba_run_tile(
                kernels,
                ctypes.byref(call),
                ctypes.byref(plan),
                workspace,
                ctypes.c_size_t(stage),
                ctypes.c_size_t(tile),
            )
    return y


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    isa=st.sampled_from(ISAS),
    r=st.integers(1, 140),
    d_in=st.integers(1, 1200),
    d_out=st.integers(1, 700),
    tokens=st.integers(0, 75),
    code=st.sampled_from(list(ScaleCode)),
    dtype=st.sampled_from(DTYPES),
    base=st.sampled_from(["none", "apart", "in place"]),
    gap=st.integers(0, 3),
    threads=st.integers(1, 9),
    seed=st.integers(0, 2**31),
)
def test_any_call_equals_float64(library, isa, r, d_in, d_out, tokens, code, dtype, base, gap, threads, seed):
    kernels = library.lordba_select(isa.encode())
    if kernels is None:
        return  # test_kernels.py says aloud which instruction sets this CPU lacks
    generator = torch.Generator().manual_seed(seed)
    module = random_module(r, d_in, d_out, code, generator)
    x = torch.randn(tokens, d_in + gap, generator=generator).to(dtype)[:, :d_in]
    start = None if base == "none" else torch.randn(tokens, d_out, generator=generator).to(dtype)
    found = native(library, kernels, module, x, start, base == "in place", threads)
    expected = eager(module, x, start)
    if tokens == 0:
        return
    scale = magnitude(module, x) + (0 if start is None else start.double().abs())
    rounding = 0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2 * expected.abs()
    error = (found.double() - expected).abs() - rounding
    assert (error < 1e-6 * scale.max() + torch.finfo(dtype).smallest_normal).all()


def test_a_flipped_sign_is_seen(library):
    generator = torch.Generator().manual_seed(1)
    module = random_module(16, 576, 64, ScaleCode.LOG4, generator)
    x = torch.randn(4, 576, generator=generator)
    expected = eager(module, x, None)
    module.a_signs[3, 5] ^= 4
    found = native(library, library.lordba_select(None), module, x, None, False, 1)
    assert (found.double() - expected).abs().max() > 1e-3 * expected.abs().max()
