"""Training on the device end to end: the packer's bytes, the command, what it imports, kills, and the new adapter."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MAX_SEQ_LEN, some_tokens, tiny_model
from peft import get_peft_model
from training_programs import add_training, program, trainer_of

import lordba
from lordba import train_on_device
from lordba.adapter import CONFIG_NAME, WEIGHTS_NAME, Adapter, load_adapter
from lordba.blob import make_blob, read_module
from lordba.errors import LordbaError
from lordba.export.bundle import ExportOptions, export_executorch
from lordba.ops import sign_adapter_blob
from lordba.runtime.bank import AdapterBank
from lordba.runtime.bundle import Bundle, read_bundle
from lordba.runtime.device_latents import read_latents
from lordba.runtime.device_trainer import SCALE_CODES, DeviceTrainer
from lordba.runtime.install import write_blob
from lordba.runtime.session import Session
from lordba.scales import ScaleCode
from lordba.training.latents import to_latents, to_stored
from lordba.training.tuner import LordbaConfig, lordba_layers

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
LAYERS = 3
R = 8


def difficult(trainer: DeviceTrainer, seed: int = 0) -> None:
    """Latents with zeros, negative zeros, whole rows of zeros, and sizes from tiny to large."""
    generator = np.random.default_rng(seed)
    latents = generator.standard_normal(trainer.latents.shape) * np.exp(4 * generator.standard_normal(1))
    latents *= 10.0 ** generator.integers(-6, 3, latents.shape)
    latents[generator.random(latents.shape) < 0.1] = 0.0
    latents[generator.random(latents.shape) < 0.1] = -0.0
    trainer.latents[:] = latents.astype(np.float32)
    a, b = trainer.factors(1)
    a[2], b[:, 3], b[5] = 0.0, 0.0, 0.0
    trainer.factors(2)[1][:] = 0.0


def packed_in_python(trainer: DeviceTrainer, paths: tuple[str, ...], code: str) -> Adapter:
    factors = [tuple(torch.from_numpy(f.copy()) for f in trainer.factors(i)) for i in range(len(paths))]
    modules = {path: to_stored(a, b, ScaleCode(code)) for path, (a, b) in zip(paths, factors, strict=True)}
    return Adapter(modules, ScaleCode(code))


@pytest.fixture(scope="module")
def exported(tiny_base, north_south, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """What `--train` writes, with data files as adapters; tests must not write to it."""
    folder = tmp_path_factory.mktemp("exported") / "bundle"
    export_executorch(tiny_base, north_south, ExportOptions(folder, "int4", "ptd", MAX_SEQ_LEN, train="fused"))
    return read_bundle(folder)


@pytest.fixture(scope="module")
def trainable(tiny_bundle, exported: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    """Fresh copies of the bundle, and of one whose adapters are inputs, with the same training program."""

    def copy(mode: str) -> Bundle:
        folder = tmp_path_factory.mktemp("trainable") / "bundle"
        if mode == "ptd":
            shutil.copytree(exported.folder, folder)
            return read_bundle(folder)
        return add_training(tiny_bundle("int4", mode), folder, (exported.folder / "train.pte").read_bytes(), R)

    return copy


def test_the_export_adds_a_program_that_it_has_checked(exported, tiny_bundle):
    training = exported.manifest.training
    assert training is not None and (training["form"], training["max_seq_len"], training["r"]) == (
        "fused",
        MAX_SEQ_LEN,
        R,
    )
    assert {file.path for file in exported.manifest.files} >= {"train.pte", "model.pte"}
    assert all(name.startswith("lordba::") for name in training["requires"])
    (check,) = (check for check in exported.manifest.parity if check.check == "training program")
    assert check.passed and 0 < check.value < check.limit
    record = json.loads((tiny_bundle("int4", "input").folder / "manifest.json").read_text())
    assert "training" not in record and tiny_bundle("int4", "input").manifest.training is None
    with pytest.raises(LordbaError, match="--delegate xnnpack"):
        export_executorch(None, {}, ExportOptions(Path("nowhere"), delegate="coreml", train="fused"))  # type: ignore[arg-type]


@pytest.mark.parametrize("code", SCALE_CODES)
def test_the_packers_bytes_are_those_of_python(code, tmp_path):
    pte, paths = program("llama", "int4", LAYERS)
    trainer = trainer_of(tmp_path, pte)
    for seed in range(3):
        difficult(trainer, seed)
        if code != "fp32":
            trainer.latents[:] = np.clip(trainer.latents, -50, 50)  # scales stay inside fp16
        expected = packed_in_python(trainer, paths, code)
        for i, path in enumerate(paths):
            found, module = trainer.pack(i, code), expected.modules[path]
            assert found.a_signs.tobytes() == module.a_signs.numpy().tobytes()
            assert found.b_signs.tobytes() == module.b_signs.numpy().tobytes()
            for n, scales in enumerate(module.scales):
                assert found.scales[n].tobytes() == scales.values.numpy().tobytes(), (path, n)
                if scales.range is not None:
                    assert found.ranges is not None and found.ranges[n].tobytes() == scales.range.numpy().tobytes()
        trainer.write_adapter(tmp_path / "blob", code)
        assert (tmp_path / "blob").read_bytes() == make_blob(list(expected.modules.values())).numpy().tobytes()


def test_the_packer_refuses_what_it_cannot_hold(tmp_path):
    trainer = trainer_of(tmp_path, program("llama", "int4", LAYERS)[0])
    trainer.latents[:] = 1e6
    assert trainer.pack(0, "fp32").scales[0][0] == 1
    with pytest.raises(LordbaError, match="exceeds fp16"):
        trainer.pack(0, "log4")
    trainer.latents[trainer.modules[0].offset] = np.nan
    with pytest.raises(LordbaError, match="NaN or infinity"):
        trainer.pack(0, "fp32")


def test_the_folder_is_that_of_pack_without_refit(tmp_path, exported):
    pte, paths = program("llama", "int4", LAYERS)
    trainer = trainer_of(tmp_path, pte)
    difficult(trainer)
    trainer.latents[:] = np.clip(trainer.latents, -50, 50)
    config = LordbaConfig(r=4, lora_alpha=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    config.target_modules = {path.rsplit(".", 1)[-1] for path in paths}
    model: Any = get_peft_model(tiny_model(num_hidden_layers=LAYERS), config)
    for i, path in enumerate(paths):
        a, b = (torch.from_numpy(factor.copy()) for factor in trainer.factors(i))
        lordba_layers(model)[path].set_latents("default", a, b)
    for code in SCALE_CODES:
        lordba.pack(model, tmp_path / "python", code, base_fingerprint="sha256:ab", refit=False)
        named = replace(exported.manifest, modules=list(paths), base={"name": "tiny", "fingerprint": "sha256:ab"})
        bundle = Bundle(exported.folder, named)
        train_on_device.save_folder(train_on_device.pack(trainer, bundle, code), tmp_path / "device")
        for name in (WEIGHTS_NAME, CONFIG_NAME):
            ours = (tmp_path / "device" / name).read_bytes()
            theirs = (tmp_path / "python" / name).read_bytes()
            if name == CONFIG_NAME:  # the model's name, which PEFT takes from its configuration
                ours, theirs = (
                    json.dumps(json.loads(t) | {"base_model_name_or_path": 0}).encode() for t in (ours, theirs)
                )
            assert ours == theirs, (code, name)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text((files("lordba.export") / "parity_text.txt").read_text())
    return path


def arguments(bundle: Bundle, text: Path, output: Path, **options: Any) -> list[str]:
    chosen = {"data": text, "adapter": "mine", "output": output, "steps": 24, "batch-size": 2, "max-length": 32}
    chosen |= {"lr": 0.02, "save-every": 4} | options
    return [str(bundle.folder), *(word for name, value in chosen.items() for word in (f"--{name}", str(value)))]


def run(*args: Any, **options: Any) -> dict[str, Any]:
    """The command in this process; its report."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train_on_device", *arguments(*args, **options)])
        train_on_device.main()
    return json.loads((args[2] / train_on_device.REPORT_NAME).read_text())


