"""What the Android app loads, as far as it runs without a phone: each skipped test says which build it needs.

LORDBA_ANDROID_LIBRARY: liblordba_ort.so linked for Android, by scripts/check_android_native.sh.
LORDBA_ARM64_PYTHON: a Python for 64-bit ARM with ONNX Runtime, by scripts/arm64_onnxruntime.sh.
LORDBA_ANDROID_JVM: the app's ExecuTorch runner in a JVM, by scripts/android_jvm.sh.
With LORDBA_REQUIRE_ANDROID=1 their absence is a failure, not a skip.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MAX_SEQ_LEN, VOCABULARY, random_module, some_tokens, tiny_model
from training_programs import add_training

from lordba.adapter import load_adapter
from lordba.export.executorch.train_program import training_program
from lordba.runtime.bundle import Bundle
from lordba.runtime.device_latents import read_latents
from lordba.runtime.device_trainer import DeviceTrainer, Optimizer
from lordba.runtime.session import Session
from lordba.scales import ScaleCode

PROJECT = Path(__file__).parents[1]
CHECK = PROJECT / "scripts" / "check_android_library.py"
BIONIC = PROJECT / "android_demo" / "native" / "freestanding" / "bionic.txt"
EXPORTS = ("RegisterCustomOps", "lordba_active_isa", "lordba_native_calls")
TOKENS, PREFILL = some_tokens(16), 12
LIMIT = 1e-5


def built(variable: str, script: str) -> str:
    """The path in an environment variable, or a skip that says who makes it."""
    path = os.environ.get(variable)
    if not path and os.environ.get("LORDBA_REQUIRE_ANDROID"):
        pytest.fail(f"LORDBA_REQUIRE_ANDROID is set and {variable} is not; set it to what {script} builds")
    if not path:
        pytest.skip(f"NOT TESTED FOR ANDROID: set {variable} to what {script} builds")
    return path


@pytest.fixture(scope="module")
def library() -> Path:
    return Path(built("LORDBA_ANDROID_LIBRARY", "scripts/check_android_native.sh"))


def check(
    library: Path, *, exports: tuple[str, ...] = EXPORTS, imports: Path = BIONIC, soname: str = "liblordba_ort.so"
):
    arguments = [library, "--soname", soname, "--imports", imports, "--exports", *exports]
    return subprocess.run([sys.executable, CHECK, *map(str, arguments)], capture_output=True, text=True)


def test_library_is_one_that_android_loads(library, tmp_path):
    good = check(library)
    assert good.returncode == 0 and "arm64, pages of 16 KB" in good.stdout, good.stderr
    fewer = tmp_path / "bionic.txt"
    fewer.write_text("".join(line for line in BIONIC.read_text().splitlines(True) if not line.startswith("malloc ")))
    newer = tmp_path / "newer.txt"
    newer.write_text(re.sub(r"^(sscanf .*) \d+$", r"\1 28", BIONIC.read_text(), flags=re.M))
    for bad, said in (
        (check(library, exports=EXPORTS[1:]), "exports ['RegisterCustomOps'] too much"),
        (check(library, exports=(*EXPORTS, "more")), "lacks ['more']"),
        (check(library, imports=fewer), "asks Android for ['malloc']"),
        (check(library, imports=newer), "asks Android for ['sscanf']"),
        (check(library, soname="libother.so"), "is called ['liblordba_ort.so']"),
    ):
        assert bad.returncode == 1 and said in bad.stderr, bad.stderr


def test_a_library_of_this_machine_is_refused():
    from lordba.backends.onnxruntime import library

    bad = check(library())
    assert bad.returncode == 1
    for said in ("is no 64-bit ARM", "not aligned to 16384", "needs the libraries"):
        assert said in bad.stderr


# Runs every node of a folder with the library of Android in ONNX Runtime: NAME.onnx with NAME.npz gives NAME.out.npz.
ON_ARM = """
import ctypes, pathlib, sys
import numpy as np
import onnxruntime
library, folder = sys.argv[1], pathlib.Path(sys.argv[2])
loaded = ctypes.CDLL(library)
loaded.lordba_native_calls.restype = ctypes.c_uint64
loaded.lordba_active_isa.restype = ctypes.c_char_p
for program in sorted(folder.glob("*.onnx")):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 2
    options.register_custom_ops_library(library)
    session = onnxruntime.InferenceSession(str(program), options)
    for given in sorted(folder.glob(program.stem + "-*.npz")):
        before = loaded.lordba_native_calls()
        (y,) = session.run(None, dict(np.load(given)))
        np.savez(given.with_suffix(".out"), y=y, calls=loaded.lordba_native_calls() - before)
