"""Whether a training program computes the base that the inference program computes."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lordba.bundle import ParityCheck
from lordba.device_trainer import DeviceTrainer

from .capture import Captured
from .train_program import TrainingProgram

TOKENS = 128
FLOAT_LIMIT = 1e-4
QUANTIZED_LIMIT = 0.02
"""Inference rounds activations to int8, training does not: that moves the loss, by less than this."""


def check_training(training: TrainingProgram, file: Path, captured: Captured, tokens: Tensor) -> list[ParityCheck]:
    """The loss of a new adapter, which does nothing, against the captured decoder without adapter."""
    if training.entry["form"] != "fused":
        return []
    tokens = tokens[:TOKENS]
    logits = captured.logits(tokens, None)
    expected = F.cross_entropy(logits[:-1].double(), tokens[1:]).item()
    trainer = DeviceTrainer(file)
    ids = tokens.tolist()
    found = trainer.add(ids[:-1], ids[1:], 1 / (len(ids) - 1))
    limit = FLOAT_LIMIT if torch.is_floating_point(_embedding(captured)) else QUANTIZED_LIMIT
    error = abs(found - expected) / expected
    return [ParityCheck("training program", None, "loss_rel_err", error, limit, error <= limit)]


def _embedding(captured: Captured) -> Tensor:
    embedding = getattr(captured.module, "embedding", None)
    return embedding.weight if isinstance(embedding, torch.nn.Embedding) else torch.zeros((), dtype=torch.int8)
