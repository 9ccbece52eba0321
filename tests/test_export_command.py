"""`python -m lordba.export`: its help, what it prints, and the user's mistakes in one line with exit code 2."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import MAX_SEQ_LEN, random_adapter, tiny_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lordba.adapter import CONFIG_NAME, WEIGHTS_NAME, save_adapter
from lordba.console import run_command
from lordba.export import __main__ as command_line
from lordba.export import bundle as export_bundle
from lordba.export.executorch import target as executorch_target
from lordba.export.executorch.lowering import Lowered
from lordba.models import fingerprint
from lordba.runtime.bundle import read_bundle


@pytest.fixture
def command(monkeypatch, capsys, tmp_path) -> Callable[..., tuple[int, str, str]]:
    """Runs the command in this process, in an empty folder: exit code, stdout, stderr."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)

    def command(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lordba.export", *map(str, arguments)])
        with pytest.raises(SystemExit) as exited:
            run_command(command_line.main)
        return (exited.value.code, *capsys.readouterr())

    return command


def test_help_teaches(command):
    code, out, _ = command("--help")
    assert code == 0 and "examples:" in out
    options = ("--model", "--adapter", "--base-quant", "--adapter-mode", "--max-seq-len", "--output")
    assert all(word in out for word in (*options, "lordba.convert"))


def test_a_model_with_two_adapters_becomes_a_bundle(command, tiny_folder, tiny_adapters):
    code, out, err = command(
        *("--target", "executorch", "--model", tiny_folder, "--adapter", tiny_adapters["north"]),
        *("--adapter", f"pirate={tiny_adapters['south']}", "--output", "made"),
        *("--base-quant", "none", "--route", "generic", "--adapter-mode", "input", "--max-seq-len", MAX_SEQ_LEN),
    )
    assert code == 0
    bundle = read_bundle(Path("made"), "executorch")
    assert [a.name for a in bundle.manifest.adapters] == ["north", "pirate"]
    for entry in bundle.manifest.adapters:
        (row,) = [line for line in out.splitlines() if line.startswith(f"│ {entry.name} ")]
        assert f"{entry.bytes:,}" in row and f"{entry.fp16_lora_bytes / entry.bytes:.2f}x" in row
    assert f"{entry.file_bytes:,}" in row and "FAILED" not in out and out.count("ok") == len(bundle.manifest.parity)
    assert "python -m lordba.run made --adapter north --prompt" in out
    assert "lowering" in err and "verifying adapter pirate" in err
    assert [path.name for path in Path.cwd().iterdir()] == ["made"]


def test_a_bundle_for_the_app_takes_adapters_as_inputs_and_says_how_to_push_it(
    command, monkeypatch, tiny_folder, tiny_adapters
):
    lowered = Lowered(b"a program", ["lordba::sign_adapter.blob_out"], 1, None)
    monkeypatch.setattr(executorch_target, "lower", lambda *_: lowered)

    def verify(target, bundle, *_):
        return [], [export_bundle.AdapterRow(entry, 0.1, 0.2) for entry in bundle.manifest.adapters]

    monkeypatch.setattr(export_bundle, "verify", verify)
    code, out, _ = command(
        *("--target", "executorch", "--android", "--model", tiny_folder, "--adapter", tiny_adapters["north"]),
        *("--base-quant", "none", "--max-seq-len", MAX_SEQ_LEN),
    )
    assert code == 0 and "scripts/push_android_bundle.sh bundle-executorch-android" in out
    bundle = read_bundle(Path("bundle-executorch-android"), "executorch")
    assert bundle.manifest.adapter_mode == "input"
    record = json.loads((bundle.folder / "manifest.json").read_text())
    assert record["android"] == {"format_version": 1, "adapter_scale_code": None}


def test_a_failed_check_is_said_and_exits_with_1(command, monkeypatch, tiny_folder, tiny_adapters):
    checks = export_bundle.judge("program", None, {"mean_kl": 0.5}, {"mean_kl": 0.035})
    lowered = Lowered(b"a program", ["lordba::sign_adapter.blob_out"], 1, None)
    monkeypatch.setattr(executorch_target, "lower", lambda *_: lowered)

    def verify(target, bundle, *_):
        (entry, *_) = bundle.manifest.adapters
        return checks, [export_bundle.AdapterRow(entry, 0.1, 0.2)]

    monkeypatch.setattr(export_bundle, "verify", verify)
    code, out, err = command(
        *("--target", "executorch", "--model", tiny_folder, "--adapter", tiny_adapters["north"]),
        *("--base-quant", "none", "--adapter-mode", "input", "--max-seq-len", MAX_SEQ_LEN),
    )
    assert code == 1 and "FAILED" in out and "parity check failed" in err
    assert read_bundle(Path("bundle-executorch")).manifest.parity == checks


def lora_folder(folder: Path) -> None:
    folder.mkdir()
    (folder / CONFIG_NAME).write_text(json.dumps({"peft_type": "LORA", "r": 8}))


def with_nan_scale(source: Path, folder: Path) -> None:
    shutil.copytree(source, folder)
    with safe_open(source / WEIGHTS_NAME, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(source / WEIGHTS_NAME)
    name = next(name for name in tensors if "up_proj" in name and name.endswith("_out.range"))
    tensors[name][1] = float("nan")
    save_file(tensors, folder / WEIGHTS_NAME, metadata)


@pytest.fixture
def bad_adapters(tmp_path, tiny_adapters) -> dict[str, tuple[Path, list[str]]]:
    """Kinds of bad adapter folder, each with what the error must name."""
    lora_folder(tmp_path / "lora")
    with_nan_scale(tiny_adapters["north"], tmp_path / "nan")
    other = tiny_model(seed=1)
    save_adapter(random_adapter(other), tmp_path / "foreign")
    deeper = tiny_model(num_hidden_layers=3)
    adapter = random_adapter(deeper, only=("2.mlp.up_proj",))
    save_adapter(adapter, tmp_path / "deeper")
    config = json.loads((tmp_path / "deeper" / CONFIG_NAME).read_text())
    (tmp_path / "deeper" / CONFIG_NAME).write_text(json.dumps(config | {"base_fingerprint": None}))
    return {
        "nowhere": (tmp_path / "nowhere", [CONFIG_NAME, "not found"]),
        "lora": (tmp_path / "lora", ["'LORA'", "python -m lordba.convert"]),
        "nan": (tmp_path / "nan", [WEIGHTS_NAME, "up_proj", "scale_out"]),
        "foreign": (tmp_path / "foreign", ["adapter foreign", fingerprint(other), "--model"]),
        "deeper": (tmp_path / "deeper", ["adapter deeper", "model.layers.2.mlp.up_proj", "lacks"]),
    }


@pytest.mark.parametrize("kind", ["nowhere", "lora", "nan", "foreign", "deeper"])
def test_a_bad_adapter(command, tiny_folder, tiny_adapters, bad_adapters, kind):
    folder, named = bad_adapters[kind]
    arguments = ["--target", "executorch", "--model", tiny_folder, "--adapter", tiny_adapters["north"]]
    code, out, err = command(*arguments, "--adapter", folder, "--max-seq-len", MAX_SEQ_LEN)
    *_, error = err.splitlines()
    assert code == 2 and out == "" and error.startswith("error: ")
    assert sum(line.startswith("error:") for line in err.splitlines()) == 1
    for word in named:
        assert word in error
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize(
    "target, options",
    [
        ("onnx", ["--adapter-mode", "input"]),
        ("onnx", ["--route", "fast"]),
        ("executorch", ["--accuracy-level", "0"]),
        ("executorch", ["--ort-format"]),
    ],
)
def test_an_option_of_the_other_target(command, target, options):
    code, out, err = command("--target", target, *options)
    assert code == 2 and out == "" and err.startswith(f"error: {options[0]} is for --target")
    assert list(Path.cwd().iterdir()) == []


def test_an_onnx_bundle(command, tiny_folder, tiny_adapters):
    code, out, err = command(
        *("--target", "onnx", "--model", tiny_folder, "--adapter", tiny_adapters["north"]),
        *("--base-quant", "int8", "--accuracy-level", "0", "--max-seq-len", MAX_SEQ_LEN),
    )
    bundle = read_bundle(Path("bundle-onnx"), "onnx")
    assert code == 0 and "FAILED" not in out and out.count("ok") == len(bundle.manifest.parity)
    assert "base int8, 14 adapter nodes" in out and "python -m lordba.run bundle-onnx --adapter north" in out
    assert bundle.manifest.max_seq_len == MAX_SEQ_LEN and "torchvision" not in err


def test_stderr_is_one_line(tmp_path):
    """In a process of its own, where libraries have their say too."""
    arguments = ["--target", "executorch", "--adapter", str(tmp_path / "nowhere")]
    result = subprocess.run(
        [sys.executable, "-m", "lordba.export", *arguments], capture_output=True, text=True, cwd=tmp_path
    )
    assert result.returncode == 2 and result.stdout == "" and list(tmp_path.iterdir()) == []
    assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith(f"error: {tmp_path}/nowhere")


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--model", "no-such-model"], "no such model"),
        (["--model", "MODEL", "--max-seq-len", "4096"], "takes 2 to 128"),
        (["--model", "MODEL", "--adapter", "AGAIN"], "taken"),
        (["--model", "MODEL", "--adapter", "none=AGAIN"], "'none'"),
        (["--model", "MODEL", "--adapter", "a/b=AGAIN"], "'a/b'"),
        (["--model", "MODEL", "--base-quant", "int3"], "--base-quant"),
        (["--target", "toaster"], "--target"),
    ],
)
def test_other_mistakes(command, tiny_folder, tiny_adapters, arguments, said):
    north = str(tiny_adapters["north"])
    arguments = [a.replace("MODEL", str(tiny_folder)).replace("AGAIN", north) for a in arguments]
    code, out, err = command("--target", "executorch", "--adapter", north, *arguments)
    assert code == 2 and out == "" and said in err.splitlines()[-1]
    assert list(Path.cwd().iterdir()) == []
