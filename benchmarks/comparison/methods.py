"""The methods that are compared: which there are, in the order of their weight, and how each makes its update."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from statistics import fmean

import torch
from torch import Tensor

from lordba.adapter import Adapter, SignModule
from lordba.conversion.admm import LowRank, cosines, round_factors, to_signs
from lordba.conversion.refit import fix_gauge, refit, store
from lordba.convert import convert_lora
from lordba.errors import LordbaError
from lordba.lora import LoraAdapter, LoraModule
from lordba.scales import ScaleCode

from .baselines import Compressed, loraquant, rtn, svd_gauge

R = 16
LOG4 = ScaleCode.LOG4


@dataclass(frozen=True)
class Method:
    """A row of the comparison. `how`: "trained" with steps of its own, or "converted" from the fp16 LoRA of rank R."""

    name: str
    r: int
    how: str
    scale_code: str | None = None

    @property
    def key(self) -> str:
        return f"{self.name}-r{self.r}"


# In tiers: a run computes the first for every seed, then the next.
_TIERS = (
    (
        Method("base", 0, "trained"),
        Method("lora", R, "trained"),
        Method("admm", R, "converted", LOG4),
        Method("rtn2", R, "converted"),
        Method("rtn1", R, "converted"),
        Method("loraquant", R, "converted"),
        Method("svid", R, "converted", LOG4),
    ),
    (
        Method("admm_qat", R, "trained", LOG4),
        Method("direct", R, "trained", LOG4),
        Method("lora_whole", R, "trained"),
    ),
    (
        Method("lora_longer", R, "trained"),
        Method("lora", 1, "trained"),
        Method("admm", 8, "converted", LOG4),
        Method("admm", 32, "converted", LOG4),
        Method("admm_ls", R, "converted", LOG4),
    ),
    (
        Method("lora", 2, "trained"),
        Method("svid_svd", R, "converted", LOG4),
        Method("svid_mixed", R, "converted", LOG4),
        Method("direct_lowmem", R, "trained", LOG4),
        Method("admm", 64, "converted", LOG4),
    ),
)
METHODS = tuple(method for tier in _TIERS for method in tier)
TIERS = tuple(frozenset(method.key for method in tier) for tier in _TIERS)


@dataclass(frozen=True)
class Update:
    """What a method leaves: factors by path, exact bytes, elements of A and B, and what became of the LoRA's update."""

    factors: Mapping[str, tuple[Tensor, Tensor]]
    nbytes: int
    elements: int
    measures: Mapping[str, float]

    @property
    def bits(self) -> float | None:
        """Stored bits per element of A and B."""
        return 8 * self.nbytes / self.elements if self.elements else None


def of_lora(lora: LoraAdapter) -> Update:
    """A LoRA in fp16."""
    factors = {path: module.factors() for path, module in lora.modules.items()}
    elements = sum(b.numel() + a.numel() for b, a in factors.values())
    return Update(factors, 2 * elements, elements, {})


def of_adapter(adapter: Adapter, measures: Mapping[str, float]) -> Update:
    """A LoRDBA adapter as it is stored."""
    factors = {path: module.factors() for path, module in adapter.modules.items()}
    return Update(factors, adapter.nbytes, adapter.fp16_lora_bytes // 2, measures)


def of_compressed(modules: Mapping[str, Compressed], lora: LoraAdapter) -> Update:
    """A baseline as it is stored."""
    factors = {path: (module.b, module.a) for path, module in modules.items()}
    elements = sum(b.numel() + a.numel() for b, a in factors.values())
    return Update(factors, sum(m.nbytes for m in modules.values()), elements, measure(lora, factors))


def convert(method: Method, lora: LoraAdapter) -> Update:
    """A conversion of the LoRA."""
    baselines: dict[str, Callable[[LoraModule], Compressed]] = {
        "rtn1": lambda module: rtn(module, 1),
        "rtn2": lambda module: rtn(module, 2),
        "loraquant": loraquant,
    }
    if method.name in baselines:
        return of_compressed({path: baselines[method.name](m) for path, m in lora.modules.items()}, lora)
    if method.name == "admm":
        adapter, reports = convert_lora(lora, method.r, LOG4)
        rhos = {"rho": fmean((report.rho_a + report.rho_b) / 2 for report in reports)}
    elif method.name == "admm_ls":
        adapter, rhos = Adapter({path: least_squares(m, method.r) for path, m in lora.modules.items()}, LOG4), {}
    else:
        adapter, rhos = round_in_gauge(lora, GAUGES[method.name])
    update = of_adapter(adapter, {})
    return replace(update, measures=measure(lora, update.factors) | rhos)


def least_squares(module: LoraModule, r: int) -> SignModule:
    """ADMM and refits that lower the update's error alone, without lordba.convert's last step."""
    b, a = module.factors()
    target = LowRank(b[None], a.T[None])
    return store(refit(target, to_signs(target, r)[0], LOG4, noise_weight=1.0), LOG4)[0]


def _own(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    return b, a


def _mixed(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    b, a = svd_gauge(b, a)
    mix = cosines(b.shape[1], b.shape[1]).double()
    return b @ mix, mix.T @ a


# SVID rounds the factors as they stand: those of the LoRA, of its SVD, and of its SVD spread over all columns.
GAUGES: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "svid": _own,
    "svid_svd": svd_gauge,
    "svid_mixed": _mixed,
}


def round_in_gauge(
    lora: LoraAdapter, gauge: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
) -> tuple[Adapter, dict[str, float]]:
    """Both factors rounded to signs and scales in another gauge of the same update; rho is the gauge's."""
    modules, rhos, expected = {}, [], []
    for path, module in lora.modules.items():
        b, a = gauge(*module.factors())
        target = LowRank(b[None], a.T[None])
        modules[path] = store(fix_gauge(round_factors(target, b.shape[1])), LOG4)[0]
        of_b, of_a = rho(b), rho(a)
        rhos += [of_b, of_a]
        expected.append(math.sqrt(1 - (1 - of_b**2) * (1 - of_a**2)))
    return Adapter(modules, LOG4), {"rho": fmean(rhos), "expected_error": fmean(expected)}


def rho(matrix: Tensor) -> float:
    """|| |M| - p q^T ||_F / ||M||_F of the nearest p q^T; 0 for zeros."""
    size = matrix.norm()
    kept = torch.linalg.matrix_norm(matrix.abs(), 2) / size
    return float((1 - kept.square()).clamp_min(0).sqrt()) if size > 0 else 0.0


def measure(lora: LoraAdapter, factors: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    """The relative error of the update, the mean over modules."""
    errors = []
    for path, (b, a) in factors.items():
        of_b, of_a = lora.modules[path].factors()
        difference = ((torch.cat([of_b, -b], 1), torch.cat([of_a, a])), (of_b, of_a))
        found, size = (((left.T @ left) * (right @ right.T)).sum().clamp_min(0) for left, right in difference)
        errors.append(float((found / size).sqrt()) if size > 0 else 0.0)
    return {"error": fmean(errors)}


def chosen(names: str | None) -> tuple[Method, ...]:
    """The methods of these names or keys (with commas), or all."""
    if names is None:
        return METHODS
    known = {m.name for m in METHODS} | {m.key for m in METHODS}
    wanted = names.split(",")
    if unknown := [name for name in wanted if name not in known]:
        raise LordbaError(f"--methods {unknown[0]}: no such method; there are {', '.join(m.key for m in METHODS)}")
    return tuple(m for m in METHODS if m.name in wanted or m.key in wanted)
