"""`python -m lordba.profile`: what it measures, what it refuses to say, its files, its page, other machines."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import MAX_SEQ_LEN
from golden.demo import make

from lordba import profile
from lordba.console import run_command
from lordba.errors import LordbaError
from lordba.profiling import emulator, local, operators, plan, worker
from lordba.profiling.changes import changes
from lordba.profiling.page import page
from lordba.profiling.plan import Variant
from lordba.profiling.record import BlockSeries, Device, Series, overhead, profile_json, read_profile
from lordba.runtime.bundle import Bundle

GOLDEN = Path(make.__file__).parent / "profile" / "profile.json"
ARM_RUNNER = os.environ.get("LORDBA_ARM64_RUNNER")
DEVICE = Device("a machine", "x86_64", "Linux", 8 << 30, 4 << 30)


@pytest.fixture
def command(monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """Runs the command in this process: exit code, stdout, stderr."""

    def command(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lordba.profile", *map(str, arguments)])
        with pytest.raises(SystemExit) as exited:
            run_command(profile.main)
        return (exited.value.code, *capsys.readouterr())

    return command


@pytest.fixture(scope="module")
def measured(
    tiny_bundle: Callable[..., Bundle], comparison: Callable[[str, str], Bundle], tmp_path_factory
) -> tuple[dict, str, str]:
    """The record of the tiny ExecuTorch bundles, what the command printed, and its page."""
    folder = tmp_path_factory.mktemp("profile")
    arguments = [tiny_bundle("none", "input").folder, "--adapter", "north"]
    for form in ("lora-fp32", "none"):
        arguments += ["--against", comparison("executorch", form).folder]
    arguments += ["--prompt-lengths", "8,32,128", "--decode", "4", "--rounds", "3", "--processes", "1"]
    arguments += ["--json", folder / "p.json", "--html", folder / "p.html"]
    run = subprocess.run([sys.executable, "-m", "lordba.profile", *arguments], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "prompt length 128 is left out: the program takes 63 tokens at once" in run.stderr
    return read_profile(folder / "p.json"), run.stdout, (folder / "p.html").read_text()


def test_the_record_has_the_golden_shape(measured):
    record, _, _ = measured
    golden = json.loads(GOLDEN.read_text())
    assert set(golden) | {"memory", "operators"} == set(record)
    assert {frozenset(row) for row in record["rows"]} == {frozenset(row) for row in golden["rows"]}
    assert {frozenset(row["deviceInfo"]) for row in record["rows"]} == {frozenset(golden["rows"][0]["deviceInfo"])}
    assert any("prompt length 128" in note for note in record["conditions"]["notes"])


def test_every_variant_has_its_phases(measured):
    record, _, _ = measured
    titles = ["base only", "dense LoRA fp32", "LoRDBA program, no adapter", "LoRDBA"]
    counts = {("load", 0): profile.LOADS, ("prefill", 8): 3, ("prefill", 32): 3, ("decode", 1): 12}
    for (phase, length), samples in counts.items():
        rows = [row for row in record["rows"] if (row["phase"], row["T"]) == (phase, length)]
        assert [plan.title_of(row) for row in rows] == titles
        assert {row["samples"] for row in rows} == {samples}
        assert all(0 < row["ms_p50"] <= row["ms_p90"] <= row["ms_p99"] for row in rows)
        base, *others = rows
        assert base["overhead_pct"] is None and base["noise_pct"] is None
        for row in others:
            quoted = row["overhead_pct"]
            exact = 100 * (row["ms_p50"] / base["ms_p50"] - 1)
            assert quoted is None or (abs(quoted) >= row["noise_pct"] and quoted == pytest.approx(exact, abs=5))
    (swap,) = [row for row in record["rows"] if row["phase"] == "swap"]
    assert (swap["adapter_name"], swap["samples"]) == ("north", 10)


def test_groups_of_operators_make_up_the_run(measured):
    record, _, _ = measured
    assert len(record["operators"]) == 4 * 2
    for row in record["operators"]:
        ms = row["ms"]
        assert ms["total"] > 0 and all(ms[group] >= 0 for group in operators.GROUPS)
        assert (ms["adapters"] > 0) == (row["adapter"] == "lordba")


def test_memory_is_what_the_variants_add(measured):
    record, _, _ = measured
    peaks = {plan.title_of(row): row["peak_bytes"] for row in record["memory"]}
    assert len(peaks) == 4 and all(1e5 < peak < 1e8 for peak in peaks.values())


def test_the_terminal_shows_it(measured):
    _, printed, _ = measured
    assert "tiny, none, ExecuTorch, 1 thread" in printed and "where the time goes" in printed and "█" in printed


def test_onnx_runtime(comparison, tiny_base, north_south, tmp_path):
    from lordba.export.bundle import ExportOptions, export_onnx
    from lordba.runtime.bundle import read_bundle

    export_onnx(tiny_base, north_south, ExportOptions(tmp_path / "bundle", "none", None, MAX_SEQ_LEN))
    bundle, lora = read_bundle(tmp_path / "bundle"), comparison("onnx", "lora-fp32")
    variants = plan.variants_of(bundle, "north", [comparison("onnx", "none"), lora])
    steps = plan.Plan(variants, [16], 3, 16, threads=1, rounds=1, loads=1, swaps=2)
    read = plan.Plan.read(steps.json())
    times = worker.measure(read, lambda: None) + worker.load(read, lambda: None)
    assert {(row["variant"], row["phase"]) for row in times} == {
        *((i, phase) for i in range(4) for phase in ("load", "prefill", "decode")),
        (3, "swap"),
    }
    for row in worker.operators(steps, lambda: None):
        ms = row["ms"]
        assert ms["linears"] > 0 and ms["attention"] > 0 and ms["runtime"] > 0
        assert (ms["adapters"] > 0) == (variants[row["variant"]].adapter != "none")


def series(adapter: str, size: float, phase: str = "decode", **about: object) -> Series:
    samples = [size * factor for factor in (0.99, 1.0, 1.01, 1.0, 0.995)]
    return Series("onnx", "m", "int4", adapter, phase, 1, 1, samples, **about)  # type: ignore[arg-type]


def record_of(*all_series: Series) -> dict:
    return json.loads(profile_json(all_series, DEVICE, {"cpu": "x"}, {"warm_up": 1}))


def test_noise_comes_from_blocks_where_samples_share_their_luck():
    blocks = [[10.0] * 50, [10.6] * 50, [10.3] * 50]
    samples = [sample for block in blocks for sample in block]
    one, other = (
        BlockSeries("onnx", "m", "int4", name, "decode", 1, 1, samples, blocks=blocks) for name in ("none", "lordba")
    )
    by_hand = 100 * 2 * 2 * 1.4826 * 0.3 / 3**0.5 / 10.3
    assert overhead(other, one)[1] == pytest.approx(by_hand)
    plain = [Series("onnx", "m", "int4", name, "decode", 1, 1, samples) for name in ("none", "lordba")]
    assert overhead(plain[1], plain[0])[1] < by_hand / 2


@pytest.mark.parametrize("processes, block", [(3, 4), (4, 12)])
def test_many_processes_are_samples_of_the_noise_and_load_in_turn(processes, block, monkeypatch, tiny_bundle):
    """Three processes are too few to tell it: their rounds, of 4 tokens each, are the samples."""
    steps = plan.Plan([Variant("", "onnx", "m", "int4", name) for name in ("none", "lordba")], [8], 4, 16, 1, 3, 2, 2)
    turns = []

    def worker(plan, mode, report):
        if mode != "time":
            return [0, 0] if mode == "memory" else []
        turns.append([10.0 + plan.first % 2 + 0.01 * k for k in range(12)])
        return [{"variant": i, "phase": "decode", "T": 1, "samples": turns[plan.first]} for i in range(2)]

    monkeypatch.setattr(local, "run_worker", worker)
    text = local.profile(tiny_bundle("none", "input"), steps, [1], processes, [], lambda *_: None)
    (noise,) = [row["noise_pct"] for row in json.loads(text)["rows"] if row["adapter"] == "lordba"]
    assert len(turns) == processes
    samples = [sample for turn in turns for sample in turn]
    blocks = [samples[i : i + block] for i in range(0, len(samples), block)]
    series = BlockSeries("onnx", "m", "int4", "none", "decode", 1, 1, samples, blocks=blocks)
    assert noise == pytest.approx(overhead(series, series)[1], abs=0.01)


def test_two_profiles_are_compared():
    a = record_of(series("none", 10.0), series("lordba", 11.0))
    b = record_of(series("none", 10.01), series("lordba", 10.5), series("lordba", 1.0, "swap"))
    same, faster = changes(a, b)
    assert same.change_pct is None and same.noise_pct > 0.1
    assert faster.change_pct == pytest.approx(-4.55, abs=0.01)
    with pytest.raises(LordbaError, match="no row in common"):
        changes(a, record_of(series("none", 10.0, "prefill")))


def test_compare_and_show(command, tmp_path):
    for name, size in (("a", 11.0), ("b", 12.0)):
        text = profile_json([series("none", 10.0), series("lordba", size)], DEVICE, {}, {})
        (tmp_path / f"{name}.json").write_text(text)
    code, out, _ = command("--compare", tmp_path / "a.json", tmp_path / "b.json")
    assert code == 0 and "+9.1 %" in out and "a machine" in out
    code, out, _ = command("--show", GOLDEN, "--html", tmp_path / "golden.html")
    assert code == 0 and "dense LoRA fp16" in out and "Pixel 9" in (tmp_path / "golden.html").read_text()
    (tmp_path / "c.json").write_text("[]")
    code, _, err = command("--show", tmp_path / "c.json")
    assert code == 2 and "is no profile" in err


def test_the_benchmark_writes_what_the_record_says(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import latency

    record = record_of(series("none", 10.0), series("lordba", 11.0, adapter_name="n"), series("lordba", 10.01))
    assert latency.tables(record).splitlines() == [
        "**m, int4, ONNX Runtime, 1 thread**",
        "",
        "| | decode, per token |",
        "|---|---:|",
        "| base only | 10.00 ms |",
        "| LoRDBA | +10.0 ±1.4 % |",
        "| LoRDBA program, no adapter | within ±1.3 % |",
    ]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--adapter", "east"], "no adapter 'east'"),
        (["--prompt-lengths", "64"], "at most 63 tokens"),
        (["--decode", "80"], "decode fewer"),
        (["--rounds", "0"], "at least 1"),
        (["--rounds", "2", "--processes", "1"], "nothing of the noise"),
        (["--clock", "cpu", "--threads", "2"], "one thread"),
        (["--against", "itself"], "--adapter-form none"),
        (["--device", "qemu-arm64"], "needs --runner"),
        (["--device", "ios"], "export the profile from the app"),
    ],
)
def test_mistakes(command, tiny_bundle, arguments, said):
    folder = tiny_bundle("none", "input").folder
    code, out, err = command(folder, *(folder if word == "itself" else word for word in arguments))
    assert code == 2 and out == "" and said in err


def test_bundles_that_differ_are_not_compared(tiny_bundle, comparison):
    with pytest.raises(LordbaError, match="its target is onnx"):
        plan.variants_of(tiny_bundle("none", "input"), "north", [comparison("onnx", "none")])
    with pytest.raises(LordbaError, match="name it with --against"):
        plan.variants_of(comparison("onnx", "none"), None, [])


def test_the_page_needs_nothing_else(measured):
    _, _, html = measured
    assert not re.search(r"https?://|<script|<link|@import|url\(|src=", html)
    titles = ("base only", "dense LoRA fp32", "LoRDBA program, no adapter", "LoRDBA")
    assert all(f">{title}<" in html for title in titles) and html.count("<svg") == 3


@pytest.mark.parametrize("theme, dark", [("light", False), ("dark", True)])
def test_a_browser_shows_the_page(tmp_path, theme, dark):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("NOT TESTED IN A BROWSER: chromium is missing")
    from matplotlib import image

    file, shot = tmp_path / "page.html", tmp_path / "page.png"
    file.write_text(
        page(record_of(series("none", 10.0), series("dense_lora", 13.0), series("lordba", 11.0, adapter_name="n")))
    )
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", scheme]
    options += [f"--user-data-dir={tmp_path / 'user'}", "--window-size=900,900", f"--screenshot={shot}"]
    subprocess.run([browser, *options, file.as_uri()], check=True, capture_output=True, timeout=120)
    pixels = image.imread(shot)[..., :3]
    assert bool(pixels[2, 2].mean() < 0.3) is dark
    bars = {"lordba": "58a0ff" if dark else "1f6feb", "dense_lora": "c2703a" if dark else "a8541b"}
    for colour in bars.values():
        wanted = np.array([int(colour[i : i + 2], 16) for i in (0, 2, 4)]) / 255
        shown = np.abs(pixels - wanted).max(-1) < 0.01
        # the bar, and not only its key in the legend: longer than that, and shown where the chart is
        assert shown.sum(1).max() > 60, colour


ADB = """#!{python}
import pathlib, shutil, subprocess, sys
root = pathlib.Path({root!r})
verb, *rest = sys.argv[1:]
with open(root / "log", "a") as log:
    print(verb, *rest, file=log)
