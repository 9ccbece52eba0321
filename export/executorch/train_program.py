"""What `--train` adds to a bundle: a program that trains one adapter, and what the manifest says of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lordba.adapter import Adapter, SignModule, zero_module
from lordba.errors import LordbaError
from lordba.layers import linear_size
from lordba.scales import ScaleCode

from .decoder import Decoder, why_not_fast
from .train_portable import portable_program
from .training import TrainStep, lower_training

TRAINING_NAME = "train.pte"
FORMS = ("fused", "portable")


@dataclass(frozen=True)
class TrainingProgram:
    """The bytes of train.pte and its entry in the manifest."""

    pte: bytes
    entry: dict[str, Any]
    base_quant: str


def training_program(
    model: nn.Module,
    form: str,
    paths: Sequence[str],
    rank: int,
    base_quant: str,
    max_seq_len: int,
    fingerprint: str,
) -> TrainingProgram:
    """A program that trains an adapter of this rank on these modules of a float32 model.

    `fused` is for lordba's trainer (backends/training), `portable` for ExecuTorch's own TrainingModule.
    """
    ranks = dict.fromkeys(paths, rank)
    if form == "portable":
        pte, requires = portable_program(model, ranks, base_quant, max_seq_len)
    elif form == "fused":
        if reason := why_not_fast(model):
            raise LordbaError(f"--train fused cannot take this model: {reason}; use --train portable")
        step = TrainStep(Decoder(model, set(paths), max_seq_len), ranks, base_quant)
        pte, requires = lower_training(step, max_seq_len, fingerprint)
    else:
        raise LordbaError(f"--train must be one of {', '.join(FORMS)}, found {form!r}")
    entry = {"program": TRAINING_NAME, "form": form, "max_seq_len": max_seq_len, "r": rank, "requires": requires}
    return TrainingProgram(pte, entry, base_quant)


def largest_adapter(model: nn.Module, paths: Sequence[str | None], rank: int) -> Adapter:
    """An adapter as large as training makes them: every module, this rank, log4 scales; it computes nothing."""

    def module(path: str) -> SignModule:
        size = linear_size(model.get_submodule(path))
        assert size is not None  # check_fits has seen to it
        return zero_module(*size, rank, ScaleCode.LOG4)

    return Adapter({path: module(path) for path in paths if path}, ScaleCode.LOG4)
