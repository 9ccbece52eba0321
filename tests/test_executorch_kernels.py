"""The ops inside real ExecuTorch programs, against float64; also the child process that a forced ISA needs.

One program with dynamic T and a dynamic blob input serves every rank, scale code and number of tokens of its shape.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lordba.adapter import SignModule
from lordba.backends import built_library, executorch
from lordba.backends.executorch import load
from lordba.blob import HEADER, RECORD, make_blob
from lordba.layers import LordbaLinear
from lordba.scales import EncodedScales, ScaleCode, encode_scales
from lordba.signs import pack_signs, packed_width

LIMIT = 1e-6
NO_SUCH_ISA = 3
# d_in, d_outs, base added inside; at r = 300 the last is split over threads even for 1 or 3 tokens
SHAPES = [
    (1, (1,), False),
    (45, (33, 7, 20), True),
    (576, (576, 192, 192), True),
    (1537, (1049,), False),
    (5000, (2999, 1100), True),
]
RANKS = {1: (1, 64), 45: (1, 3, 8, 12, 17, 33, 64), 576: (16, 40), 1537: (7, 16, 64), 5000: (16, 300)}
TOKENS = {1: (1, 300), 45: (1, 2, 5, 17, 300), 576: (1, 3, 128), 1537: (1, 33), 5000: (1, 3)}


class BlobLayer(nn.Module):
    def __init__(self, d_in: int, d_outs: Sequence[int], with_base: bool) -> None:
        super().__init__()
        self.d_in, self.d_outs, self.with_base = d_in, list(d_outs), with_base

    def forward(self, x: Tensor, blob: Tensor, base: Tensor) -> Tensor:
        delta = torch.ops.lordba.sign_adapter.blob(x, blob, 1, self.d_in, self.d_outs, base if self.with_base else None)
        return delta if self.with_base else delta + base


class RopeLayer(nn.Module):
    def __init__(self, cos: Tensor, sin: Tensor, first: int, heads: int, rotate: bool) -> None:
        super().__init__()
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)
        self.arguments = first, heads, rotate

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        start = position[0].item()
        torch._check(start >= 0)
        return torch.ops.lordba.rope_heads(x, self.cos, self.sin, start, *self.arguments)


def program(layer: nn.Module, inputs: tuple[Tensor, ...], dynamic: tuple) -> bytes:
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

    exported = torch.export.export(layer, inputs, dynamic_shapes=dynamic)
    lowered = to_edge_transform_and_lower(exported, compile_config=EdgeCompileConfig(_check_ir_validity=False))
    return lowered.to_executorch().buffer


def blob_program(d_in: int, d_outs: Sequence[int], with_base: bool) -> bytes:
    tokens, size = torch.export.Dim("tokens", min=1, max=300), torch.export.Dim("blob_size", min=8, max=1 << 22)
    inputs = torch.zeros(2, d_in), torch.zeros(1000, dtype=torch.uint8), torch.zeros(2, sum(d_outs))
    layer = BlobLayer(d_in, d_outs, with_base)
    # Tracing calls the fake kernel alone, so the example blob needs no content.
    return program(layer, inputs, ({0: tokens}, {0: size}, {0: tokens}))


class Loaded:
    """A program's forward; it holds the program too, whose bytes the runtime reads in place."""

    def __init__(self, buffer: bytes) -> None:
        from executorch.runtime import Runtime

        self.program = Runtime.get().load_program(buffer)
        self.forward = self.program.load_method("forward")

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self.forward.execute(inputs)[0]


def random_module(d_in: int, d_out: int, r: int, code: ScaleCode, generator: torch.Generator) -> SignModule:
    def scales(n: int) -> EncodedScales:
        values = torch.rand(n, generator=generator) + 0.1
        return encode_scales(values * (torch.rand(n, generator=generator) > 0.1), code)

    a, b = torch.randn(r, d_in, generator=generator), torch.randn(d_out, r, generator=generator)
    s_out = encode_scales(torch.rand(d_out, generator=generator) + 0.1, code)
    return SignModule(pack_signs(a), pack_signs(b), scales(d_in), scales(r), s_out)


def reference(x: Tensor, modules: Sequence[SignModule], base: Tensor | float = 0.0) -> Tensor:
    """Dense float64 matrices, nothing of the op: x A^T B^T per module, side by side."""
    factors = [module.factors() for module in modules]
    return torch.cat([x.double() @ a.t() @ b.t() for b, a in factors], dim=-1) + base


