"""The training loop in C++ over lordba_trainer.h, on this machine and on emulated 64-bit ARM, against DeviceTrainer.

On this machine the program is compiled against the library that pip built. The ARM part needs what test_runner needs:
scripts/arm64_runner.sh builds the trainer beside the runner.
"""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from conftest import some_tokens
from test_runner import CPUS, PROJECT
from training_programs import program, trainer_of

from lordba.backends import built_library
from lordba.backends import executorch as backend
from lordba.blob import read_module

SEQUENCES = [some_tokens(33, seed=seed) for seed in range(3)]
STEPS, RATE = 6, 0.01


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> str:
    source, library = PROJECT / "backends" / "executorch" / "runner", built_library(backend.LIBRARY, backend.__path__)
    out = tmp_path_factory.mktemp("trainer") / "lordba_trainer"
    includes = [f"-I{PROJECT / 'backends' / folder}" for folder in ("training", "kernels")]
    link = [str(library), "-Wl,--allow-shlib-undefined"]  # by its path, beside which it finds ExecuTorch
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror"]
    command = [
        os.environ.get("CXX", "c++"),
        *flags,
        *includes,
        str(source / "lordba_trainer.cpp"),
        "-o",
        str(out),
        *link,
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    return str(out)


@pytest.fixture(params=("native", *CPUS))
def command(request: pytest.FixtureRequest) -> list[str]:
    if request.param == "native":
        return [request.getfixturevalue("native")]
    runner = os.environ.get("LORDBA_ARM64_RUNNER")
    if not runner:
        pytest.skip("NOT TESTED ON ARM: set LORDBA_ARM64_RUNNER to what scripts/arm64_runner.sh builds")
    trainer = str(Path(runner).with_name("lordba_trainer"))
    return ["qemu-aarch64-static", "-L", "/usr/aarch64-linux-gnu", "-cpu", CPUS[request.param], trainer]


def call(command: list[str], *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, timeout=300)


def losses(result: subprocess.CompletedProcess[str]) -> list[float]:
    assert result.returncode == 0, result.stderr[-2000:]
    lines = [line.split() for line in result.stdout.splitlines()]
    return [float(loss) for _, loss in lines]


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "train.pte").write_bytes(program("llama", "int4", 2)[0])
    (tmp_path / "tokens").write_text("".join(" ".join(map(str, ids)) + "\n" for ids in SEQUENCES))
    return tmp_path / "train.pte", tmp_path / "tokens"


def test_the_loop_trains_and_packs_what_python_trains_and_packs(command, files, tmp_path):
    trainer = trainer_of(tmp_path, program("llama", "int4", 2)[0])
    expected = []
    for step in range(STEPS):
        ids = SEQUENCES[step % len(SEQUENCES)]
        expected.append(trainer.add(ids[:-1], ids[1:], 1 / (len(ids) - 1)))
        trainer.update(RATE, 1.0)
    trainer.write_adapter(tmp_path / "expected", "fp32")
    train, tokens = files
    out = tmp_path / "adapter.blob"
    arguments = [train, "--tokens", tokens, "--adapter", out, "--rate", RATE, "--scales", "fp32"]
    found = losses(call(command, *arguments, "--steps", STEPS))
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert expected[-1] < expected[STEPS - 4] - 0.01  # the same sequence, three steps before
    if len(command) == 1:
        assert out.read_bytes() == (tmp_path / "expected").read_bytes()
    # Sums in another order may turn the sign of a latent that is next to zero.
    for i in range(len(trainer.modules)):
        ours, theirs = (read_module(_blob(path), i) for path in (out, tmp_path / "expected"))
        assert ours is not None and theirs is not None
        for found_part, wanted in zip(ours[2:], theirs[2:], strict=True):
            np.testing.assert_allclose(found_part.numpy(), wanted.numpy(), rtol=0.02)
        flipped = np.unpackbits(ours[1].numpy() ^ theirs[1].numpy()).mean()
        assert np.array_equal(ours[0].numpy(), theirs[0].numpy()) and flipped < 0.01
    # In two parts, with a checkpoint between: the same bytes.
    parts = tmp_path / "parts.blob"
    halves = [*arguments[:4], parts, *arguments[5:], "--checkpoint", tmp_path / "checkpoint", "--save-every", 2]
    first = losses(call(command, *halves, "--steps", STEPS - 2))
    second = losses(call(command, *halves, "--steps", STEPS))
    assert first + second == found and parts.read_bytes() == out.read_bytes()


def _blob(path: Path):
    import torch

    return torch.from_numpy(np.fromfile(path, np.uint8))


def test_mistakes(native, files, tmp_path):
    train, tokens = files
    (tmp_path / "words").write_text("once upon\n")
    (tmp_path / "beyond").write_text("5 100000\n")
    good = [train, "--tokens", tokens, "--adapter", tmp_path / "out"]
    cases: list[tuple[list[object], str]] = [
        ([], ""),
        ([train], "--tokens or --adapter is missing"),
        ([*good[1:]], "no program given"),
        ([tokens, *good[1:]], "no training program"),
        ([train, "--tokens", tmp_path / "words", *good[3:]], "something else than token ids"),
        ([train, "--tokens", tmp_path / "beyond", *good[3:]], "training program failed"),
        ([*good, "--rate", "much"], "--rate: expected a number"),
        ([*good, "--optimizer", "lion"], "--optimizer: 'lion' is none"),
        ([*good, "--template", tokens, "--steps", 1], "is no adapter file"),
        ([*good, "--checkpoint", tokens], "is no checkpoint"),
    ]
    for arguments, said in cases:
        result = call([native], *arguments)
        assert result.returncode == 2 and said in result.stderr, (arguments, result.stderr)
    assert not (tmp_path / "out").exists()
    assert "example:" in call([native], "--help").stdout