print(onnxruntime.__version__, loaded.lordba_active_isa().decode())
"""
CPUS = {"max": "i8mm", "cortex-a76": "neon"}
SHAPES = [(64, 96, 8, 1), (37, 21, 5, 3), (576, 192, 16, 1), (576, 192, 16, 40), (33, 9, 1, 2)]


@pytest.mark.parametrize("cpu", CPUS)
def test_the_androids_library_computes_in_onnxruntime_on_arm(library, tmp_path, cpu):
    """The very file that goes into the app, in stock ONNX Runtime, against float64; a flipped sign shows."""
    python = built("LORDBA_ARM64_PYTHON", "scripts/arm64_onnxruntime.sh")
    import onnxruntime
    from test_onnx_op import TOLERANCE, error, flipped, inputs

    from lordba.export.onnx.probe import node_model

    cases = {}
    for code in ScaleCode:
        for dtype in TOLERANCE:
            name = f"{code.value}-{str(dtype).removeprefix('torch.')}"
            (tmp_path / f"{name}.onnx").write_bytes(node_model(code, dtype).SerializeToString())
            for i, (d_in, d_out, r, tokens) in enumerate(SHAPES):
                module = random_module(d_in, d_out, r, code)
                feeds = inputs(module, tokens, dtype)
                for kind, given in (("plain", feeds), ("flipped", flipped(feeds, "B"))):
                    np.savez(tmp_path / f"{name}-{i}-{kind}.npz", **given)
                cases[f"{name}-{i}"] = module, feeds, TOLERANCE[dtype]
    result = subprocess.run(
        [python, "-c", ON_ARM, str(library), str(tmp_path)],
        env=os.environ | {"QEMU_CPU_MODEL": cpu, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.stdout.split() == [onnxruntime.__version__, CPUS[cpu]], result.stderr[-2000:]
    for name, (module, feeds, tolerance) in cases.items():
        plain, other = (np.load(tmp_path / f"{name}-{kind}.out.npz") for kind in ("plain", "flipped"))
        off = error(module, feeds, plain["y"])
        assert plain["calls"] == 1 and plain["y"].dtype == feeds["x"].dtype and off <= tolerance, name
        assert error(module, feeds, other["y"]) > max(4 * off, 1e-4), name


class Jvm:
    """The app's Kotlin in a JVM, with JNI's own checks on."""

    def __init__(self, command: str, folder: Path) -> None:
        self.command, self.folder = command, folder

    def call(self, *arguments: object) -> str:
        result = subprocess.run([self.command, *map(str, arguments)], capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-2000:]
        assert "WARNING in native method" not in result.stdout and "FATAL ERROR" not in result.stdout, result.stdout
        return result.stdout

    def logits(self, bundle: Bundle, adapters: list[str]) -> torch.Tensor:
        """[adapters, steps, vocabulary], from one program."""
        file = self.folder / "logits.f32"
        self.call("logits", bundle.folder, file, PREFILL, ",".join(map(str, TOKENS)), *adapters)
        return torch.from_numpy(np.fromfile(file, "<f4")).view(len(adapters), -1, VOCABULARY)


@pytest.fixture
def jvm(tmp_path: Path) -> Jvm:
    return Jvm(built("LORDBA_ANDROID_JVM", "scripts/android_jvm.sh"), tmp_path)


@pytest.fixture(scope="module")
def expected(tiny_bundle: Callable[..., Bundle]) -> Callable[[Bundle, str | None], torch.Tensor]:
    def logits(bundle: Bundle, adapter: str | None) -> torch.Tensor:
        session = Session(bundle, adapter)
        rows = [session.feed(TOKENS[:PREFILL]), *(session.feed([token]) for token in TOKENS[PREFILL:])]
        return torch.from_numpy(np.stack(rows))

    return logits


@pytest.mark.parametrize("mode", ["ptd", "input"])
def test_the_apps_runner_gives_the_sessions_logits_through_every_swap(jvm, tiny_bundle, expected, mode):
    bundle = tiny_bundle("none", mode)
    order = ["north", "none", "south", "north"]
    found = jvm.logits(bundle, order)
    for name, steps in zip(order, found, strict=True):
        for other in ("north", "south", "none"):
            wanted = expected(bundle, None if other == "none" else other)
            worst = ((steps - wanted).abs().max() / wanted.abs().max()).item()
            assert worst <= LIMIT if other == name else worst > 0.01, (name, other, worst)


MISTAKES = {
    "missing": "/nirgendwo/Üß漢😀/model.pte: cannot be read",
    "operator": "lacks: lordba::no.out, aten::no.out",
    "mode": "takes adapters as input, the manifest says ptd",
    "target": "is for coreml, which does not run on Android",
    "threads": "the number of threads is -1",
    "not a program": "is no program with a method forward",
    "too early": "no adapter is in use",
    "no file": "needs a file for the base alone too",
    "missing file": "/nirgendwo: cannot be read",
    "token": f"token 1000000 is not one of the program's {VOCABULARY}",
    "negative token": "token -1 is not one",
    "no token": "tokens at once, not 0",
    "too many tokens": f"takes 1 to {MAX_SEQ_LEN - 1} tokens at once",
    "too far": "1 tokens after 2147483647 do not fit",
    "negative start": "1 tokens after -1 do not fit",
    "damaged": "the program failed with ExecuTorch's error 0x",
    "in use after its owner closed it": f"{VOCABULARY} logits",
    "closed adapter": "what is closed cannot be used",
    "strange adapter": "an adapter that another runner loaded",
    "many files": "nowhere: cannot be read",
    "closed": "the program is closed",
}


def test_every_mistake_becomes_one_sentence_in_java(jvm, tiny_bundle):
    said = dict(line.split(": ", 1) for line in jvm.call("mistakes", tiny_bundle("none", "input").folder).splitlines())
    assert {name: text for name, text in MISTAKES.items() if text not in said.get(name, "")} == {}
    assert said.keys() == MISTAKES.keys()


@pytest.fixture(scope="module")
def trainable(tiny_bundle: Callable[..., Bundle], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny bundle (int4, adapters as inputs) with a training program for adapters of its own rank."""
    bundle = tiny_bundle("int4", "input")
    paths = [path for path in bundle.manifest.modules if path]
    made = training_program(tiny_model(), "fused", paths, 8, "int4", MAX_SEQ_LEN, bundle.manifest.base["fingerprint"])
    return add_training(bundle, tmp_path_factory.mktemp("trainable") / "bundle", made.pte, 8)


