"""The training command: what it learns, repeats, resumes, shares among processes, and refuses."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model
from loras import saved_lora
from peft import PeftModel
from torch import nn

import lordba
from lordba import train
from lordba.adapter import WEIGHTS_NAME, load_adapter
from lordba.errors import LordbaError
from lordba.files import write_safetensors
from lordba.lora import to_lora, write_lora
from lordba.models import BaseModel, fingerprint
from lordba.training.batches import IGNORED, batch_of, micro_batches, read_examples, split
from lordba.training.checkpoint import last_checkpoint
from lordba.training.optim import Lion8bit
from lordba.training.ste import is_quantized

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As the subprocesses have, so that sums are the same."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text((files("lordba.export") / "parity_text.txt").read_text())
    return path


def arguments(model: Path, data: Path, output: Path, **options: Any) -> list[str]:
    chosen: dict[str, Any] = {"model": model, "data": data, "output": output, "rank": 4, "dtype": "float32"}
    chosen |= {"batch-size": 4, "max-length": 32, "steps": 12, "lr": 0.01, "eval-fraction": 0.1} | options
    given = {name: value for name, value in chosen.items() if value is not None}
    return [word for name, value in given.items() for word in (f"--{name}", *([] if value is True else [str(value)]))]


def run(*args: Any, **options: Any) -> dict[str, Any]:
    """The command in this process; its report."""
    words = arguments(*args, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train", *words])
        train.main()
    return json.loads((args[2] / train.REPORT_NAME).read_text())


@pytest.fixture(scope="module")
def whole(tiny_folder: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """An uninterrupted run of 40 steps: its folder and report."""
    output = tmp_path_factory.mktemp("whole") / "out"
    return output, run(tiny_folder, text, output, steps=40)


def test_training_lowers_the_loss_and_packs_what_was_trained(whole, tiny_base):
    output, report = whole
    losses = report["losses"]
    assert losses["base"] == losses["start"]  # a new adapter does nothing
    assert losses["trained"] < losses["start"] - 0.2
    assert abs(losses["packed"] - losses["trained"]) < 0.05 * (losses["start"] - losses["trained"])
    adapter = load_adapter(output / "adapter")
    assert adapter.base_fingerprint == fingerprint(tiny_base.model) and adapter.nbytes == report["bytes"]
    assert len(report["train"]) == 40 and report["held_out"].keys() == {"0", "40"}
    latents = PeftModel.from_pretrained(tiny_model(), output / "checkpoints" / "step-000040")  # PEFT reads it
    lordba.pack(latents, output / "again", base_fingerprint=adapter.base_fingerprint)
    assert (output / "again" / WEIGHTS_NAME).read_bytes() == (output / "adapter" / WEIGHTS_NAME).read_bytes()


def test_the_reported_loss_is_that_of_the_model(whole, tiny_base, text):
    """Against transformers' own loss of one window at a time, with the packed adapter's eager layers."""
    output, report = whole
    model = tiny_model()
    lordba.attach(model, load_adapter(output / "adapter"))
    _, held_out = split(read_examples(text, tiny_base.tokenizer, 32), 0.1, seed=0)
    with torch.no_grad():
        losses = [model(input_ids=e.ids[None], labels=e.labels[None]).loss.item() for e in held_out]
    assert sum(losses) / len(losses) == pytest.approx(report["losses"]["packed"], rel=1e-5)


def test_a_run_that_was_killed_resumes_to_the_same_result(whole, tiny_folder, text, tmp_path):
    output = tmp_path / "out"
    words = arguments(tiny_folder, text, output, steps=40, **{"save-every": 7})
    command = [sys.executable, "-m", "lordba.train", *words]
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (output / "checkpoints" / "step-000014").is_dir() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (output / train.REPORT_NAME).exists()
    report = run(tiny_folder, text, output, steps=40, **{"save-every": 7})
    assert report == whole[1]
    for name in ("adapter", "checkpoints/step-000040"):
        assert (output / name / WEIGHTS_NAME).read_bytes() == (whole[0] / name / WEIGHTS_NAME).read_bytes()
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step-000040"]


def test_two_processes_have_the_losses_of_one(tiny_folder, text, tmp_path):
    one = run(tiny_folder, text, tmp_path / "one", steps=10)
    words = arguments(tiny_folder, text, tmp_path / "two", steps=10)
    launch = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m", "lordba.train"]
    command = [sys.executable, "-m", *launch, *words]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    two = json.loads((tmp_path / "two" / train.REPORT_NAME).read_text())
    assert (one["processes"], two["processes"]) == (1, 2)
    torch.testing.assert_close(torch.tensor(two["train"]), torch.tensor(one["train"]), rtol=1e-5, atol=0)
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert one["train"][0] - one["train"][-1] > 0.02  # it did learn


def test_micro_batches_change_nothing(whole, tiny_folder, text, tmp_path):
    report = run(tiny_folder, text, tmp_path / "out", steps=40, **{"micro-batch-size": 1})
    torch.testing.assert_close(torch.tensor(report["train"]), torch.tensor(whole[1]["train"]), rtol=1e-3, atol=0)


def test_another_seed_is_another_run(whole, tiny_folder, text, tmp_path):
    """The negative control of the comparisons above."""
    report = run(tiny_folder, text, tmp_path / "out", steps=12, seed=1)
    assert max(abs(a - b) for a, b in zip(report["train"], whole[1]["train"], strict=False)) > 0.05


def test_an_interrupted_checkpoint_costs_nothing(whole, tiny_folder, text, tmp_path, monkeypatch):
    output = tmp_path / "out"
    checkpoints = output / "checkpoints"
    written = 0

    def interrupted(path: Path, *args: Any) -> None:
        nonlocal written
        written += path.name == "optimizer.safetensors"
        if written == 3:
            raise KeyboardInterrupt
        write_safetensors(path, *args)

    monkeypatch.setattr("lordba.training.checkpoint.write_safetensors", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_folder, text, output, steps=40, **{"save-every": 10})
    assert [path.name for path in checkpoints.iterdir()] == ["step-000020"]
    (checkpoints / ".step-000030.half").mkdir()
    (checkpoints / "step-000010").mkdir()  # half removed
    assert run(tiny_folder, text, output, steps=40, **{"save-every": 10}) == whole[1]
    found = last_checkpoint(checkpoints)
    assert found is not None and found[1]["step"] == 40 and len(list(checkpoints.iterdir())) == 1


def test_starting_from_a_lora_an_adapter_and_latents(whole, tiny_folder, text, tmp_path):
    output, first = whole
    options = {"rank": None, "lr": None, "steps": 4}
    packed = run(tiny_folder, text, tmp_path / "packed", init=output / "adapter", **options)
    assert packed["losses"]["start"] == pytest.approx(first["losses"]["packed"], rel=1e-5)
    latents = run(tiny_folder, text, tmp_path / "latents", init=output / "checkpoints" / "step-000040", **options)
    assert latents["losses"]["start"] == pytest.approx(first["losses"]["trained"], rel=1e-6)
    write_lora(to_lora(load_adapter(output / "adapter")), tmp_path / "lora")
    lora = run(tiny_folder, text, tmp_path / "lora-out", init=tmp_path / "lora", **options)
    assert lora["losses"]["start"] == pytest.approx(first["losses"]["packed"], rel=1e-5)
    higher = run(tiny_folder, text, tmp_path / "higher", init=tmp_path / "lora", **{**options, "rank": 8})
    assert load_adapter(tmp_path / "higher" / "adapter").r == 8
    assert higher["losses"]["start"] < first["losses"]["base"] - 0.1


@pytest.mark.parametrize(
    "options",
    [
        {"base-quant": "int8", "gradient-checkpointing": True},
        {"base-quant": "int4", "scales": "fp32", "targets": "q_proj,v_proj"},
        {"optimizer": "lion8bit", "latents": "bfloat16", "dtype": "bfloat16", "lr": 0.003},
    ],
)
def test_the_other_ways_of_training_learn_too(options, tiny_folder, text, tmp_path):
    report = run(tiny_folder, text, tmp_path / "out", **({"steps": 40} | options))
    assert report["losses"]["packed"] < report["losses"]["start"] - 0.1


def test_nothing_has_to_be_held_out(tiny_folder, text, tmp_path):
    report = run(tiny_folder, text, tmp_path / "out", steps=2, **{"eval-fraction": 0})
    assert report["losses"] == {} and len(report["train"]) == 2


def test_quantize_leaves_the_head(tiny_folder):
    model = tiny_model(tie_word_embeddings=False)
    train.quantize(model, "int4")
    assert is_quantized(model.model.layers[0].mlp.up_proj) and not is_quantized(model.lm_head)


# Data


def lines(path: Path, *records: Any) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def test_examples_of_a_jsonl_file(tiny_base: BaseModel, tmp_path):
    tokenizer: Any = tiny_base.tokenizer
    data = lines(tmp_path / "d.jsonl", {"prompt": "Review: good", "completion": " yes"}, {"text": "Hello"}, "")
    first, second = read_examples(data, tokenizer, 64)
    prompt = len(tokenizer("Review: good").input_ids)
    assert tokenizer.decode(first.ids) == "Review: good yes</s>"
    assert (first.labels[:prompt] == IGNORED).all() and torch.equal(first.labels[prompt:], first.ids[prompt:])
    assert torch.equal(second.labels, second.ids) and second.ids[-1] == tokenizer.eos_token_id
    ids, labels, mask = next(micro_batches([first, second], 2))
    assert ids.shape == labels.shape == mask.shape and mask.sum() == first.ids.numel() + second.ids.numel()
    assert (labels[mask == 0] == IGNORED).all()


@pytest.mark.parametrize(
    "content, said",
    [("{", "d.jsonl:1.*JSON"), ('{"prompt": "a"}', "completion"), ("[1]", "expected"), ("", "no text to learn")],
)
def test_data_that_cannot_be_learned_is_named(content, said, tiny_base, tmp_path):
    with pytest.raises(LordbaError, match=said):
        read_examples(lines(tmp_path / "d.jsonl", content), tiny_base.tokenizer, 64)


def test_every_epoch_sees_every_example_once(tiny_base, text):
    examples = read_examples(text, tiny_base.tokenizer, 64)
    n = len(examples)
    order = [id(example) for step in range(n) for example in batch_of(examples, 3, step, seed=0)]
    assert [sorted(order[i * n : (i + 1) * n]) for i in range(3)] == [sorted(map(id, examples))] * 3
    assert order[:n] != order[n : 2 * n]
    training, held_out = split(examples, 0.25, seed=0)
    assert len(held_out) == round(n / 4) and not {*map(id, training)} & {*map(id, held_out)}


def test_mistakes_exit_before_any_work(whole, tiny_folder, text, tmp_path):
    output, _ = whole
    mistakes: list[tuple[dict[str, Any], str]] = [
        ({"steps": 0}, "--steps"),
        ({"batch-size": 0}, "--batch-size"),
        ({"max-length": 1}, "--max-length"),
        ({"data": tmp_path / "none.txt"}, "no such file"),
        ({"init": tmp_path / "none"}, "no such folder"),
        ({"init": output / "adapter", "targets": "q_proj"}, "--targets has no meaning"),
        ({"init": output / "adapter", "rank": 9}, "rank 4, not --rank 9"),
        ({"init": saved_lora(tmp_path / "foreign"), "rank": None}, "another size"),
        ({"model": tmp_path / "none"}, "no such model"),
        ({"output": tiny_folder}, "not one of ours"),
        ({"output": output, "steps": 41}, "steps = 40, now it is 41"),
    ]
    for options, said in mistakes:
        places = {"model": tiny_folder, "data": text, "output": tmp_path / "out"} | options
        with pytest.raises(LordbaError, match=said):
            run(places.pop("model"), places.pop("data"), places.pop("output"), **places)
    assert not (tmp_path / "out").exists()


# The optimizer


def quadratic(dtype: torch.dtype, lr: float, steps: int = 400) -> float:
    """Distance to the minimum after some steps on a quadratic, relative to the start."""
    target = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    p = nn.Parameter(torch.zeros(8, 64, dtype=dtype))
    optimizer = Lion8bit([p], lr=lr)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        torch.autograd.backward((p.float() - target).square().sum())
        optimizer.step()
        optimizer.zero_grad()
    return float((p.float() - target).norm() / target.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lion8bit_finds_a_minimum(dtype):
    assert quadratic(dtype, lr=0.02) < 0.06


def test_lion8bit_moves_as_lion_does():
    """The first step is lr * sign(gradient); with exact arithmetic later ones follow the published update."""
    torch.manual_seed(0)
    p, wanted = nn.Parameter(torch.zeros(4, 32)), torch.zeros(4, 32)
    optimizer, m, differing = Lion8bit([p], lr=0.1, weight_decay=0.5), torch.zeros(4, 32), []
    for _ in range(20):
        grad = torch.randn(4, 32)
        wanted = wanted - 0.1 * ((0.9 * m + 0.1 * grad).sign() + 0.5 * wanted)
        m = 0.99 * m + 0.01 * grad
        p.grad = grad
        optimizer.step()
        differing.append(float(((p - wanted).abs() > 1e-5).float().mean()))
    assert differing[0] == 0 and differing[-1] < 0.1


def test_stochastic_rounding_is_unbiased_and_repeats():
    from lordba.training.optim import _stochastic

    value = torch.full((200_000,), 1.001)
    rounded = [_stochastic(value, torch.bfloat16, torch.Generator().manual_seed(seed)).float() for seed in (0, 0, 1)]
    assert torch.equal(rounded[0], rounded[1]) and not torch.equal(rounded[0], rounded[2])
    assert set(rounded[0].tolist()) == {1.0, 1.0078125}
    assert rounded[0].mean().item() == pytest.approx(1.001, abs=5e-5)


def test_lion8bit_state_survives_saving():
    p = nn.Parameter(torch.zeros(4, 8, dtype=torch.bfloat16))
    optimizer = Lion8bit([p], lr=0.1)
    p.grad = torch.randn(4, 8).bfloat16()
    optimizer.step()
    q = nn.Parameter(p.detach().clone())
    other = Lion8bit([q], lr=0.1)
    other.load_state_dict(optimizer.state_dict())
    assert other.state[q]["momentum"].dtype == torch.int8
    q.grad = p.grad
    optimizer.step()
    other.step()
    assert torch.equal(p, q)
