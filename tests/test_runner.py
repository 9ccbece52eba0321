"""The runner without Python, on this machine and on emulated 64-bit ARM, against lordba.runtime.session and float64.

The ARM part needs a cross-compiled runner: `scripts/arm64_toolchain.sh && scripts/arm64_runner.sh FOLDER`, then
LORDBA_ARM64_RUNNER=FOLDER/build/lordba_runner. Without it these tests skip.
"""

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MAX_SEQ_LEN, VOCABULARY, some_tokens
from test_lowering import flipped, mean_kl
from torch import Tensor, nn

from lordba.profiling.device import read_times
from lordba.runtime.bundle import Bundle
from lordba.runtime.session import Session

PROJECT = Path(__file__).parents[1]
# qemu 7.2 computes wrong int8 products with SME (logits off by their own size); qemu 10 computes the right ones.
CPUS = {"arm64 with i8mm": "max,sme=off", "arm64 with dotprod": "cortex-a76", "arm64": "cortex-a53"}
MACHINES = ("native", *CPUS)
LIMIT = 1e-5  # of the largest logit; the same arithmetic in another order gives 1e-6
TOKENS = some_tokens(48)
PREFILL = 24


def build_native(folder: Path) -> Path:
    """The runner for this machine, against the installed executorch."""
    spec = find_spec("executorch")
    assert spec is not None and spec.submodule_search_locations
    source = PROJECT / "backends" / "executorch" / "runner"
    prefix = f"-DCMAKE_PREFIX_PATH={next(iter(spec.submodule_search_locations))}"
    for arguments in (
        ["-S", source, "-B", folder, prefix],
        ["--build", folder, "--parallel", "2", "--target", "lordba_runner"],
    ):
        result = subprocess.run([sys.executable, "-m", "cmake", *arguments], capture_output=True, text=True)
        assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    return folder / "lordba_runner"


@pytest.fixture(scope="session")
def native_runner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_native(tmp_path_factory.mktemp("runner"))


def command_on(machine: str, request: pytest.FixtureRequest) -> list[str]:
    """How to start the runner on a machine."""
    if machine == "native":
        return [str(request.getfixturevalue("native_runner"))]
    runner = os.environ.get("LORDBA_ARM64_RUNNER")
    if not runner:
        pytest.skip("NOT TESTED ON ARM: set LORDBA_ARM64_RUNNER to what scripts/arm64_runner.sh builds")
    return ["qemu-aarch64-static", "-L", "/usr/aarch64-linux-gnu", "-cpu", CPUS[machine], runner]


class Runner:
    """Calls the runner; `logits` returns [steps, vocabulary], `generate` the tokens printed."""

    def __init__(self, command: list[str], folder: Path) -> None:
        self.command, self.folder = command, folder

    def call(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*self.command, *map(str, arguments)], capture_output=True, text=True, timeout=300)

    def logits(self, program: Path, adapter: Path | None, tokens: list[int], prefill: int) -> Tensor:
        file = self.folder / "logits.f32"
        arguments = ["--tokens", ids(tokens), "--prefill", prefill, "--logits", file]
        result = self.call(program, *arguments, *(["--adapter", adapter] if adapter else []))
        assert result.returncode == 0 and result.stdout == "", result.stderr[-2000:]
        return torch.from_numpy(np.fromfile(file, np.float32)).view(len(tokens) - prefill + 1, -1)

    def generate(self, program: Path, adapter: Path | None, tokens: list[int], n: int) -> list[int]:
        result = self.call(
            program, "--tokens", ids(tokens), "--generate", n, *(["--adapter", adapter] if adapter else [])
        )
        assert result.returncode == 0 and result.stdout.endswith("\n"), result.stderr[-2000:]
        return [int(word) for word in result.stdout.split()]


def ids(tokens: list[int]) -> str:
    return ",".join(map(str, tokens))


@pytest.fixture
def native(native_runner: Path, tmp_path: Path) -> Runner:
    return Runner([str(native_runner)], tmp_path)


@pytest.fixture(params=MACHINES)
def runner(request: pytest.FixtureRequest, tmp_path: Path) -> Runner:
    return Runner(command_on(request.param, request), tmp_path)


@pytest.fixture(scope="session")
def expected(tiny_bundle: Callable[..., Bundle]) -> Callable[[str, str, str | None], Tensor]:
    """lordba.runtime.session's logits from the last token of the prefill on, [steps, vocabulary]."""

    def logits(base_quant: str, mode: str, adapter: str | None) -> Tensor:
        session = Session(tiny_bundle(base_quant, mode), adapter)
        rows = [session.feed(TOKENS[:PREFILL]), *(session.feed([token]) for token in TOKENS[PREFILL:])]
        return torch.from_numpy(np.stack(rows))

    return logits


