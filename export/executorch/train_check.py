"""Whether a training program computes the base that the inference program computes."""

from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from lordba.runtime.bundle import ParityCheck
from lordba.runtime.device_trainer import DeviceTrainer

from .capture import Captured
from .train_program import TrainingProgram

TOKENS = 128
FLOAT_LIMIT = 1e-4
QUANTIZED_LIMIT = 0.02
"""Inference rounds activations to int8, training does not: that moves the loss, by less than this."""


def check_training(training: TrainingProgram, file: Path, captured: Captured, tokens: Tensor) -> list[ParityCheck]:
    """The loss of a new adapter, which does nothing, against the captured decoder without adapter."""
    tokens = tokens[:TOKENS]
    logits = captured.logits(tokens, None)
    expected = F.cross_entropy(logits[:-1].double(), tokens[1:]).item()
    run = _fused_loss if training.entry["form"] == "fused" else _portable_loss
    error = abs(run(file, tokens) - expected) / expected
    limit = FLOAT_LIMIT if training.base_quant == "none" else QUANTIZED_LIMIT
    return [ParityCheck("training program", None, "loss_rel_err", error, limit, error <= limit)]


def _fused_loss(file: Path, tokens: Tensor) -> float:
    ids = tokens.tolist()
    return DeviceTrainer(file).add(ids[:-1], ids[1:], 1 / (len(ids) - 1))


def _portable_loss(file: Path, tokens: Tensor) -> float:
    from executorch.extension.training import _load_for_executorch_for_training_from_buffer

    module = _load_for_executorch_for_training_from_buffer(file.read_bytes())
    return module.forward_backward("forward", (tokens[None, :-1].clone(), tokens[None, 1:].clone()))[0].item()