def relative_error(y: Tensor, expected: Tensor) -> float:
    return float((y.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def run_cases(folder: Path) -> dict[str, float]:
    """In the child: execute every case of the folder and return its relative error."""
    errors = {}
    for path in sorted(folder.glob("*.pte")):
        forward = Loaded(path.read_bytes())
        cases = load_file(path.with_suffix(".safetensors"))
        for name in sorted({key.rsplit("/", 1)[0] for key in cases}):
            x, blob, base, expected = (cases[f"{name}/{part}"] for part in ("x", "blob", "base", "expected"))
            errors[f"{path.stem} {name}"] = relative_error(forward(x, blob, base), expected)
    return errors


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> Path:
    """Programs, inputs and float64 results, for the child processes."""
    folder = tmp_path_factory.mktemp("cases")
    generator = torch.Generator().manual_seed(0)
    for d_in, d_outs, with_base in SHAPES:
        stem = folder / f"{d_in}x{sum(d_outs)}"
        stem.with_suffix(".pte").write_bytes(blob_program(d_in, d_outs, with_base))
        tensors = {}
        for i, r in enumerate(RANKS[d_in]):
            for j, code in enumerate(ScaleCode):
                modules = [random_module(d_in, d_out, r, code, generator) for d_out in d_outs]
                blob = make_blob([None, *modules])
                # Every rank meets every code; the numbers of tokens take turns, and all occur.
                tokens = TOKENS[d_in][(i + j) % len(TOKENS[d_in])]
                x = torch.randn(tokens, d_in, generator=generator)
                base = torch.randn(tokens, sum(d_outs), generator=generator)
                parts = {"x": x, "blob": blob, "base": base, "expected": reference(x, modules, base)}
                tensors |= {f"r={r} T={tokens} {code.value}/{part}": value for part, value in parts.items()}
        save_file(tensors, stem.with_suffix(".safetensors"))
    return folder


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512"])
def test_program_matches_float64(cases: Path, isa: str) -> None:
    child = subprocess.run(
        [sys.executable, __file__, cases], env={**os.environ, "LORDBA_ISA": isa}, capture_output=True, text=True
    )
    if child.returncode == NO_SUCH_ISA and isa != "scalar":
        pytest.skip(f"this CPU has no {isa}")
    assert child.returncode == 0, child.stderr[-2000:]
    errors = json.loads(child.stdout.splitlines()[-1])
    assert len(errors) == sum(4 * len(RANKS[d_in]) for d_in, _, _ in SHAPES)
    assert {name: error for name, error in errors.items() if not error < LIMIT} == {}


@pytest.mark.parametrize("code", list(ScaleCode))
def test_canonical_overload_matches_float64(code: ScaleCode) -> None:
    load()
    module = random_module(45, 33, 17, code, torch.Generator().manual_seed(1))
    layer, tokens = LordbaLinear(nn.Linear(45, 33, bias=False), module), torch.export.Dim("tokens", min=1, max=64)
    forward = Loaded(program(layer, (torch.zeros(2, 45),), ({0: tokens},)))
    for count in (1, 9):
        x = torch.randn(count, 45)
        base = x.double() @ layer.base.weight.double().t()
        assert relative_error(forward(x), reference(x, [module], base).detach()) < LIMIT


@pytest.fixture(scope="module")
def small():
    """A program with two modules of 45 -> 33 and 20 channels after the base, run in this process."""
    load()
    return Loaded(blob_program(45, (33, 20), True))


def small_modules(s_out: float | None = None) -> list[SignModule]:
    generator = torch.Generator().manual_seed(2)
    modules = [random_module(45, d_out, 17, ScaleCode.FP32, generator) for d_out in (33, 20)]
    if s_out is not None:
        for module in modules:
            module.s_out.values.fill_(s_out)
    return modules


def test_one_flipped_sign_is_seen(small) -> None:
    modules = small_modules()
    blob, x, base = make_blob([None, *modules]), torch.randn(3, 45), torch.zeros(3, 53)
    expected = reference(x, modules)
    assert relative_error(small(x, blob, base), expected) < LIMIT
    # A's signs of the first module are the first data; flip one whose scales are not zero.
    i, j = (int(scales.values.nonzero()[0]) for scales in (modules[0].s_in, modules[0].s_mid))
    blob[HEADER.size + 3 * RECORD.size + j * packed_width(45) + i // 8] ^= 1 << i % 8
    assert relative_error(small(x, blob, base), expected) > 1e-3


@pytest.mark.parametrize("modules", [[None, None], small_modules(s_out=0.0)], ids=["rank 0", "s_out zero"])
def test_no_adapter_leaves_the_base_whatever_x_holds(small, modules) -> None:
    x, base = torch.full((3, 45), float("nan")), torch.randn(3, 53)
    assert torch.equal(small(x, make_blob([None, *modules]), base), base)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_spread_as_in_eager(small, value: float) -> None:
    blob, x, base = make_blob([None, *small_modules()]), torch.randn(3, 45), torch.randn(3, 53)
    x[1, 5] = value
    eager = torch.ops.lordba.sign_adapter.blob(x, blob, 1, 45, [33, 20], base)
    y = small(x, blob, base)
    assert not bool(eager[1].isfinite().any())
    assert torch.allclose(y, eager, rtol=1e-5, atol=1e-5, equal_nan=True)


def bad_blobs() -> dict[str, Tensor]:
    blob = make_blob([None, *small_modules()])
    record = HEADER.size + RECORD.size

    def with_bytes(offset: int, *values: int) -> Tensor:
        damaged = blob.clone()
        damaged[offset : offset + len(values)] = torch.tensor(values, dtype=torch.uint8)
        return damaged

    return {
        "magic": with_bytes(0, 0),
        "version": with_bytes(8, 2),
        "module count": with_bytes(12, 255, 255, 255, 255),
        "total bytes": with_bytes(16, 255, 255, 255, 255),
        "truncated": blob[:-1].clone(),
        "header alone": blob[: HEADER.size].clone(),
        "too few modules": make_blob([None, *small_modules()[:1]]),
        "rank": with_bytes(record, 255, 255, 255, 255),
        "d_in": with_bytes(record + 4, 46),
        "d_out": with_bytes(record + 8, 34),
        "scale code": with_bytes(record + 12, 4),
        "offset beyond the end": with_bytes(record + 16, 255, 255, 255, 255, 255, 255, 255, 255),
        "offset inside the header": with_bytes(record + 24, 0, 0, 0, 0, 0, 0, 0, 0),
        "other base": make_blob(
            [None, *[random_module(44, n, 4, ScaleCode.LOG4, torch.Generator()) for n in (33, 20)]]
        ),
    }


@pytest.mark.parametrize("name", bad_blobs())
def test_bad_blob_is_an_error(small, name: str) -> None:
    with pytest.raises(RuntimeError, match="0x12"):  # InvalidArgument
        small(torch.randn(3, 45), bad_blobs()[name], torch.zeros(3, 53))


def test_heads_times_channels_are_one_row() -> None:
    """x as attention leaves it, [1, T, heads, head_dim]."""
    load()
    tokens = torch.export.Dim("tokens", min=1, max=64)
    size = torch.export.Dim("blob_size", min=8, max=1 << 20)
    inputs = torch.zeros(1, 2, 3, 16), torch.zeros(1000, dtype=torch.uint8), torch.zeros(1, 2, 20)
    forward = Loaded(program(BlobLayer(48, [20], True), inputs, ({1: tokens}, {0: size}, {1: tokens})))
    module = random_module(48, 20, 16, ScaleCode.LOG4, torch.Generator().manual_seed(3))
    x, base = torch.randn(1, 9, 3, 16), torch.randn(1, 9, 20)
    y = forward(x, make_blob([None, module]), base)
    assert relative_error(y, reference(x.flatten(2), [module], base)) < LIMIT


def rope_tables(length: int, dim: int) -> tuple[Tensor, Tensor]:
    angles = torch.arange(length)[:, None] * 10000.0 ** -(torch.arange(0, dim, 2) / dim)
    sin = torch.cat([-angles.sin(), angles.sin()], dim=-1)
    return torch.cat([angles.cos(), angles.cos()], dim=-1), sin


@pytest.mark.parametrize("rotate", [True, False])
def test_rope_heads_rotates_pairs_by_their_angle(rotate: bool) -> None:
    from lordba.backends.executorch import ops  # noqa: F401 (registers rope_heads)

    load()
    length, dim, first, heads = 1024, 16, 2, 9
    cos, sin = rope_tables(length, dim)
    layer = RopeLayer(cos, sin, first, heads, rotate)
    tokens = torch.export.Dim("tokens", min=1, max=1024)
    inputs = torch.zeros(1, 2, 13 * dim), torch.tensor([0])
    forward = Loaded(program(layer, inputs, ({1: tokens}, {})))
    for count, start in ((1, 0), (5, 100), (1000, 24)):  # the last is split over threads
        x = torch.randn(1, count, 13 * dim)
        y = forward(x, torch.tensor([start]))
        picked = x.view(1, count, 13, dim)[:, :, first : first + heads].double()
        # The oracle: each pair (i, i + dim/2) as one complex number, turned by position * frequency.
        angles = torch.arange(start, start + count, dtype=torch.float64)[:, None] * 10000.0 ** -(
            torch.arange(0, dim, 2, dtype=torch.float64) / dim
        )
        turned = torch.complex(*picked.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angles), angles)[:, None]
        expected = torch.cat([turned.real, turned.imag], dim=-1) if rotate else picked
        assert relative_error(y, expected) < 1e-4  # float32 angles
        eager = torch.ops.lordba.rope_heads(x, cos, sin, start, first, heads, rotate)
        assert relative_error(y, eager.double()) < LIMIT
    with pytest.raises(RuntimeError, match="0x12"):
        forward(torch.zeros(1, 5, 13 * dim), torch.tensor([length - 4]))


def test_loading_twice_is_harmless_and_an_unknown_isa_is_explained() -> None:
    assert load() == load()
    code = "from lordba.backends.executorch import load; load()"
    child = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "LORDBA_ISA": "avx1024"}, capture_output=True, text=True
    )
    assert child.returncode == 1
    assert "LordbaError: LORDBA_ISA=avx1024: this CPU or build has no such kernels" in child.stderr


def test_library_needs_executorch_and_no_libtorch() -> None:
    content = built_library(executorch.LIBRARY, executorch.__path__).read_bytes()
    assert b"libexecutorch.so" in content
    assert b"libtorch" not in content


if __name__ == "__main__":
    from lordba.errors import LordbaError

    try:
        load()
    except LordbaError:
        sys.exit(NO_SUCH_ISA)
    print(json.dumps(run_cases(Path(sys.argv[1]))))
