"""The unmerged layer: a frozen linear layer with a sign adapter beside it."""

import torch
from torch import Tensor, nn

from lordba.adapter import Adapter, SignModule
from lordba.errors import LordbaError
from lordba.ops import sign_adapter
from lordba.scales import EncodedScales, ScaleCode


class SignTerm(nn.Module):
    """sign_adapter(x) alone. The adapter's tensors are buffers, so the module exports and moves as usual."""

    a_signs: Tensor
    b_signs: Tensor
    s_in: Tensor
    s_mid: Tensor
    s_out: Tensor
    s_ranges: Tensor | None

    def __init__(self, adapter: SignModule) -> None:
        super().__init__()
        self.scale_code = adapter.s_in.code.value
        self.sizes = tuple(scales.n for scales in adapter.scales)
        self.register_buffer("a_signs", adapter.a_signs)
        self.register_buffer("b_signs", adapter.b_signs)
        for name, scales in zip(("s_in", "s_mid", "s_out"), adapter.scales, strict=True):
            self.register_buffer(name, scales.values)
        ranges = [s.range for s in adapter.scales if s.range is not None]
        self.register_buffer("s_ranges", torch.stack(ranges) if ranges else None)

    @property
    def module(self) -> SignModule:
        """The adapter as files hold it."""
        code = ScaleCode(self.scale_code)
        ranges = [None] * 3 if self.s_ranges is None else list(self.s_ranges.cpu())
        scales = (
            EncodedScales(code, n, values.cpu(), scale_range)
            for n, values, scale_range in zip(self.sizes, (self.s_in, self.s_mid, self.s_out), ranges, strict=True)
        )
        return SignModule(self.a_signs.cpu(), self.b_signs.cpu(), *scales)

    def _apply(self, fn, recurse=True):
        """Moves, but keeps its dtypes: a model that goes to half precision must not round scales or their ranges."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d_in] -> [..., d_out]; the gradient reaches x."""
        trained = x.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_exporting()
        op = sign_adapter if trained else torch.ops.lordba.sign_adapter  # the registered op has no backward pass
        return op(x, self.a_signs, self.b_signs, self.s_in, self.s_mid, self.s_out, self.s_ranges, self.scale_code)


class LordbaLinear(SignTerm):
    """y = base(x) + sign_adapter(x)."""

    def __init__(self, base: nn.Module, adapter: SignModule) -> None:
        super().__init__(adapter)
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d_in] -> [..., d_out]."""
        return self.base(x) + super().forward(x)


def linear_size(module: nn.Module) -> tuple[int, int] | None:
    """(d_in, d_out) of a linear layer, GPT-2's Conv1D included; None for any other module."""
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if type(module).__name__ == "Conv1D" and isinstance(weight, Tensor):
        return weight.shape[0], weight.shape[1]
    return None


def check_fits(adapter: Adapter, model: nn.Module, where: str) -> None:
    """Raise unless every module of the adapter is a linear layer of the model, of the right size."""
    for path, module in adapter.modules.items():
        try:
            layer = model.get_submodule(path)
        except AttributeError:
            raise LordbaError(
                f"{where}: adapts module {path}, which the model {type(model).__name__} lacks; "
                "the adapter was made for another model"
            ) from None
        size = linear_size(layer.base if isinstance(layer, LordbaLinear) else layer)
        if size != (module.d_in, module.d_out):
            found = "is no linear layer" if size is None else f"maps {size[0]} to {size[1]} channels"
            raise LordbaError(
                f"{where}: module {path} adapts a linear layer from {module.d_in} to {module.d_out} channels, "
                f"but the model's {found}; the adapter was made for another model"
            )


def attach(model: nn.Module, adapter: Adapter, where: str = "adapter") -> None:
    """Put the adapter beside the model's layers, in place; an adapter that was there before is replaced."""
    check_fits(adapter, model, where)
    detach(model)
    for path, module in adapter.modules.items():
        model.set_submodule(path, LordbaLinear(model.get_submodule(path), module))


def detach(model: nn.Module) -> None:
    """Take every sign adapter off the model, in place."""
    for path, module in list(model.named_modules()):
        if isinstance(module, LordbaLinear):
            model.set_submodule(path, module.base)