def trained_here(bundle: Bundle, start: str | None, steps: int, seed: int) -> tuple[list[float], DeviceTrainer]:
    """The losses, and the trainer after so many steps, in this process."""
    assert bundle.manifest.training is not None
    trainer = DeviceTrainer(bundle.folder / bundle.manifest.training["program"], Optimizer("adamw8bit"), seed)
    if start:
        read_latents(bundle, start, trainer)
    losses = []
    for _ in range(steps):
        losses.append(trainer.add(TOKENS[:-1], TOKENS[1:], np.float32(1 / (len(TOKENS) - 1))))
        trainer.update(0.02, 1.0)
    return losses, trainer


@pytest.mark.parametrize("start", ["north", None])
def test_training_in_the_app_makes_the_same_adapter(jvm, trainable, tmp_path, start):
    steps, seed, tokens = 6, 7, ",".join(map(str, TOKENS))
    said = jvm.call("train", trainable.folder, start or "none", tmp_path / "made", steps, seed, tokens).splitlines()
    found, mistakes = [float(line) for line in said[:steps]], said[steps:]
    losses, trainer = trained_here(trainable, start, steps, seed)
    assert found == pytest.approx(losses, rel=1e-6 if start is None else 1e-4) and losses[-1] < losses[0]
    assert all(abs(a / b - 1) > 1e-3 for a, b in zip(found, trained_here(trainable, "south", 1, 8)[0], strict=False))
    assert f"a step takes 2 to {trainer.longest} tokens, not 1" in mistakes[0]
    assert len(mistakes) == 3 and not any("nothing was thrown" in text for text in mistakes)
    adapter = load_adapter(tmp_path / "made")
    assert set(adapter.modules) == {path for path in trainable.manifest.modules if path}
    if start is None:  # both begin with the same latents, bit for bit
        for i, path in enumerate(trainable.manifest.modules):
            packed, module = trainer.pack(i, "log4"), adapter.modules[path]
            assert np.array_equal(packed.a_signs.ravel(), module.a_signs.numpy().ravel())
            assert np.array_equal(packed.b_signs.ravel(), module.b_signs.numpy().ravel())
            for codes, scales in zip(packed.scales, (module.s_in, module.s_mid, module.s_out), strict=True):
                assert np.array_equal(codes.ravel(), scales.values.numpy().ravel())


def test_a_bundle_that_cannot_train_says_so(jvm, tiny_bundle, tmp_path):
    bundle = tiny_bundle("none", "input")
    with pytest.raises(AssertionError, match="holds no training program; export it with --target executorch --train"):
        jvm.call("train", bundle.folder, "none", tmp_path / "made", 2, 1, "5,6,7")


def test_nothing_is_left_in_memory_and_a_watch_sees_the_peak(jvm, tiny_bundle):
    said = jvm.call("memory", tiny_bundle("none", "input").folder)
    assert int(re.findall(r"left behind: (-?\d+)", said)[0]) < 16 << 20, said  # 200 leaked programs are 200 MB and more
    seen, made = map(int, re.findall(r"seen: (\d+) of (\d+)", said)[0])
    assert 0.95 * made <= seen <= 1.5 * made
