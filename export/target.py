"""What a runtime brings to an export: how its decoder is captured, quantized, lowered and written."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lordba.adapter import Adapter
from lordba.runtime.bundle import Bundle, ParityCheck
from lordba.runtime.session import Session

Limits = Mapping[str, float]
LORA_DTYPES = {"lora-fp32": torch.float32, "lora-fp16": torch.float16}
"""What the factors of a dense LoRA are stored as, in programs to compare with."""


@dataclass(frozen=True)
class Way:
    """A way to run a bundle, and what must hold of it: without adapter, and with each adapter over a little text."""

    session: Session
    limits: Limits
    adapter_limits: Limits


@dataclass(frozen=True)
class ExportOptions:
    """What the user chose; base_quant `auto` is int4 where it passes the quality gate, else int8.

    `adapter_mode` None: `ptd` for ExecuTorch, `functions` for Core ML. `route` and `delegate` are ExecuTorch's,
    `accuracy_level` and `ort_format` ONNX Runtime's, `ios`, `sign_storage` and `stateless` Core ML's, `sign_storage`
    also of ExecuTorch's delegate coreml. max_seq_len None: 512 tokens where the cache has a fixed size, and what the
    model takes for ONNX Runtime. `train` names the form of a training program to add, ExecuTorch's alone.
    """

    output: Path
    base_quant: str = "auto"
    adapter_mode: str | None = None
    max_seq_len: int | None = None
    route: str = "auto"
    accuracy_level: int = 4
    ort_format: bool = False
    ios: int = 18
    sign_storage: str = "lut1"
    stateless: bool = False
    delegate: str = "xnnpack"
    train: str | None = None
    android: bool = False
    """For the app in android_demo: see android.py."""


class Captured(Protocol):
    """A decoder that is ready to be quantized and lowered, and that is the reference of its program."""

    def logits(self, tokens: Tensor, adapter: Adapter | None) -> Tensor:
        """Eager logits [T, vocabulary] of tokens int64 [T], with an adapter or the base alone."""
        ...


class Probe(Protocol):
    """Every adapter node of a program by itself, in the runtime, on real activations."""

    def worst_error(self, name: str) -> float:
        """The largest, over modules, of the median-token relative error of this adapter against float64."""
        ...


@dataclass(frozen=True)
class Program:
    """What the manifest says of a written program; paths are relative to the bundle."""

    path: str
    requires: list[str]
    adapter_mode: str
    modules: Sequence[str | None]
    adapter_files: dict[str, str]
    """The runtime's file of each adapter, by the adapter's name; the program where it is one of its functions."""
    no_adapter: str | None
    figure: str
    """What is worth knowing of how it was lowered, in words."""
    functions: Mapping[str, str] = field(default_factory=dict)
    """The program's function of each adapter, where adapters are functions."""
    added_bytes: Mapping[str, int] = field(default_factory=dict)
    """What each of these functions adds to the program."""
    checks: Sequence[ParityCheck] = ()
    """What was measured of the written files themselves."""
    training: dict[str, Any] | None = None
    """The manifest's entry of a training program."""


class Target(Protocol):
    """One export for one runtime, in the order of its methods."""

    name: str
    title: str
    toolchain: tuple[str, ...]
    max_seq_len: int
    most_text: tuple[int, int] | None
    """Windows and tokens of each that a verification can run, where the runtime at hand is slow."""

    @property
    def captured(self) -> Captured:
        """What the last capture made."""
        ...

    def capture(self) -> Captured:
        """A new decoder with places for every adapter."""
        ...

    def quantize(self, base_quant: str) -> None:
        """Quantize the captured decoder in place."""
        ...

    def lower(self, fingerprint: str, eos_ids: list[int]) -> None:
        """Lower the captured decoder; `fingerprint` is the base's."""
        ...

    def write(self, folder: Path) -> Program:
        """Write the program and the adapters."""
        ...

    def ways(self, bundle: Bundle) -> dict[str, Way]:
        """The ways to run the bundle by what to call them; the first is the one that users get."""
        ...

    def probe(self, tokens: Tensor) -> Probe:
        """A probe on the activations that these tokens int64 [T] give."""
        ...


PROBE_TOKENS = 48


def record_inputs(layers: Sequence[nn.Module], captured: Captured, tokens: Tensor) -> dict[nn.Module, Tensor]:
    """Each layer's input on the first tokens, without adapter, as the layer gets it."""
    seen: dict[nn.Module, Tensor] = {}

    def keep(layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        seen[layer] = arguments[0].detach().clone()

    hooks = [layer.register_forward_pre_hook(keep) for layer in layers]
    captured.logits(tokens[:PROBE_TOKENS], None)
    for hook in hooks:
        hook.remove()
    return seen


@torch.no_grad()
def worst_error(terms: Iterable[tuple[str | None, Tensor, Tensor]], adapter: Adapter) -> float:
    """The largest, over (module path, x [T, d_in], found term [T, d_out]), of the median-token relative error.

    Logits of a quantized base prove little about an adapter (int8 activations turn a 1e-6 change into a KL of .02);
    this compares each module's term with float64 factors instead. Where the adapter has no module, the term must be 0.
    """
    worst = 0.0
    for path, x, found in terms:
        module = adapter.modules.get(path or "")
        if module is None:
            worst = max(worst, found.abs().max().item())
            continue
        b, a = module.factors()
        expected = x.double() @ a.T @ b.T
        error = (found.double() - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-30)
        worst = max(worst, error.median().item())
    return worst
