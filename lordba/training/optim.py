"""An optimizer whose state is one byte per element: sign-momentum with stochastically rounded 8-bit momentum."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Lion8bit(Optimizer):
    """Lion (arXiv 2302.06675): m is a running mean of gradients; each element moves by lr * sign(b1 m + (1 - b1) g).

    m is int8 with one fp32 scale per row. It and parameters in half precision are rounded stochastically, so that
    changes below their resolution add up instead of being lost. The random numbers depend on the step alone: runs
    repeat, and every process of a group draws the same. Learning rates are about 0.6 of AdamW's.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "seed": seed, "steps": 0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            b1, b2 = group["betas"]
            generators: dict[torch.device, torch.Generator] = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.device not in generators:
                    generators[p.device] = torch.Generator(p.device).manual_seed(
                        1_000_003 * group["seed"] + group["steps"]
                    )
                random, state = generators[p.device], self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p, dtype=torch.int8)
                    state["scale"] = torch.zeros(p.shape[0], *[1] * (p.dim() - 1), device=p.device)
                grad = p.grad.float()
                m = state["momentum"].float().mul_(state["scale"])
                update = m.lerp(grad, 1 - b1).sign_().mul_(-group["lr"])
                if group["weight_decay"]:
                    update.sub_(p.float(), alpha=group["lr"] * group["weight_decay"])
                p.copy_(_stochastic(update.add_(p.float()), p.dtype, random))
                m.lerp_(grad, 1 - b2)
                scale = m.abs().flatten(1).amax(1).view_as(state["scale"]) / 127 if m.dim() > 1 else m.abs() / 127
                codes = (m / scale.clamp_min(torch.finfo(torch.float32).tiny)).add_(_uniform(m, random)).floor_()
                state["momentum"].copy_(codes.clamp_(-127, 127))
                state["scale"].copy_(scale)
            group["steps"] += 1

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which however casts all state to the parameter's dtype."""
        super().load_state_dict(state_dict)
        numbered = (p for group in self.param_groups for p in group["params"])
        numbers = (number for group in state_dict["param_groups"] for number in group["params"])
        for p, number in zip(numbered, numbers, strict=True):
            for key, value in state_dict["state"].get(number, {}).items():
                self.state[p][key] = value.to(p.device, copy=True)


def _uniform(like: Tensor, random: torch.Generator) -> Tensor:
    return torch.rand(like.shape, generator=random, device=like.device)


def _stochastic(value: Tensor, dtype: torch.dtype, random: torch.Generator) -> Tensor:
    """float32 in another dtype; bfloat16 goes to one of its neighbours, the nearer the more likely."""
    if dtype != torch.bfloat16:
        return value.to(dtype)
    noise = torch.randint(0, 1 << 16, value.shape, dtype=torch.int32, generator=random, device=value.device)
    return (value.view(torch.int32) + noise).bitwise_and_(-(1 << 16)).view(torch.float32).to(dtype)
