"""Conversion against dense float64 products, there and back, and the commands as users run them."""

import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from conftest import random_adapter, random_module
from hypothesis import given, settings
from hypothesis import strategies as st
from loras import dense, random_lora, run_convert, saved_lora

from lordba.adapter import Adapter, load_adapter, save_adapter
from lordba.console import run_command
from lordba.conversion.admm import LowRank, SignFactors, relative_error, signs, to_signs
from lordba.conversion.refit import fix_gauge, refit
from lordba.convert import ModuleReport, convert_lora
from lordba.errors import LordbaError
from lordba.lora import LoraAdapter, LoraModule, read_lora, to_lora, write_lora
from lordba.models import fingerprint
from lordba.scales import ScaleCode, decode_scales, encode_scales


def one(module: LoraModule, **options: Any) -> tuple[Adapter, ModuleReport]:
    adapter, reports = convert_lora(LoraAdapter({"m": module}), **options)
    return adapter, reports[0]


def dense_error(module: LoraModule, adapter: Adapter) -> float:
    wanted = module.scaling * dense(module.b, module.a)
    return float((dense(*adapter.modules["m"].factors()) - wanted).norm() / wanted.norm())


# Error and form


@given(
    st.tuples(st.integers(1, 70), st.integers(1, 70), st.integers(1, 20), st.integers(0, 99)),
    st.sampled_from([None, 1, 3, 24]),
    st.sampled_from(ScaleCode),
)
@settings(max_examples=40, deadline=None)
def test_any_lora_converts_and_the_reported_error_is_the_dense_one(shape, rank, code):
    d_out, d_in, r, seed = shape
    module = random_lora(d_out, d_in, r, seed)
    adapter, report = one(module, rank=rank, scale_code=code)
    found = adapter.modules["m"]
    assert (found.d_out, found.d_in, found.r) == (d_out, d_in, rank or r)
    assert report.error == pytest.approx(dense_error(module, adapter), rel=1e-4, abs=1e-5)
    assert report.error < 1  # better than no adapter at all
    assert report.nbytes == found.nbytes
    for scales in found.scales:
        decoded = decode_scales(scales)
        assert bool(torch.isfinite(decoded).all()) and bool((decoded >= 0).all())


def test_the_last_step_gives_back_what_least_squares_shrinks():
    """Within the update's row and column spaces the error falls and the size returns; outside them the error grows."""
    b, a = random_lora(192, 144, 16).factors()
    target, update = LowRank(b[None], a.T[None]), b @ a
    start = to_signs(target, 16)[0]
    inside, outside, size = {}, {}, {}
    for noise_weight in (1.0, 0.05):
        product = refit(target, start, ScaleCode.FP32, noise_weight).product
        error = (product.left @ product.right.mT)[0] - update
        u, v = torch.linalg.svd(update)[0][:, :16], torch.linalg.svd(update)[2][:16].T
        inside[noise_weight] = (u.T @ error @ v).norm().item()
        outside[noise_weight] = (error - u @ (u.T @ error @ v) @ v.T).norm().item()
        size[noise_weight] = ((error + update) * update).sum().item() / update.square().sum().item()
    assert size[1.0] == pytest.approx(
        1 - relative_error(target, refit(target, start, ScaleCode.FP32, 1.0)).item() ** 2, rel=1e-3
    )
    assert size[1.0] < 0.92 and abs(size[0.05] - 1) < 0.4 * abs(size[1.0] - 1)
    assert inside[0.05] < 0.9 * inside[1.0] and outside[1.0] < outside[0.05]


def test_a_rank_far_too_low_is_still_better_than_nothing():
    for seed in range(6):
        module = random_lora(70, 70, 20, seed, spread=0.0)
        assert one(module, rank=1)[1].error < 1


