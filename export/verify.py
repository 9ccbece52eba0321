"""Parity of a lowered program with its eager reference: logits over real text, and every adapter by itself."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lordba.adapter import Adapter
from lordba.runtime.bundle import ParityCheck
from lordba.runtime.session import Session

from .target import Captured

WINDOW = 256
GATE = 1.05
OP_LIMIT = 1e-6


@dataclass(frozen=True)
class Windows:
    """Stretches of text, int64 [n, width]; of window i the first prompt(i) tokens are prefilled, the rest decoded."""

    tokens: Tensor

    def prompt(self, i: int) -> int:
        return 1 + 5 * i % 32

    def first(self, n: int, width: int | None = None) -> "Windows":
        return Windows(self.tokens[:n, :width])

    def predicted(self, logits: Tensor, i: int) -> Tensor:
        """The rows of window i's logits that a program returns: from the last prompt token on, without the last."""
        return logits[self.prompt(i) - 1 : -1]

    def targets(self, i: int) -> Tensor:
        return self.tokens[i, self.prompt(i) :]


def text_windows(encode: Callable[[str], list[int]], max_seq_len: int) -> Windows:
    """The text that ships for this purpose, tokenized and cut into windows that fit the program."""
    tokens = torch.tensor(encode((files(__package__) / "parity_text.txt").read_text()))
    width = min(WINDOW, max_seq_len)
    return Windows(tokens[: len(tokens) // width * width].view(-1, width))


def eager_logits(captured: Captured, windows: Windows, adapter: Adapter | None) -> Iterator[Tensor]:
    """Logits of the captured module, [prompt.., vocabulary] per window."""
    for i, row in enumerate(windows.tokens):
        yield windows.predicted(captured.logits(row, adapter), i)


@torch.no_grad()
def float_logits(model: nn.Module, windows: Windows) -> Iterator[Tensor]:
    """Logits of the transformers model itself."""
    for i, row in enumerate(windows.tokens):
        yield windows.predicted(model(input_ids=row[None], use_cache=False).logits[0], i)


def program_logits(session: Session, windows: Windows) -> Iterator[Tensor]:
    """Logits of the program: one prefill and then a decode step per token, as in use."""
    for i, row in enumerate(windows.tokens.tolist()):
        session.reset()
        prompt = windows.prompt(i)
        rows = [session.feed(row[:prompt])]
        rows += [session.feed([token]) for token in row[prompt:-1]]
        yield torch.from_numpy(np.stack(rows))


class Comparison:
    """Collects how logits differ from reference logits, window by window."""

    def __init__(self, windows: Windows) -> None:
        self.windows = windows
        self.kl: list[Tensor] = []
        self.agree: list[Tensor] = []
        self.worst = 0.0
        self.largest = 0.0
        self.nll: list[Tensor] = []
        self.reference_nll: list[Tensor] = []

    def add(self, i: int, reference: Tensor, logits: Tensor) -> None:
        target = self.windows.targets(i)
        p, q = F.log_softmax(reference.double(), -1), F.log_softmax(logits.double(), -1)
        self.kl.append((p.exp() * (p - q)).sum(-1))
        self.agree.append((reference.argmax(-1) == logits.argmax(-1)).double())
        self.worst = max(self.worst, (reference - logits).abs().max().item())
        self.largest = max(self.largest, reference.abs().max().item())
        self.nll.append(F.nll_loss(q, target, reduction="none"))
        self.reference_nll.append(F.nll_loss(p, target, reduction="none"))

    @property
    def positions(self) -> int:
        return sum(len(kl) for kl in self.kl)

    def metrics(self) -> dict[str, float]:
        nll, reference = torch.cat(self.nll).mean(), torch.cat(self.reference_nll).mean()
        return {
            "max_abs_err": self.worst,
            "max_rel_err": self.worst / self.largest,
            "mean_kl": torch.cat(self.kl).mean().item(),
            "top1_agreement": torch.cat(self.agree).mean().item(),
            "perplexity": nll.exp().item(),
            "perplexity_ratio": (nll - reference).exp().item(),
        }


def compare(windows: Windows, reference: Iterator[Tensor], candidate: Iterator[Tensor]) -> Comparison:
    """Walk through two streams of logits together, so that never more than one window's logits are held."""
    result = Comparison(windows)
    for i, (expected, found) in enumerate(zip(reference, candidate, strict=True)):
        result.add(i, expected, found)
    return result


def judge(
    check: str, adapter: str | None, metrics: Mapping[str, float], limits: Mapping[str, float]
) -> list[ParityCheck]:
    """Metrics against their limits; agreement must reach its limit, everything else must stay below."""
    checks = []
    for metric, limit in limits.items():
        value = metrics[metric]
        passed = value >= limit if metric == "top1_agreement" else value <= limit
        checks.append(ParityCheck(check, adapter, metric, value, limit, passed and math.isfinite(value)))
    return checks
