"""The kernel benchmark: its contestants agree, its report has the agreed shape, its targets can fail."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lordba.errors import LordbaError
from lordba.scales import ScaleCode

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
pytest.importorskip("onnxruntime", reason="the benchmark's packages are not installed: pip install '.[bench]'")
sys.path.insert(0, str(BENCHMARKS))

from contest import baselines, measure, native, report  # noqa: E402

ROW_KEYS = set(
    [
        "phase",
        "T",
        "d_in",
        "d_out",
        "r",
        "dtype",
        "isa",
        "threads",
        "cache",
        "ours_us",
        "baseline",
        "baseline_us",
        "ratio",
    ]
)
TINY = ["--only", "d=576", "r=8", "T=1", "--quick", "--repeats", "2", "--sample-ms", "0.1"]
LIMITS = {"fp32": 1e-6, "bf16": 2.0**-8}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return native.build(tmp_path_factory.mktemp("build"))


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, BENCHMARKS / "kernels.py", *arguments], capture_output=True, text=True, timeout=300
    )


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape, dtype=np.float32)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("tokens", [1, 2, 7, 13, 200])
@pytest.mark.parametrize(("d_in", "d_out", "r"), [(64, 128, 4), (576, 1536, 16), (1088, 64, 60)])
@pytest.mark.parametrize(("name", "dtype"), [("c_fp32", np.float32), ("c_fp16w", np.float16)])
def test_dense_lora_in_c_agrees_with_torch(library, name, dtype, d_in, d_out, r, tokens, threads):
    x, a, b = random(tokens, d_in), random(r, d_in).astype(dtype), random(d_out, r).astype(dtype)
    pool = native.Pool.of_dense(library, np.ascontiguousarray(a.T), np.ascontiguousarray(b.T), 3)
    dense = baselines.DenseC(name, pool, d_out, threads)
    dense.set(x)
    x64, a64, b64 = (torch.from_numpy(m).double() for m in (x, a, b))
    expected = torch.nn.functional.linear(torch.nn.functional.linear(x64, a64), b64).numpy()
    assert measure.relative_error(dense.delta(), expected) < 1e-6
    dense.seconds(4, cold=True)  # every module of the pool is the same, and each call adds to y
    assert measure.relative_error(dense.delta(), 6 * expected) < 1e-6
    pool.close()


@pytest.mark.parametrize("prepared", [True, False])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512"])
def test_driver_agrees_with_the_eager_op(library, isa, dtype, prepared):
    if not library.has_isa(isa.encode()):
        pytest.skip(f"this CPU has no {isa}")
    weights = measure.Weights.random(measure.Shape(192, 12), ScaleCode.LOG4)
    pool = native.Pool.of_signs(library, isa, weights.blob, prepared, 3)
    for threads in (1, 2):
        signs = measure.SignKernels(isa, dtype, pool, weights, threads)
        for tokens in (1, 5, 64):
            signs.set(random(tokens, 192))
            assert signs.error() < LIMITS[dtype]
            if dtype == "fp32":
                once = signs.delta() / 2  # a second call on the same y
                signs.seconds(4, cold=True)
                np.testing.assert_allclose(signs.delta(), 7 * once, rtol=1e-5, atol=1e-6 * np.abs(once).max())
    pool.close()


def test_one_flipped_sign_is_an_error_seen(library):
    weights = measure.Weights.random(measure.Shape(192, 12), ScaleCode.LOG4)
    flipped = weights.blob.copy()
    flipped[32 + 64 + 5] ^= 4  # after header and record: in A
    pool = native.Pool.of_signs(library, "scalar", flipped, False, 1)
    signs = measure.SignKernels("scalar", "fp32", pool, weights, 1)
    signs.set(random(3, 192))
    assert signs.error() > 100 * LIMITS["fp32"]
    with pytest.raises(LordbaError, match="computes something else"):
        measure.check(signs.name, 0.03, measure.Shape(192, 12), 3)
    pool.close()


@pytest.mark.parametrize("cold", [False, True])
@pytest.mark.parametrize("name", ["torch_fp32", "torch_bf16", "ort_fp32"])
def test_runtimes_agree_with_float64(name, cold):
    a, b, x = random(8, 96), random(64, 8), random(5, 96)
    if name == "ort_fp32":
        contestant = baselines.OnnxRuntime(a, b, 4, threads=1)
    else:
        dtype = torch.float32 if name == "torch_fp32" else torch.bfloat16
        contestant = baselines.Torch(name, dtype, a, b, 4, threads=1)
    contestant.set(x)
    expected = x.astype(np.float64) @ a.T @ b.T
    assert measure.relative_error(contestant.delta(), expected) < (0.02 if "bf16" in name else 1e-5)
    assert contestant.seconds(3, cold) > 0


def test_an_isa_that_is_not_there_is_an_error(library):
    weights = measure.Weights.random(measure.Shape(64, 4), ScaleCode.FP32)
    with pytest.raises(LordbaError, match="avx1024"):
        native.Pool.of_signs(library, "avx1024", weights.blob, True, 1)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("report") / "kernels.json"
    result = command(*TINY, "--json", path, "--check-targets")
    assert result.returncode == 0, result.stderr
    assert "times faster than" in result.stdout and "Targets" in result.stdout
    return path


def test_the_report_has_the_agreed_shape(written):
    data = json.loads(written.read_text())
    assert {"machine", "conditions", "rows"} <= data.keys() and data["conditions"]["complete"]
    assert all(row.keys() >= ROW_KEYS for row in data["rows"])
    best = [row for row in data["rows"] if row["isa"] == data["rows"][0]["isa"] and row["cache"] == "hot"]
    assert sorted(row["baseline"] for row in best) == sorted(measure.BASELINES)
    for row in data["rows"]:
        assert row["ratio"] == pytest.approx(row["baseline_us"] / row["ours_us"], rel=1e-2)
        assert row["max_rel_err"] < LIMITS[row["dtype"]]


def test_plot_and_docs_come_from_a_report(written, tmp_path):
    docs = tmp_path / "kernels.md"
    begin, end = report.MARKERS
    docs.write_text(f"before\n{begin}\nstale\n{end}\nafter\n")
    result = command("--from", written, "--plot", tmp_path / "kernels.svg", "--docs", docs)
    assert result.returncode == 0, result.stderr
    text = docs.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "stale" not in text
    assert "](kernels.svg)" in text and "| d | r |" in text
    assert (tmp_path / "kernels.svg").read_text().lstrip().startswith("<?xml")


def test_docs_without_markers_are_refused_before_measuring(tmp_path):
    docs = tmp_path / "kernels.md"
    docs.write_text("mine\n")
    result = command(*TINY, "--docs", docs)
    assert result.returncode == 2 and "must stand in it" in result.stderr
    assert docs.read_text() == "mine\n"


@pytest.mark.parametrize("arguments", [["--only", "d=577"], ["--only", "width=576"], ["--baselines", "numpy"]])
def test_unknown_axes_and_values_are_refused(arguments):
    result = command(*arguments)
    assert result.returncode == 2 and result.stderr.startswith("error:")


def test_interrupted_it_keeps_what_it_has(tmp_path):
    path = tmp_path / "kernels.json"
    script = (
        "import sys, kernels\n"
        "measure = kernels.measure\n"
        "def interrupted(*arguments):\n"
        "    yield next(measure(*arguments))\n"
        "    raise KeyboardInterrupt\n"
        "kernels.measure = interrupted\n"
        "kernels.run_command(kernels.main)\n"
    )
    arguments = [*TINY, "--baselines", "c_fp32", "--dtypes", "fp32", "--json", str(path)]
    result = subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=BENCHMARKS, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 130, result.stderr
    data = json.loads(path.read_text())
    assert not data["conditions"]["complete"] and {row["cache"] for row in data["rows"]} == {"hot"}


def test_a_target_is_missed_by_one_slow_cell(written):
    data = json.loads(written.read_text())
    cell = next(row for row in data["rows"] if row["baseline"] == "c_fp32" and row["cache"] == "hot")
    rows = [cell | {"r": 16, "d_in": d, "ratio": ratio} for d, ratio in ((576, 2.5), (4096, 9.0))]
    verdicts = {t.text: t.verdict for t in report.targets(data | {"rows": rows})}
    assert verdicts["decode hot, r=16, C fp32"] == "met"
    assert verdicts["decode cold, r=16, C fp32"] == "not measured"
    rows[0]["ratio"] = 2.3
    verdicts = {t.text: t.verdict for t in report.targets(data | {"rows": rows})}
    assert verdicts["decode hot, r=16, C fp32"] == "missed"