@pytest.mark.parametrize("mode", ["ptd", "input"])
def test_a_trained_adapter_is_in_the_bundle_and_does_what_was_trained(mode, trainable, text, tmp_path):
    bundle = trainable(mode)
    report = run(bundle, text, tmp_path / "out", scales={"ptd": "log4", "input": "fp32"}[mode])
    assert sum(report["losses"][-6:]) < sum(report["losses"][:6]) - 6 * 0.3
    bundle = read_bundle(bundle.folder)
    adapter = load_adapter(tmp_path / "out" / "adapter")
    assert adapter.base_fingerprint == bundle.manifest.base["fingerprint"] and adapter.r == R
    write_blob(bundle, adapter, tmp_path / "expected")
    installed = bundle.adapter_file("mine")
    assert installed is not None and installed.read_bytes() == (tmp_path / "expected").read_bytes()
    assert bundle.adapter("mine").bytes == adapter.nbytes == report["bytes"]
    losses = {}
    for name in (None, "north", "mine"):
        session, total = Session(bundle, name), 0.0
        for tokens in (some_text_tokens(bundle, text)[i : i + 33] for i in range(0, 4 * 33, 33)):
            session.reset()
            for token, following in itertools.pairwise(tokens):
                logits = torch.from_numpy(session.feed([token]))
                total -= logits.log_softmax(-1)[following].item() / 128
        losses[name] = total
    assert losses["mine"] < losses[None] - 0.3 and losses["mine"] < losses["north"] - 0.3
    with AdapterBank(bundle).use("mine") as session:
        assert list(session.generate(some_tokens(8), 4))


def some_text_tokens(bundle: Bundle, text: Path) -> list[int]:
    return train_on_device.load_tokenizer(bundle).encode(text.read_text()).ids