def test_admm_reaches_what_rounding_the_factors_does_not():
    errors, predicted, rounded = [], [], []
    for seed in range(4):
        module = random_lora(192, 144, 16, seed)
        adapter, report = one(module, scale_code="fp32")
        errors.append(dense_error(module, adapter))
        predicted.append(report.predicted_error)
        factors = []
        for factor in (module.b.double(), module.a.double()):
            u, s, vh = torch.linalg.svd(factor.abs())
            factors.append(signs(factor) * (s[0] * u[:, :1] * vh[:1]).abs())
        wanted = dense(module.b, module.a)
        rounded.append(float((dense(*factors) - wanted).norm() / wanted.norm()))
    assert max(errors) < 0.4 and max(errors) < 0.62 * min(rounded)
    assert fmean(predicted) == pytest.approx(fmean(rounded), rel=0.1)


def test_error_falls_with_rank():
    module = random_lora(96, 80, 8)
    errors = [dense_error(module, one(module, rank=rank)[0]) for rank in (1, 2, 4, 8, 16, 32)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.21 < errors[0]


def test_scale_codes_cost_little():
    module = random_lora(200, 160, 16)
    error = {code: dense_error(module, one(module, scale_code=code)[0]) for code in ScaleCode}
    assert error[ScaleCode.FP16] == pytest.approx(error[ScaleCode.FP32], rel=1e-3)
    assert error[ScaleCode.INT8] == pytest.approx(error[ScaleCode.FP32], rel=5e-3)
    assert error[ScaleCode.LOG4] == pytest.approx(error[ScaleCode.FP32], rel=3e-2)


def test_fitting_to_the_code_beats_coding_afterwards():
    coded, fitted = 0.0, 0.0
    for seed in range(4):
        module = random_lora(200, 160, 16, seed, spread=1.0)
        free = one(module, scale_code="fp32")[0].modules["m"]
        after = type(free)(
            free.a_signs, free.b_signs, *(encode_scales(decode_scales(s), ScaleCode.LOG4) for s in free.scales)
        )
        coded += dense_error(module, Adapter({"m": after}, ScaleCode.LOG4))
        fitted += dense_error(module, one(module, scale_code="log4")[0])
    assert fitted < 0.98 * coded


def test_a_lora_of_zeros_is_no_adapter_and_zero_rows_stay_zero():
    module = random_lora(24, 20, 4)
    zero, report = one(LoraModule(module.a, torch.zeros(24, 4), 2.0))
    assert not decode_scales(zero.modules["m"].s_out).any() and report.error == 0
    b, a = module.b.clone(), module.a.clone()
    b[5] = 0
    a[:, [0, 7]] = 0
    pruned = one(LoraModule(a, b, 2.0))[0].modules["m"]
    assert (decode_scales(pruned.s_out) == 0).nonzero().flatten().tolist() == [5]
    assert (decode_scales(pruned.s_in) == 0).nonzero().flatten().tolist() == [0, 7]


@pytest.mark.parametrize("size", [1e-18, 1e-4, 1e4])
def test_magnitude_is_shared_so_that_fp16_holds_it(size):
    module = random_lora(40, 56, 4)
    module = LoraModule(module.a * size, module.b, module.scaling)
    adapter, report = one(module, scale_code="fp16" if size > 1e-9 else "fp32")
    assert report.error < 0.6
    means = [decode_scales(s)[decode_scales(s) > 0].log2().mean() for s in adapter.modules["m"].scales]
    assert max(means) - min(means) < 5


def test_a_negative_scaling_goes_into_the_signs():
    module = random_lora(24, 20, 4)
    negative = LoraModule(module.a, module.b, -module.scaling)
    adapter, _ = one(negative)
    assert dense_error(negative, adapter) < 0.5


@given(st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 5)), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_the_gauge_changes_no_product_and_is_settled_at_once(shape, seed):
    d_out, d_in, k = shape
    g = torch.Generator().manual_seed(seed)
    sizes = [1, d_out], [1, k], [1, d_in]
    scales = [torch.exp(6 * torch.randn(1, generator=g)) * torch.rand(s, generator=g).double() for s in sizes]
    factors = SignFactors(torch.ones(1, d_out, k).double(), torch.ones(1, d_in, k).double(), *scales)
    fixed = fix_gauge(factors)
    before, after = (f.product.left @ f.product.right.mT for f in (factors, fixed))
    torch.testing.assert_close(before, after)
    again = fix_gauge(fixed)
    assert torch.equal(again.s_out, fixed.s_out) and torch.equal(again.s_mid, fixed.s_mid)


