"""Training for the comparison: every method by the same loop, schedule and batches, a function of the seed."""

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lordba.adapter import Adapter, load_adapter, save_adapter
from lordba.convert import convert_lora
from lordba.files import new_file, write_safetensors
from lordba.lora import LoraAdapter, LoraModule, read_lora, write_lora
from lordba.scales import ScaleCode
from lordba.train import LION_FACTOR
from lordba.training.loop import LARGEST_NORM, OPTIMIZERS, Plan
from lordba.training.packing import adapter_of
from lordba.training.tuner import LordbaConfig, start_from

from .subjects import Subject

HEAD_RATE = 5.0  # of the adapter's learning rate
SIGNS_RATE = 2.5
"""Of the rate at which a LoRA goes on: what a converted one goes on at, as its signs have to be moved to flip."""
Told = Callable[[int, float], None]


@dataclass(frozen=True)
class Recipe:
    """How a subject's adapters are trained: alpha is twice the rank throughout."""

    steps: int
    further: int
    """Steps of a continuation: of the LoRA, or through signs after a conversion."""
    batch_size: int
    rate: float
    further_rate: float

    def fresh(self, seed: int, steps: int, lowmem: bool = False) -> Plan:
        """Training from nothing."""
        return self._plan(steps, self.rate, "lion8bit" if lowmem else "adamw", seed)

    def continuation(self, seed: int, signs: bool) -> Plan:
        """Further training of a LoRA, or of what it was converted to."""
        return self._plan(self.further, self.further_rate * (SIGNS_RATE if signs else 1.0), "adamw", seed)

    def _plan(self, steps: int, rate: float, optimizer: str, seed: int) -> Plan:
        return Plan(steps, self.batch_size, rate, max(1, steps // 10), optimizer, seed)


@dataclass(frozen=True)
class Trained:
    """An adapter as a file holds it, and the classifier's head that was trained beside it."""

    adapter: LoraAdapter | Adapter | None
    head: nn.Module | None

    def save(self, folder: Path) -> None:
        """Write both; the adapter comes last, so that its presence says that all is there."""
        if self.head is not None:
            with new_file(folder.with_name(f"{folder.name}-head.safetensors")) as file:
                write_safetensors(file, self.head.state_dict(), {"format": "pt"})
        if isinstance(self.adapter, Adapter):
            save_adapter(self.adapter, folder)
        elif self.adapter is not None:
            write_lora(self.adapter, folder, torch.float16)

    @staticmethod
    def load(folder: Path, subject: Subject, signs: bool) -> "Trained":
        head = copy.deepcopy(subject.head)
        if head is not None:
            head.load_state_dict(safetensors.torch.load_file(folder.with_name(f"{folder.name}-head.safetensors")))
        return Trained(load_adapter(folder) if signs else read_lora(folder), head)


def train_lora(subject: Subject, r: int, plan: Plan, told: Told, start: Trained | None = None) -> Trained:
    """A LoRA by stock PEFT: bfloat16 base, float32 factors; from `start` or from nothing."""
    torch.manual_seed(plan.seed)
    model = subject.copy()
    config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=list(subject.layers))
    get_peft_model(model, config)  # in place
    layers = {path: model.get_submodule(path) for path in subject.layers}
    if start is not None:
        assert isinstance(start.adapter, LoraAdapter)
        for path, module in start.adapter.modules.items():
            b, a = module.factors()
            layers[path].lora_A["default"].weight.data.copy_(a)  # type: ignore
            layers[path].lora_B["default"].weight.data.copy_(b / layers[path].scaling["default"])  # type: ignore
    head = _optimize(subject, model, start.head if start else None, plan, told)
    modules = {
        path: LoraModule(
            layer.lora_A["default"].weight.detach(),  # type: ignore
            layer.lora_B["default"].weight.detach(),  # type: ignore
            layer.scaling["default"],  # type: ignore
        )
        for path, layer in layers.items()
    }
    return Trained(LoraAdapter(modules), head)


def train_signs(
    subject: Subject, r: int, plan: Plan, told: Told, start: Trained | None = None, latents: str = "float32"
) -> Trained:
    """LoRDBA by lordba.LordbaConfig, packed with log4 scales; from the LoRA in `start`, converted, or from nothing."""
    torch.manual_seed(plan.seed)
    model = subject.copy()
    config = LordbaConfig(r=r, lora_alpha=2 * r, target_modules=set(subject.layers))
    peft_model = get_peft_model(model, config, autocast_adapter_dtype=latents == "float32")
    if start is not None:
        assert isinstance(start.adapter, LoraAdapter)
        start_from(peft_model, convert_lora(start.adapter, r, ScaleCode.FP32)[0], lora=start.adapter)
    head = _optimize(subject, model, start.head if start else None, plan, told)
    return Trained(adapter_of(peft_model, scales="log4"), head)


def train_head(subject: Subject, plan: Plan, told: Told) -> Trained:
    """The base as it is; where it has a head, that is trained alone."""
    if subject.head is None:
        return Trained(None, None)
    torch.manual_seed(plan.seed)
    return Trained(None, _optimize(subject, subject.copy().requires_grad_(False), None, plan, told))


def _optimize(subject: Subject, model: nn.Module, head: nn.Module | None, plan: Plan, told: Told) -> nn.Module | None:
    """Train what in the model asks for gradients, and a copy of the head, which is returned."""
    model.train()
    for module in model.modules():  # every method alike: no dropout in the base either
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    head = copy.deepcopy(subject.head if head is None else head)
    parameters = [p for p in model.parameters() if p.requires_grad]
    # Each with the factor of its rate. The head is no part of a method: AdamW throughout, at the rate of AdamW.
    trained: list[tuple[torch.optim.Optimizer, float]] = []
    if parameters:
        optimizer = OPTIMIZERS[plan.optimizer](list(parameters), lr=plan.learning_rate, weight_decay=0.0)
        trained.append((optimizer, LION_FACTOR if plan.optimizer == "lion8bit" else 1.0))
    if head is not None:
        trained.append((torch.optim.AdamW(head.requires_grad_().parameters(), weight_decay=0.0), HEAD_RATE))
        parameters += head.parameters()
    for step, batch in enumerate(itertools.islice(subject.batches(plan.batch_size, plan.seed), plan.steps)):
        loss = subject.loss(model, head, batch)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(parameters, LARGEST_NORM)
        for optimizer, factor in trained:
            optimizer.param_groups[0]["lr"] = plan.rate(step) * factor
            optimizer.step()
            optimizer.zero_grad()
        told(step, loss.item())
    return head
