"""The training program in ExecuTorch's runtime against transformers and autograd; optimizers and checkpoints."""

import numpy as np
import pytest
import torch
from conftest import MAX_SEQ_LEN, some_tokens
from torch import nn
from training_programs import R, StraightThrough, eager_loss, inference_base, program, trainer_of, with_latents

from lordba.errors import LordbaError
from lordba.runtime.device_trainer import IGNORED, DeviceTrainer, Optimizer

LAYERS = 3
TOKENS = some_tokens(41)
TARGETS = [*TOKENS[1:], IGNORED]
TARGETS[3:7] = [IGNORED] * 4
WEIGHT = 1 / 36
CASES = [("llama", "int4"), ("llama", "int8"), ("llama", "none"), ("qwen2", "int8"), ("qwen3", "int4")]


def randomise(trainer: DeviceTrainer) -> None:
    """Latents of which B is not zero, so that every gradient is more than its first step's."""
    trainer.latents[:] = 0.2 * np.random.default_rng(1).standard_normal(trainer.latents.shape)


def cosines(trainer: DeviceTrainer, layers: dict[str, StraightThrough]) -> dict[str, float]:
    """Of every latent's gradient in the runtime with its eager one."""
    flat, found = torch.from_numpy(trainer.gradients()), {}
    for module, (path, layer) in zip(trainer.modules, layers.items(), strict=True):
        sizes = [module.r * module.d_in, module.d_out * module.r]
        parts = flat[module.offset : module.offset + sum(sizes)].split(sizes)
        for name, part, latent in zip("AB", parts, (layer.a, layer.b), strict=True):
            assert latent.grad is not None
            found[f"{path}.{name}"] = torch.cosine_similarity(part, latent.grad.flatten(), 0).item()
    return found


@pytest.mark.parametrize(("family", "base_quant"), CASES)
def test_gradients_equal_eager_straight_through_gradients(family, base_quant, tmp_path):
    layers = LAYERS if base_quant == "int4" and family == "llama" else 2
    pte, paths = program(family, base_quant, layers)
    trainer = trainer_of(tmp_path, pte)
    randomise(trainer)
    model = inference_base(family, base_quant, layers)
    eager = with_latents(model, paths, trainer)
    loss = eager_loss(model, TOKENS, TARGETS, WEIGHT)
    loss.backward()
    assert trainer.add(TOKENS, TARGETS, WEIGHT) == pytest.approx(loss.item(), rel=1e-5)
    found = cosines(trainer, eager)
    assert len(found) == 2 * 7 * layers and min(found.values()) > 0.99999, found
    for module, layer in zip(trainer.modules, eager.values(), strict=True):
        part = trainer.gradients()[module.offset : module.offset + module.r * module.d_in]
        assert np.linalg.norm(part) == pytest.approx(layer.a.grad.norm().item(), rel=1e-4)  # type: ignore[union-attr]