def test_conversion_is_deterministic_and_independent_of_threads():
    lora = LoraAdapter({f"m{i}": random_lora(64, 48, 8, i) for i in range(3)})
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        first, _ = convert_lora(lora)
        assert torch.get_num_threads() == 2
        torch.set_num_threads(1)
        second, _ = convert_lora(lora)
    finally:
        torch.set_num_threads(before)
    for path, module in first.modules.items():
        assert torch.equal(module.a_signs, second.modules[path].a_signs)
        assert torch.equal(module.s_in.values, second.modules[path].s_in.values)


def test_modules_of_many_shapes_and_ranks_keep_their_names():
    shapes = {"a.q": (24, 20, 4), "a.k": (12, 20, 4), "b.q": (24, 20, 4), "b.k": (12, 20, 2)}
    lora = LoraAdapter({path: random_lora(*shape, seed=i) for i, (path, shape) in enumerate(shapes.items())})
    told: list[int] = []
    adapter, reports = convert_lora(lora, progress=told.append)
    assert sum(told) == 4 and [r.path for r in reports] == sorted(shapes)
    for path, module in lora.modules.items():
        wanted = module.scaling * dense(module.b, module.a)
        assert (dense(*adapter.modules[path].factors()) - wanted).norm() < 0.6 * wanted.norm()


# LoRAs that have LoRDBA's form already


@pytest.mark.parametrize("code", ScaleCode)
def test_there_and_back_is_exact(code, tmp_path):
    converted, _ = convert_lora(LoraAdapter({f"m{i}": random_lora(45, 37, 6, i) for i in range(4)}), None, code)
    write_lora(to_lora(converted), tmp_path / "lora")
    again, reports = convert_lora(read_lora(tmp_path / "lora"), None, code)
    assert max(r.error for r in reports) < 1e-6 and max(max(r.rho_a, r.rho_b) for r in reports) < 1e-6
    for path, module in converted.modules.items():
        other = again.modules[path]
        assert torch.equal(module.a_signs, other.a_signs) and torch.equal(module.b_signs, other.b_signs)
        for s, t in zip(module.scales, other.scales, strict=True):
            if code is ScaleCode.FP32:
                torch.testing.assert_close(s.values, t.values, rtol=1e-5, atol=0)
            else:
                assert torch.equal(s.values, t.values)
                assert s.range is None or t.range is None or torch.equal(s.range, t.range)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 9), st.integers(0, 99), st.sampled_from(ScaleCode))
@settings(max_examples=30, deadline=None)
def test_signs_of_any_lordba_adapter_survive(d_in, d_out, r, seed, code):
    module = random_module(d_in, d_out, r, code, seed)
    again, reports = convert_lora(to_lora(Adapter({"m": module}, code)), scale_code=code)
    assert reports[0].error < (1e-6 if code is ScaleCode.FP32 else 3e-3)  # its range moves with the gauge in fp16
    assert torch.equal(again.modules["m"].a_signs, module.a_signs)
    assert torch.equal(again.modules["m"].b_signs, module.b_signs)


def test_a_higher_rank_of_an_exact_lora_is_exact():
    module = to_lora(Adapter({"m": random_module(20, 24, 4)}, ScaleCode.LOG4)).modules["m"]
    _, report = one(module, rank=7, scale_code="fp32")
    assert report.error < 1e-6
    assert one(module, rank=3, scale_code="fp32")[1].error > 0.05