local = lambda text: text.replace("/data/local/tmp/lordba", str(root / "phone"))
if verb == "push":
    shutil.copy(rest[0], local(rest[1]))
elif "getprop" in rest[0]:
    print({{"model": "Pixel 9", "abi": "arm64-v8a", "release": "16"}}.get(rest[0].rpartition(".")[2], ""))
else:
    sys.exit(subprocess.run(local(rest[0]), shell=True).returncode)
"""
RUNNER = """#!{python}
import pathlib, sys
program, *words = sys.argv[1:]
options = dict(zip(words[::2], words[1::2]))
folder = pathlib.Path(program).parent
assert (folder / "model.pte").stat().st_size > 1000 and pathlib.Path("libhelp.so").is_file()
adapter = options.get("--adapter")
assert adapter is None or (adapter == str(folder / "adapter.blob") and pathlib.Path(adapter).is_file())
slow = 1.5 if adapter and pathlib.Path(adapter).stat().st_size > 2000 else 1.0
n, first = len(options["--tokens"].split(",")), int(options["--prefill"])
lines = ["load 0 100"]
for repeat in range(int(options["--repeat"])):
    cold = 10 if repeat == 0 else 1
    lines.append(f"prefill {{first}} {{first * slow * cold}}")
    lines += [f"decode 1 {{4 * slow * cold}}"] * (n - first)