def error(found: Tensor, wanted: Tensor) -> Tensor:
    """The worst error of each step, relative to the largest logit of all."""
    return (found - wanted).abs().amax(-1) / wanted.abs().max()


@pytest.mark.parametrize("adapter", ["north", "south", None])
@pytest.mark.parametrize("mode", ["ptd", "input"])
def test_logits_equal_the_sessions(runner, tiny_bundle, expected, mode, adapter):
    bundle = tiny_bundle("none", mode)
    found = runner.logits(bundle.program, bundle.adapter_file(adapter), TOKENS, PREFILL)
    for other in ("north", "south", None):
        worst = error(found, expected("none", mode, other)).max()
        assert worst <= LIMIT if other == adapter else worst > 0.01, (other, worst)


@pytest.mark.parametrize("mode", ["ptd", "input"])
def test_a_single_flipped_sign_shows(runner, tiny_bundle, expected, mode, tmp_path):
    bundle = tiny_bundle("none", mode)
    broken = tmp_path / "broken"
    broken.write_bytes(flipped(bundle.adapter_file("north").read_bytes(), 7, 1))
    found = runner.logits(bundle.program, broken, TOKENS, PREFILL)
    assert error(found, expected("none", mode, "north")).max() > 10 * LIMIT


@pytest.mark.parametrize("base_quant", ["int4", "int8"])
@pytest.mark.parametrize("adapter", ["north", "south", None])
def test_quantized_bases_agree_but_for_roundings(runner, tiny_bundle, expected, base_quant, adapter):
    """Activations are rounded to int8: where 1e-7 decides a rounding, a step's logits move by some 1e-3."""
    bundle = tiny_bundle(base_quant, "ptd")
    found = runner.logits(bundle.program, bundle.adapter_file(adapter), TOKENS, PREFILL)
    wanted = expected(base_quant, "ptd", adapter)
    assert error(found, wanted).median() <= LIMIT
    assert mean_kl(wanted, found) < 1e-4
    other = expected(base_quant, "ptd", "south" if adapter == "north" else "north")
    assert error(found, other).median() > 0.01 and mean_kl(other, found) > 0.01


@pytest.mark.parametrize("mode", ["ptd", "input"])
def test_generation_equals_the_sessions(runner, tiny_bundle, mode):
    bundle = tiny_bundle("none", mode)
    for adapter in ("north", None):
        for prompt, n in ((TOKENS[:9], 8), (some_tokens(60), 1000), (some_tokens(MAX_SEQ_LEN), 3)):
            wanted = list(Session(bundle, adapter).generate(prompt, n))
            assert runner.generate(bundle.program, bundle.adapter_file(adapter), prompt, n) == wanted
            assert len(wanted) == min(n, MAX_SEQ_LEN - len(prompt) + 1)  # the cache is full, or n are made


