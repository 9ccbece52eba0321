"""Parity of a lowered program with its eager reference: logits over real text, and every adapter by itself."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lordba.adapter import Adapter
from lordba.bundle import ParityCheck
from lordba.session import Program, Session

from .adapted import AdaptedLinear
from .capture import Captured

WINDOW = 256
FLOAT_LIMITS = {"max_abs_err": 2e-3, "mean_kl": 1e-6, "top1_agreement": 0.999}
QUANTIZED_LIMITS = {"mean_kl": 0.035, "perplexity_ratio": 1.015}
ADAPTER_LIMITS = {"mean_kl": 0.035}  # over few windows a ratio of perplexities is mostly noise
GATE = 1.05
OP_LIMIT = 1e-6
PROBE_TOKENS = 48


@dataclass(frozen=True)
class Windows:
    """Stretches of text, int64 [n, width]; of window i the first prompt(i) tokens are prefilled, the rest decoded."""

    tokens: Tensor

    def prompt(self, i: int) -> int:
        return 1 + 5 * i % 32

    def first(self, n: int) -> "Windows":
        return Windows(self.tokens[:n])

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


@torch.no_grad()
def eager_logits(captured: Captured, windows: Windows, blob: Tensor) -> Iterator[Tensor]:
    """Logits of the captured module, [prompt.., vocabulary] per window."""
    captured.slot.blob = blob
    captured.module.all_logits = True
    try:
        for i, row in enumerate(windows.tokens):
            yield windows.predicted(captured.module(row[None], torch.tensor([0]))[0], i)
    finally:
        captured.module.all_logits = False


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
        self.nll: list[Tensor] = []
        self.reference_nll: list[Tensor] = []

    def add(self, i: int, reference: Tensor, logits: Tensor) -> None:
        target = self.windows.targets(i)
        p, q = F.log_softmax(reference.double(), -1), F.log_softmax(logits.double(), -1)
        self.kl.append((p.exp() * (p - q)).sum(-1))
        self.agree.append((reference.argmax(-1) == logits.argmax(-1)).double())
        self.worst = max(self.worst, (reference - logits).abs().max().item())
        self.nll.append(F.nll_loss(q, target, reduction="none"))
        self.reference_nll.append(F.nll_loss(p, target, reduction="none"))

    @property
    def positions(self) -> int:
        return sum(len(kl) for kl in self.kl)

    def metrics(self) -> dict[str, float]:
        nll, reference = torch.cat(self.nll).mean(), torch.cat(self.reference_nll).mean()
        return {
            "max_abs_err": self.worst,
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


def judge(check: str, adapter: str | None, metrics: dict[str, float], limits: dict[str, float]) -> list[ParityCheck]:
    """Metrics against their limits; agreement must reach its limit, everything else must stay below."""
    checks = []
    for metric, limit in limits.items():
        value = metrics[metric]
        passed = value >= limit if metric == "top1_agreement" else value <= limit
        checks.append(ParityCheck(check, adapter, metric, value, limit, passed and math.isfinite(value)))
    return checks


class _Probe(nn.Module):
    """Every adapter op of a program, each on an input of its own."""

    def __init__(self, layers: Sequence[AdaptedLinear]) -> None:
        super().__init__()
        self.calls = [(layer._first, layer.d_in, layer.d_outs) for layer in layers]

    def forward(self, blob: Tensor, inputs: list[Tensor]) -> list[Tensor]:
        op = torch.ops.lordba.sign_adapter.blob
        return [op(x, blob, *call) for x, call in zip(inputs, self.calls, strict=True)]


class OpProbe:
    """Runs every adapter op of a captured program alone, on real activations, in the runtime.

    Logits of a quantized base prove little about an adapter (int8 activations turn a 1e-6 change into a KL of .02);
    this compares each module's term with float64 factors instead.
    """

    def __init__(self, captured: Captured, windows: Windows, blob: Tensor) -> None:
        self._captured = captured
        self._layers = [m for m in captured.module.modules() if isinstance(m, AdaptedLinear) and m._slot is not None]
        self._inputs = self._record(windows, blob)
        self._program = Program(self._lower(blob))

    @torch.no_grad()
    def worst_error(self, adapter: Adapter, blob: Tensor) -> float:
        """The largest, over modules, of the median-token relative error against float64."""
        outputs = self._program.execute([blob, *self._inputs])
        worst = 0.0
        for layer, x, y in zip(self._layers, self._inputs, outputs, strict=True):
            for i, part in enumerate(y.split(layer.d_outs, -1)):
                module = adapter.modules.get(self._captured.slot.paths[layer._first + i] or "")
                if module is None:
                    worst = max(worst, part.abs().max().item())
                    continue
                b, a = module.factors()
                expected = x.double() @ a.T @ b.T
                error = (part.double() - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-30)
                worst = max(worst, error.median().item())
        return worst

    def _record(self, windows: Windows, blob: Tensor) -> list[Tensor]:
        """Each adapted layer's input on the first tokens of the text, [1, T, d_in]."""
        seen: dict[AdaptedLinear, Tensor] = {}

        def keep(layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            assert isinstance(layer, AdaptedLinear)
            seen[layer] = arguments[0].reshape(1, -1, layer.d_in)[:, :PROBE_TOKENS].clone()

        hooks = [layer.register_forward_pre_hook(keep) for layer in self._layers]
        next(iter(eager_logits(self._captured, windows.first(1), blob)))
        for hook in hooks:
            hook.remove()
        return [seen[layer] for layer in self._layers]

    def _lower(self, blob: Tensor) -> bytes:
        from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge
        from executorch.exir.passes import MemoryPlanningPass

        blocks = torch.export.Dim("adapter_blocks", min=1, max=1 << 20)
        program = torch.export.export(
            _Probe(self._layers).eval(),
            (blob, self._inputs),
            dynamic_shapes=({0: 64 * blocks}, [None] * len(self._inputs)),
            strict=False,
        )
        edge = to_edge(program, compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True))
        config = ExecutorchBackendConfig(memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False))
        return edge.to_executorch(config).buffer