pathlib.Path(options["--times"]).write_text("\\n".join(lines) + "\\n")
"""


def test_a_phone(command, tiny_bundle, tmp_path, monkeypatch):
    """Against a stand-in for adb, which runs everything here: no phone was met."""
    (tmp_path / "bin").mkdir()
    for file, text in ((tmp_path / "bin" / "adb", ADB), (tmp_path / "build" / "runner", RUNNER)):
        file.parent.mkdir(exist_ok=True)
        file.write_text(text.format(python=sys.executable, root=str(tmp_path)))
        file.chmod(0o755)
    (tmp_path / "build" / "libhelp.so").write_bytes(b"")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    arguments = [tiny_bundle("none", "input").folder, "--adapter", "north", "--device", "adb", "--runner"]
    arguments += [tmp_path / "build" / "runner", "--prompt-lengths", "8", "--decode", "4", "--processes", "2"]
    code, _, err = command(*arguments, "--json", tmp_path / "phone.json")
    assert code == 0, err
    record = read_profile(tmp_path / "phone.json")
    assert (
        record["rows"][0]["deviceInfo"]["device"] == "Pixel 9" and record["rows"][0]["deviceInfo"]["os"] == "Android 16"
    )
    found = {(row["adapter"], row["phase"]): (row["ms_p50"], row["samples"]) for row in record["rows"]}
    assert found == {
        ("none", "load"): (100, 4),
        ("none", "prefill"): (8, 6),
        ("none", "decode"): (4, 24),
        ("lordba", "load"): (100, 4),
        ("lordba", "prefill"): (12, 6),
        ("lordba", "decode"): (6, 24),
    }
    assert [row["overhead_pct"] for row in record["rows"] if row["adapter"] == "lordba"] == [0, 50, 50]


def test_no_adb(command, tiny_bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    runner = ["--device", "adb", "--runner", tmp_path / "runner"]
    code, _, err = command(tiny_bundle("none", "input").folder, *runner)
    assert code == 2 and "adb is not on the PATH" in err


def test_instructions_are_counted_from_the_log():
    log = b"""----------------