class AttentionProbe(nn.Module):
    """Attention alone as a program: tokens choose rows of tables q, k, v; "logits" are the outputs' sum over tokens.

    A decode step, of one token, shows its output as it is.
    """

    def __init__(self, heads: int, kv_heads: int, dim: int, max_len: int, size: float, is_causal: bool = True) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.dim, self.max_len, self.is_causal = heads, kv_heads, dim, max_len, is_causal
        generator = torch.Generator().manual_seed(heads)
        for name, n in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            table = torch.randn(heads * dim, n * dim, generator=generator) * (1 if name == "v" else size)
            self.register_buffer(name, table)
            self.register_buffer(f"{name}_cache", torch.zeros(1, max_len, n, dim))

    def rows(self, name: str, tokens: Tensor) -> Tensor:
        """[1, T, heads, dim]"""
        return nn.functional.embedding(tokens, getattr(self, name)).unflatten(-1, (-1, self.dim))

    def forward(self, tokens: Tensor, input_pos: Tensor) -> Tensor:
        from lordba.export.executorch.attention import attend
        from lordba.export.executorch.decoder import start_position

        start = start_position(input_pos, tokens.shape[1], self.max_len)
        q, k, v = (self.rows(name, tokens) for name in "qkv")
        if self.is_causal:
            y = attend(q, k, v, self.k_cache, self.v_cache, start, self.dim**-0.5)
        else:
            y = torch.ops.llama.custom_sdpa(q, self.k_cache, self.v_cache, start, None, 0.0, False)
        return y.sum(1, keepdim=True).flatten(2)

    def write(self, path: Path, eos_id: int = -1) -> Path:
        """Export as a program for the runner."""
        from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

        length = torch.export.Dim("length", min=1, max=self.max_len - 1)
        example = torch.zeros(1, 8, dtype=torch.long), torch.zeros(1, dtype=torch.long)
        sizes = {"get_max_seq_len": self.max_len - 1, "get_max_context_len": self.max_len}
        constants = sizes | {"get_vocab_size": self.heads * self.dim, "get_eos_ids": [eos_id]}
        with torch.no_grad():
            program = torch.export.export(self, example, dynamic_shapes=({1: length}, None), strict=False)
            config = EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True)
            edge = to_edge_transform_and_lower(program, compile_config=config, constant_methods=constants)
        path.write_bytes(edge.to_executorch().buffer)
        return path

    def reference(self, tokens: list[int], prefill: int, causal: bool = True, adjacent: bool = True) -> Tensor:
        """What the program shows at every step, by the definition in float64: softmax(q k^T / sqrt(dim)) v.

        Heads that share a key lie side by side if `adjacent`, else kv_heads apart.
        """
        group = self.heads // self.kv_heads
        q, k, v = (self.rows(name, torch.tensor([tokens]))[0].double().transpose(0, 1) for name in "qkv")
        k, v = ((x.repeat_interleave(group, 0) if adjacent else x.repeat(group, 1, 1)) for x in (k, v))
        scores = q @ k.transpose(1, 2) * self.dim**-0.5
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores[0], dtype=torch.bool).triu(1), -torch.inf)
        rows = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
        return torch.cat([rows[:prefill].sum(0, keepdim=True), rows[prefill:]])


@pytest.fixture(scope="session")
def probes(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[AttentionProbe, Path]]:
    """A probe and its program, exported once."""
    folder = tmp_path_factory.mktemp("probes")

    @functools.cache
    def exported(*arguments: int | float) -> tuple[AttentionProbe, Path]:
        probe = AttentionProbe(*arguments)
        return probe, probe.write(folder / f"{len(list(folder.iterdir()))}.pte")

    return exported


# Heads, key heads, channels: one key head per head, SmolLM2's, a group wider than a tile, channels that fill no vector.
SHAPES = ((4, 4, 16), (9, 3, 64), (14, 2, 8), (5, 1, 13))


@pytest.mark.parametrize("size, limit", [(1.0, 3e-6), (6.0, 1e-4)], ids=["usual", "scores that overflow exp"])
@pytest.mark.parametrize("heads, kv_heads, dim", SHAPES)
def test_attention_is_softmax_over_the_visible_keys(runner, probes, heads, kv_heads, dim, size, limit):
    probe, program = probes(heads, kv_heads, dim, 220, size)
    tokens = torch.randint(heads * dim, (200,), generator=torch.Generator().manual_seed(1)).tolist()
    for prefill in (1, 3, 64, 150):
        used = tokens[: prefill + 50]
        found, wanted = runner.logits(program, None, used, prefill).double(), probe.reference(used, prefill)
        assert error(found[:1], wanted[:1]).max() <= limit  # a sum over the prefill's rows
        assert error(found[1:], wanted[1:]).max() <= limit
    assert error(found, probe.reference(used, prefill, causal=False)).max() > 100 * limit
    if 1 < kv_heads < heads:
        assert error(found, probe.reference(used, prefill, adjacent=False)).max() > 100 * limit


def test_attention_that_is_not_built_in_is_refused(native, tmp_path):
    program = AttentionProbe(4, 2, 16, 32, 1.0, is_causal=False).write(tmp_path / "probe.pte")
    result = native.call(program, "--tokens", "1,2,3")
    assert result.returncode == 1 and "only causal attention" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: the program failed")


def test_generation_ends_with_an_end_token(native, tmp_path):
    probe = AttentionProbe(4, 2, 16, 32, 1.0)
    tokens = native.generate(probe.write(tmp_path / "endless.pte"), None, [5, 6, 7], 12)
    assert len(tokens) == 12 and len(set(tokens)) > 2
    end = next(token for token in tokens if token != tokens[0])
    ending = probe.write(tmp_path / "ending.pte", eos_id=end)
    assert native.generate(ending, None, [5, 6, 7], 12) == tokens[: tokens.index(end)]


