"""The training loop: one process or many, the same losses; stopped and resumed, the same result.

What a step does follows from the options and its number alone (examples, learning rate, random numbers), so a
checkpoint holds latents, optimizer state and the losses so far, and nothing else. docs/training.md.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F

from lordba.errors import LordbaError
from lordba.training.batches import IGNORED, Example, batch_of, micro_batches
from lordba.training.checkpoint import last_checkpoint, load_checkpoint, save_checkpoint
from lordba.training.optim import Lion8bit
from lordba.training.resume import check_same_run
from lordba.training.schedule import learning_rate

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"adamw": torch.optim.AdamW, "lion8bit": Lion8bit}
LARGEST_NORM = 1.0


@dataclass(frozen=True)
class Plan:
    """How to train: what follows decides the result, together with model, data and the adapter to start from."""

    steps: int
    batch_size: int
    learning_rate: float
    warmup: int
    optimizer: str = "adamw"
    seed: int = 0
    micro_batch_size: int | None = None
    """Sequences that a process takes at once; None: its whole share of a batch."""

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        return learning_rate(step, self.steps, self.learning_rate, self.warmup)


@dataclass
class Log:
    """Mean loss in nats per learned token: of each step's batch, and of the held-out examples by step."""

    train: list[float] = field(default_factory=list)
    held_out: dict[int, float] = field(default_factory=dict)


class Trainer:
    """Trains a PEFT model's latents by a plan; every process of a group makes one. Held-out examples may be none."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: PeftModel,
        training: Sequence[Example],
        held_out: Sequence[Example],
        plan: Plan,
    ) -> None:
        self.accelerator, self.training, self.held_out, self.plan = accelerator, training, held_out, plan
        world = accelerator.num_processes
        if plan.batch_size % world:
            raise LordbaError(
                f"--batch-size {plan.batch_size} cannot be shared by {world} processes; make it a multiple"
            )
        self.peft_model = model.to(accelerator.device)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = OPTIMIZERS[plan.optimizer](self.parameters, lr=plan.learning_rate, weight_decay=0.0)
        self.model: nn.Module = accelerator.prepare_model(model)
        self.log = Log()

    def run(
        self,
        checkpoints: Path,
        description: dict[str, Any],
        save_every: int,
        evaluate_every: int,
        told: Callable[[int, float], None] = lambda step, loss: None,
    ) -> Log:
        """Train to the plan's end, from the last checkpoint if there is one; `told` hears of every step's loss."""
        start = self._resume(checkpoints, description)
        if start == 0 and self.held_out:
            self.log.held_out[0] = self.evaluate()
        for step in range(start, self.plan.steps):
            loss = self.step(step)
            self.log.train.append(loss)
            told(step + 1, loss)
            if not math.isfinite(loss):
                raise LordbaError(
                    f"the loss of step {step + 1} is {loss}: training diverged; lower --lr or raise --warmup"
                )
            last = step + 1 == self.plan.steps
            if self.held_out and (last or (step + 1) % evaluate_every == 0):
                self.log.held_out[step + 1] = self.evaluate()
            if last or (step + 1) % save_every == 0:
                self._save(checkpoints, description, step + 1)
        return self.log

    def step(self, step: int) -> float:
        """One step of the optimizer; the mean loss of the whole batch, before it."""
        accelerator, plan = self.accelerator, self.plan
        world, rank = accelerator.num_processes, accelerator.process_index
        batch = batch_of(self.training, plan.batch_size, step, plan.seed)
        targets = sum(example.targets for example in batch)
        torch.manual_seed(1_000_003 * plan.seed + step * world + rank)  # for dropout
        for group in self.optimizer.param_groups:
            group["lr"] = plan.rate(step)
            if "steps" in group:
                group["steps"] = step
        self.model.train()
        total = torch.zeros((), device=accelerator.device)
        share = batch[rank::world]
        parts = list(micro_batches(share, plan.micro_batch_size or len(share)))
        for i, part in enumerate(parts):
            with accelerator.no_sync(self.model) if i + 1 < len(parts) else contextlib.nullcontext():
                loss = self._loss(part) / targets
                torch.autograd.backward(loss * world)  # processes average their gradients; the batch's mean is meant
            total += loss.detach()
        nn.utils.clip_grad_norm_(self.parameters, LARGEST_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self._sum(total)

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean loss of the held-out examples, in nats per learned token."""
        self.model.eval()
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        size = self.plan.micro_batch_size or max(1, self.plan.batch_size // world)
        share = self.held_out[rank::world]
        parts = [self._loss(part) for part in micro_batches(share, size)]
        total = torch.stack(parts).sum() if parts else torch.zeros((), device=self.accelerator.device)
        return self._sum(total) / sum(example.targets for example in self.held_out)

    def _loss(self, part: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Sum of the losses of a micro-batch's learned tokens."""
        ids, labels, mask = (t.to(self.accelerator.device) for t in part)
        model = self.model if torch.is_grad_enabled() else self.peft_model
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        learned = labels[:, 1:] != IGNORED
        return F.cross_entropy(logits[learned].float(), labels[:, 1:][learned], reduction="sum")

    def _sum(self, value: Tensor) -> float:
        """The sum over all processes."""
        return float(self.accelerator.reduce(value, "sum"))

    def _resume(self, checkpoints: Path, description: dict[str, Any]) -> int:
        found = last_checkpoint(checkpoints) if checkpoints.is_dir() else None
        if found is None:
            return 0
        path, state = found
        check_same_run(path, state["description"], description, "start anew with --restart")
        load_checkpoint(path, self.peft_model, self.optimizer)
        self.log = Log(state["train"], {int(step): loss for step, loss in state["held_out"].items()})
        return int(state["step"])

    def _save(self, checkpoints: Path, description: dict[str, Any], step: int) -> None:
        if self.accelerator.is_main_process:
            state = {"step": step, "description": description, **vars(self.log)}
            save_checkpoint(checkpoints, self.peft_model, self.optimizer, state)
        self.accelerator.wait_for_everyone()