def test_the_loop_imports_neither_pytorch_nor_transformers(trainable, text, tmp_path):
    bundle = trainable("ptd")
    code = (
        "import sys; from lordba import train_on_device; train_on_device.main();"
        "names = {'torch', 'transformers', 'executorch', 'torchao', 'peft'};"
        "foreign = {m.partition('.')[0] for m in sys.modules} & names;"
        "print(sorted(foreign)); assert not foreign"
    )
    words = arguments(bundle, text, tmp_path / "out", steps=2)
    result = subprocess.run([sys.executable, "-c", code, *words], env=ENVIRONMENT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.splitlines()[-1] == "[]" and "next: python -m lordba.run" in result.stdout
    read_bundle(bundle.folder).adapter("mine")


def test_a_run_that_was_killed_at_any_moment_resumes_to_the_same_bytes(trainable, text, tmp_path):
    whole = run(trainable("ptd"), text, tmp_path / "whole", steps=60)
    bundle, output = trainable("ptd"), tmp_path / "out"
    words = arguments(bundle, text, output, steps=60)
    command = [sys.executable, "-m", "lordba.train_on_device", *words]
    kills = 0
    for wait in (0.0, 0.011, 0.037):
        process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        seen = _stamp(output / "checkpoint")
        deadline = time.monotonic() + 60
        while _stamp(output / "checkpoint") == seen and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(wait)
        os.kill(process.pid, signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        assert all(a.name in ("north", "south", "mine") for a in read_bundle(bundle.folder).manifest.adapters)
    assert kills
    report = run(bundle, text, output, steps=60)
    assert report["losses"] == whole["losses"]
    for name in (WEIGHTS_NAME, CONFIG_NAME):
        assert (output / "adapter" / name).read_bytes() == (tmp_path / "whole" / "adapter" / name).read_bytes()
    assert read_bundle(bundle.folder).adapter("mine").bytes == report["bytes"]


def _stamp(path: Path) -> int:
    return path.stat().st_mtime_ns if path.is_file() else 0


def test_training_goes_on_from_an_adapter_of_the_bundle(trainable, text, tmp_path, north_south):
    bundle = trainable("ptd")
    trainer = DeviceTrainer(train_on_device.training_of(bundle, 32))
    read_latents(bundle, "north", trainer)
    for i, path in enumerate(bundle.manifest.modules):
        expected = to_latents(north_south["north"].modules[path or ""])
        for found, latent in zip(trainer.factors(i), expected, strict=True):
            np.testing.assert_allclose(found, latent.numpy(), rtol=1e-6)
    tokens = some_tokens(32)
    loss = trainer.add(tokens[:-1], tokens[1:], 1 / 31)
    session = Session(bundle, "north")
    rows = [torch.from_numpy(session.feed([token])).log_softmax(-1) for token in tokens[:-1]]
    inference = -sum(row[token].item() for row, token in zip(rows, tokens[1:], strict=True)) / 31
    assert loss == pytest.approx(inference, rel=0.02)  # activations are int8 there
    report = run(bundle, text, tmp_path / "out", init="north", steps=2)
    assert len(report["losses"]) == 2


def test_mistakes(trainable, tiny_bundle, text, tmp_path):
    bundle = trainable("ptd")
    cases: list[tuple[Bundle, dict[str, Any], str]] = [
        (tiny_bundle("int4", "input"), {}, "holds no training program"),
        (bundle, {"max-length": 65}, "takes 64 tokens"),
        (bundle, {"init": "nobody"}, "holds no adapter 'nobody'"),
        (bundle, {"adapter": "none"}, "no usable file name"),
        (bundle, {"steps": 0}, "--steps must be at least 1"),
        (bundle, {"lr": 0}, "--lr more than 0"),
        (bundle, {"scales": "fp32"}, "pack with smaller scales"),
        (bundle, {"data": tmp_path / "missing.txt"}, "missing.txt"),
    ]
    for given, options, message in cases:
        with pytest.raises(LordbaError, match=message):
            run(given, text, tmp_path / "out", **options)
    run(bundle, text, tmp_path / "out", steps=4)
    with pytest.raises(LordbaError, match=r"lr = 0.02, now it is 0.01"):
        run(bundle, text, tmp_path / "out", steps=4, lr=0.01)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "letters.txt").touch()
    with pytest.raises(LordbaError, match="own"):
        run(bundle, text, tmp_path / "own")


def test_blobs_read_back_as_the_latents_compute(trainable, tmp_path):
    """The fp32 adapter is the training program's own function: signs and scales against the op of training."""
    bundle = trainable("input")
    trainer = DeviceTrainer(train_on_device.training_of(bundle, 32))
    trainer.latents[:] = 0.2 * np.random.default_rng(0).standard_normal(trainer.latents.shape)
    trainer.write_adapter(tmp_path / "blob", "fp32")
    blob = torch.from_numpy(np.fromfile(tmp_path / "blob", np.uint8))
    m = trainer.modules[3]
    x = torch.randn(1, 5, m.d_in)
    expected = torch.ops.lordba.latent_adapter(
        x, torch.from_numpy(trainer.latents.copy()), m.offset, [m.r], [m.d_out], torch.zeros(1, 5, m.d_out)
    )
    assert read_module(blob, 3) is not None
    torch.testing.assert_close(sign_adapter_blob(x, blob, 3, m.d_in, [m.d_out]), expected)