def test_a_gradient_that_misses_one_frozen_layer_shows(tmp_path):
    """The comparison fails where the reference's gradient does not pass through the base of a single linear."""
    pte, paths = program("llama", "int4", LAYERS)
    trainer = trainer_of(tmp_path, pte)
    randomise(trainer)
    model = inference_base("llama", "int4", LAYERS)
    eager = with_latents(model, paths, trainer)

    class Blocked(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base = base

        def forward(self, x):
            return self.base(x.detach())

    last = f"model.layers.{LAYERS - 1}.mlp.down_proj"
    eager[last].base = Blocked(eager[last].base)  # type: ignore[assignment]
    loss = eager_loss(model, TOKENS, TARGETS, WEIGHT)
    loss.backward()
    assert trainer.add(TOKENS, TARGETS, WEIGHT) == pytest.approx(loss.item(), rel=1e-5)
    found = cosines(trainer, eager)
    assert found[f"{last}.A"] > 0.99999 and found[f"model.layers.{LAYERS - 1}.mlp.up_proj.A"] < 0.999


def test_lengths_batches_and_ignored_targets(tmp_path):
    pte, _ = program("llama", "int4", LAYERS)
    trainer = trainer_of(tmp_path, pte)
    randomise(trainer)
    together, alone = np.zeros_like(trainer.latents), []
    for tokens in (TOKENS, some_tokens(MAX_SEQ_LEN), some_tokens(1), some_tokens(7)):
        targets = [*tokens[1:], IGNORED] if len(tokens) > 1 else [5]
        alone.append(trainer.add(tokens, targets, 0.01))
        together += trainer.gradients()
        trainer.update(0.0)  # forgets the gradients and moves nothing
    assert together.any()
    for tokens in (TOKENS, some_tokens(MAX_SEQ_LEN), some_tokens(1), some_tokens(7)):
        assert trainer.add(tokens, [*tokens[1:], IGNORED] if len(tokens) > 1 else [5], 0.01) in alone
    np.testing.assert_allclose(trainer.gradients(), together, rtol=0, atol=1e-6 * np.abs(together).max())
    trainer.update(0.0)
    assert trainer.add(TOKENS, [IGNORED] * len(TOKENS), 1.0) == 0 and not trainer.gradients().any()
    for tokens, targets in (([], []), (some_tokens(MAX_SEQ_LEN + 1),) * 2):
        with pytest.raises(LordbaError, match="tokens; the program takes 1 to 64"):
            trainer.add(tokens, targets, 1.0)
    with pytest.raises(LordbaError, match="training program failed"):
        trainer.add([10**6], [1], 1.0)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_steps_follow_torchs_optimizers(kind, tmp_path):
    """30 steps with clipping: the loss of each, and the latents at the end."""
    pte, paths = program("llama", "int4", LAYERS)
    trainer = trainer_of(tmp_path, pte, Optimizer(kind, decay=0.01))
    model = inference_base("llama", "int4", LAYERS)
    eager = with_latents(model, paths, trainer)
    parameters = [p for layer in eager.values() for p in (layer.a, layer.b)]
    rate = {"adamw": 3e-3, "sgd": 0.3}[kind]
    optimizer: torch.optim.Optimizer = (
        torch.optim.AdamW(parameters, rate, weight_decay=0.01)
        if kind == "adamw"
        else torch.optim.SGD(parameters, rate, momentum=0.9, weight_decay=0.0)
    )
    if kind == "sgd":
        trainer = trainer_of(tmp_path, pte, Optimizer(kind))
    ours, theirs = [], []
    for step in range(30):
        tokens = some_tokens(40, seed=step % 3)
        targets = [*tokens[1:], IGNORED]
        ours.append(trainer.add(tokens, targets, 1 / 39))
        trainer.update(rate, 1.0)
        loss = eager_loss(model, tokens, targets, 1 / 39)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        theirs.append(loss.item())
    np.testing.assert_allclose(ours, theirs, rtol=0.01)
    assert ours[-1] < ours[0] - 0.3
    a, _ = trainer.factors(0)
    moved = np.abs(a - eager[paths[0]].a.detach().numpy()).max()
    assert moved < 0.1 * np.abs(a).max()


def test_8_bit_state_learns_as_float_state_does(tmp_path):
    losses = {}
    for kind in ("adamw", "adamw8bit"):
        trainer = trainer_of(tmp_path, program("llama", "int4", LAYERS)[0], Optimizer(kind))
        losses[kind] = []
        for step in range(60):
            tokens = some_tokens(40, seed=step % 3)
            losses[kind].append(trainer.add(tokens, [*tokens[1:], IGNORED], 1 / 39))
            trainer.update(3e-3, 1.0)
    start, end = losses["adamw"][0], losses["adamw"][-1]
    assert end < start - 0.5
    assert abs(losses["adamw8bit"][-1] - end) < 0.1 * (start - end)


@pytest.mark.parametrize("kind", ["adamw", "sgd", "adamw8bit"])
def test_a_checkpoint_goes_on_bit_for_bit(kind, tmp_path):
    def go_on(trainer: DeviceTrainer, steps: range) -> None:
        for step in steps:
            tokens = some_tokens(30, seed=step)
            trainer.add(tokens, [*tokens[1:], IGNORED], 1 / 29)
            trainer.update(1e-2, 1.0)

    pte, _ = program("llama", "int4", LAYERS)
    whole = trainer_of(tmp_path, pte, Optimizer(kind))
    go_on(whole, range(6))
    first = trainer_of(tmp_path, pte, Optimizer(kind))
    go_on(first, range(4))
    first.save(tmp_path / "checkpoint", b"a note")
    second = trainer_of(tmp_path, pte, Optimizer(kind), seed=9)
    assert not np.array_equal(second.latents, whole.latents)
    assert second.load(tmp_path / "checkpoint") == b"a note" and second.steps == 4
    go_on(second, range(4, 6))
    assert np.array_equal(second.latents, whole.latents)
    whole.save(tmp_path / "whole")
    second.save(tmp_path / "second")
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "second").read_bytes()  # the optimizer's state too


def test_checkpoints_that_do_not_fit_are_refused(tmp_path):
    pte, _ = program("llama", "int4", LAYERS)
    trainer = trainer_of(tmp_path, pte)
    trainer.save(tmp_path / "good", b"note")
    raw = (tmp_path / "good").read_bytes()
    before = trainer.latents.copy()
    damaged = bytearray(raw)
    damaged[len(raw) // 2] ^= 1
    cases = {"damaged": bytes(damaged), "truncated": raw[:-1], "no checkpoint": b"x" * 200, "no checkpoint ": b""}
    for why, content in cases.items():
        (tmp_path / "bad").write_bytes(content)
        with pytest.raises(LordbaError, match=why.strip()):
            trainer.load(tmp_path / "bad")
    with pytest.raises(LordbaError, match="another optimizer"):
        trainer_of(tmp_path, pte, Optimizer("sgd")).load(tmp_path / "good")
    with pytest.raises(LordbaError, match="another training program"):
        trainer_of(tmp_path, program("qwen2", "int8", 2)[0]).load(tmp_path / "good")
    assert np.array_equal(trainer.latents, before)
    with pytest.raises(LordbaError, match="cannot be written"):
        trainer.save(tmp_path / "missing" / "file")
    for content in (b"", b"no program", raw):
        (tmp_path / "odd.pte").write_bytes(content)
        with pytest.raises(LordbaError, match="no training program"):
            DeviceTrainer(tmp_path / "odd.pte")


def test_latents_begin_as_a_loras(tmp_path):
    trainer = trainer_of(tmp_path, program("llama", "int4", LAYERS)[0])
    a, b = trainer.factors(1)
    assert a.shape == (R, 64) and not b.any() and 0.9 / 8 < np.abs(a).max() <= 1 / 8
    other = trainer_of(tmp_path, program("llama", "int4", LAYERS)[0], seed=1)
    assert not np.array_equal(other.latents, trainer.latents)