IN: main
0x0055:  d503201f  nop
0x0059:  d503201f  nop

Trace 0: 0x7f00 [00/0000000000000055/00/00] main
Trace 0: 0x7f00 [00/0000000000000055/00/00] main
----------------
IN:
0x0061:  d503201f  nop

Trace 0: 0x7f40 [00/0000000000000061/00/00]
Trace 0: 0x7f00 [00/0000000000000055/00/00] main
"""
    assert emulator.instructions_of(log.splitlines(keepends=True)) == 2 + 2 + 1 + 2


@pytest.mark.skipif(not ARM_RUNNER, reason="NOT TESTED ON ARM: set LORDBA_ARM64_RUNNER (see tests/test_runner.py)")
def test_instructions_of_a_program(tiny_bundle, comparison):
    assert ARM_RUNNER is not None
    variants = plan.variants_of(tiny_bundle("none", "input"), "north", [comparison("executorch", "none")])
    steps = plan.Plan([variants[0], variants[-1]], [16], 1, 8, threads=1, rounds=1, loads=1, swaps=0)
    record = json.loads(emulator.count_instructions(Path(ARM_RUNNER), steps, [], lambda *_: None))
    counts = {(row["adapter"], row["phase"]): row["instructions"] for row in record["instructions"]}
    assert record["rows"] == []
    assert 10_000 < counts["none", "decode"] < counts["lordba", "decode"] < counts["lordba", "prefill"]
    assert counts["none", "prefill"] < counts["lordba", "prefill"]
