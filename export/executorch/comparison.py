"""ExecuTorch programs to compare with: the base alone, or with a dense LoRA that XNNPACK runs."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from lordba.adapter import Adapter, SignModule
from lordba.models import BaseModel

from ..target import LORA_DTYPES, ExportOptions, Program
from .adapted import AdaptedLinear
from .lowering import lower
from .quantize import bare_linear
from .target import ExecuTorchTarget, runner_metadata


class DenseLora(nn.Module):
    """A linear layer, or several side by side, plus B(A(x)) of each: two plain linear layers per adapted module.

    They are constants of the program, which XNNPACK repacks at load: the fastest way in which ExecuTorch runs a LoRA.
    fp16 factors compute in fp16, between conversions of x and of the result.
    """

    def __init__(
        self, linear: nn.Module, modules: Sequence[SignModule | None], d_outs: Sequence[int], dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.linear = linear
        self.dtype = dtype
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        d_in = next(module.d_in for module in modules if module)
        for module, d_out in zip(modules, d_outs, strict=True):
            b, a = module.factors() if module else (torch.zeros(d_out, 1), torch.zeros(1, d_in))
            self.down.append(bare_linear(a.to(dtype).contiguous()))
            self.up.append(bare_linear(b.to(dtype).contiguous()))

    def forward(self, x: Tensor) -> Tensor:
        lora = x.to(self.dtype)
        terms = [up(down(lora)) for down, up in zip(self.down, self.up, strict=True)]
        term = torch.cat(terms, -1) if len(terms) > 1 else terms[0]  # a cat of one would leave the delegate
        return self.linear(x) + term.to(x.dtype)


class ExecuTorchComparison(ExecuTorchTarget):
    """The target in one of COMPARISON_MODES."""

    def __init__(self, base: BaseModel, name: str, adapter: Adapter, form: str, options: ExportOptions) -> None:
        super().__init__(base, {name: adapter}, options)
        self.form = form
        self.adapter = adapter

    def lower(self, fingerprint: str, eos_ids: list[int]) -> None:
        slot = self.captured.slot
        for layer in list(self.captured.module.modules()):
            if isinstance(layer, AdaptedLinear) and layer._slot is not None:
                paths = slot.paths[layer._first : layer._first + len(layer.d_outs)]
                modules = [self.adapter.modules.get(path or "") for path in paths]
                if self.form != "none" and any(modules):
                    layer.linear = DenseLora(layer.linear, modules, layer.d_outs, LORA_DTYPES[self.form])
                layer._slot = None
        slot.paths.clear()
        self.lowered = lower(self.captured, None, self.form, runner_metadata(self.base, self.max_seq_len, eos_ids))

    def write(self, folder: Path) -> Program:
        (folder / "model.pte").write_bytes(self.lowered.pte)
        figure = f"{self.lowered.partitions} delegate partitions"
        return Program("model.pte", self.lowered.requires, self.form, [], {}, None, figure)