# The commands


def test_outputs_that_would_lose_something_are_refused(tmp_path, monkeypatch):
    lora = saved_lora(tmp_path / "lora")
    other = saved_lora(tmp_path / "other")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for out, complaint in ((lora, "is read"), (other, "LORA adapter")):
        with pytest.raises(LordbaError, match=complaint):
            run_convert(monkeypatch, lora, out)
    run_convert(monkeypatch, lora, tmp_path / "out")
    run_convert(monkeypatch, lora, tmp_path / "out", "--scales", "int8")  # one of ours: replaced
    assert load_adapter(tmp_path / "out").scale_code is ScaleCode.INT8
    (tmp_path / "out" / "notes.txt").touch()
    with pytest.raises(LordbaError, match=r"notes\.txt"):
        run_convert(monkeypatch, lora, tmp_path / "out")
    assert {path: path.read_bytes() for path in before} == before


def test_an_interrupted_conversion_leaves_nothing(tmp_path, monkeypatch):
    lora = saved_lora(tmp_path / "lora")

    def interrupted(path: Path, *_: object) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("lordba.adapter_folder.write_safetensors", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_convert(monkeypatch, lora, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]


def test_the_base_is_recorded_and_checked(tiny_folder, tiny_base, tmp_path, monkeypatch):
    save_adapter(random_adapter(tiny_base.model, r=3), tmp_path / "made")
    run_convert(monkeypatch, tmp_path / "made", tmp_path / "lora", "--to", "lora")
    run_convert(monkeypatch, tmp_path / "lora", tmp_path / "out", "--base", tiny_folder)
    assert load_adapter(tmp_path / "out").base_fingerprint == fingerprint(tiny_base.model)
    foreign = saved_lora(tmp_path / "foreign")
    with pytest.raises(LordbaError, match=r"foreign.*q_proj.*64"):
        run_convert(monkeypatch, foreign, tmp_path / "out2", "--base", tiny_folder)
    assert not (tmp_path / "out2").exists()


def command(module: str, *args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", module, *map(str, args)], capture_output=True, text=True)


def test_the_commands(tmp_path):
    lora = saved_lora(tmp_path / "lora")
    done = command("lordba.convert", lora, tmp_path / "out", "--verbose")
    adapter = load_adapter(tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "model.layers.0.self_attn.q_proj" in done.stdout
    assert f"{adapter.nbytes:,} bytes" in done.stdout and f"{adapter.bits_per_weight:.4f} bits" in done.stdout
    shown = command("lordba.inspect", tmp_path / "out")
    assert shown.returncode == 0 and "LoRDBA, log4" in shown.stdout and "sha256" in shown.stdout
    assert "plain LoRA" in command("lordba.inspect", lora).stdout
    for arguments in (("lordba.convert", tmp_path / "none", tmp_path / "x"), ("lordba.inspect", tmp_path / "none")):
        failed = command(*arguments)
        assert failed.returncode == 2 and failed.stdout == ""
        assert failed.stderr.startswith("error: ") and failed.stderr.count("\n") == 1
    usage = command("lordba.convert", lora, tmp_path / "x", "--dtype", "float16")
    assert usage.returncode == 2 and "--dtype" in usage.stderr and not (tmp_path / "x").exists()


def test_the_exit_codes(capsys):
    def mistake() -> None:
        raise LordbaError("file: is\n  wrong")

    def interrupt() -> None:
        raise KeyboardInterrupt

    for main, code, message in ((mistake, 2, "error: file: is wrong\n"), (interrupt, 130, "interrupted\n")):
        with pytest.raises(SystemExit) as stopped:
            run_command(main)
        assert (stopped.value.code, capsys.readouterr().err) == (code, message)
    with pytest.raises(SystemExit) as stopped:
        run_command(lambda: None)
    assert stopped.value.code == 0