MISTAKES = {
    "no program": (["--tokens", "1"], "no program"),
    "two programs": (["{program}", "{program}", "--tokens", "1"], "one program at a time"),
    "missing program": (["nowhere.pte", "--tokens", "1"], "nowhere.pte: cannot be read"),
    "not a program": (["{ptd}", "--tokens", "1"], "is no program"),
    "no tokens": (["{program}"], "--tokens is missing"),
    "empty tokens": (["{program}", "--tokens", ", "], "holds no token"),
    "bad token": (["{program}", "--tokens", "1,x"], "found 'x'"),
    "negative token": (["{program}", "--tokens", "-1"], "found '-1'"),
    "huge token": (["{program}", "--tokens", "99999999999999999999"], "found '9999"),
    "beyond the vocabulary": (
        ["{program}", "--tokens", VOCABULARY, "--adapter", "{ptd}"],
        f"not one of the program's {VOCABULARY}",
    ),
    "too long": (["{program}", "--tokens", ids([5] * (MAX_SEQ_LEN + 1)), "--adapter", "{ptd}"], "--max-seq-len"),
    "missing token file": (["{program}", "--tokens", "@nowhere"], "nowhere: cannot be read"),
    "unknown option": (["{program}", "--token", "1"], "--token: unknown option"),
    "no value": (["{program}", "--tokens"], "expected a value"),
    "prefill 0": (["{program}", "--tokens", "1", "--prefill", "0"], "--prefill"),
    "adapter forgotten": (["{program}", "--tokens", "1"], "cannot be loaded with no adapter"),
    "adapter forgotten as input": (["{input}", "--tokens", "1"], "takes its adapter as an input"),
    "empty adapter": (["{input}", "--tokens", "1", "--adapter", "/dev/null"], "/dev/null: cannot be read"),
    "a folder as adapter": (["{input}", "--tokens", "1", "--adapter", "."], ".: cannot be read"),
    "missing adapter": (["{program}", "--tokens", "1", "--adapter", "nowhere"], "nowhere: cannot be read"),
    "not a data file": (["{program}", "--tokens", "1", "--adapter", "{blob}"], "cannot be loaded with the adapter"),
    "unwritable": (["{program}", "--tokens", "1", "--adapter", "{ptd}", "--logits", "nowhere/x"], "cannot be written"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(native, tiny_bundle, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    ptd, blob = tiny_bundle("none", "ptd"), tiny_bundle("none", "input")
    files = {"program": ptd.program, "ptd": ptd.adapter_file("north")}
    files |= {"input": blob.program, "blob": blob.adapter_file("north")}
    arguments, said = MISTAKES[name]
    result = native.call(*(str(argument).format(**files) for argument in arguments))
    assert result.returncode == 2 and result.stdout == "", result.stderr[-500:]
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: ") and said in last
    assert list(tmp_path.iterdir()) == []


def test_logits_appear_whole_or_not_at_all(native, tiny_bundle, tmp_path):
    bundle, file = tiny_bundle("none", "input"), tmp_path / "logits.f32"
    damaged = tmp_path / "damaged.blob"
    damaged.write_bytes(b"\0" * 64)
    arguments = [bundle.program, "--tokens", "5,6", "--logits", file, "--adapter"]
    result = native.call(*arguments, damaged)
    assert result.returncode == 1 and "module 0: " in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["damaged.blob"]
    file.write_text("old")
    assert native.call(*arguments, bundle.adapter_file("north")).returncode == 0
    assert file.stat().st_size == 4 * VOCABULARY


def test_times_of_every_step(native, tiny_bundle, tmp_path):
    bundle, file = tiny_bundle("none", "input"), tmp_path / "times.txt"
    arguments = ["--tokens", ids(TOKENS[:6]), "--prefill", 4, "--repeat", 2, "--threads", 1, "--times", file]
    arguments += ["--adapter", bundle.adapter_file("north"), "--logits", tmp_path / "logits.f32"]
    result = native.call(bundle.program, *arguments)
    assert result.returncode == 0, result.stderr[-2000:]
    times = read_times(file.read_text())
    steps = [("prefill", 4), ("decode", 1), ("decode", 1)]
    assert [tuple(step) for *step, _ in times] == [("load", 0), *steps, *steps]
    assert all(ms > 0 for *_, ms in times)
    first, again = np.fromfile(tmp_path / "logits.f32", np.float32).reshape(2, 3, -1)
    assert np.array_equal(first, again) and not np.array_equal(first[0], first[1])


def test_help_teaches(native):
    result = native.call("--help")
    assert result.returncode == 0 and "example:" in result.stdout and "--adapter" in result.stdout
    assert native.call().returncode == 2
