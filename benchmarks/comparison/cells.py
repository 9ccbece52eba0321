"""One cell of the comparison: a subject, a seed, a method. Each is computed once and kept; a rerun goes on."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lordba.adapter import Adapter
from lordba.errors import LordbaError
from lordba.files import new_file
from lordba.lora import LoraAdapter

from .fitting import Recipe, Trained, train_head, train_lora, train_signs
from .methods import METHODS, Method, R, Update, convert, of_adapter, of_lora
from .subjects import Judgement, Subject

LORA = next(method for method in METHODS if method.name == "lora" and method.r == R)
FURTHER_SEED = 1000
"""Continuations see other batches than the run that they continue."""
Row = dict[str, Any]
Told = Callable[[str], None]


@dataclass
class Bench:
    """A subject and a seed: what was trained for it on disk, the reference judgement in memory."""

    subject: Subject
    recipe: Recipe
    seed: int
    work: Path
    told: Told = lambda text: None
    _reference: Judgement | None = None

    @property
    def name(self) -> str:
        return f"{self.subject.model_name}-{self.subject.task}"

    @property
    def folder(self) -> Path:
        """Where this seed's adapters lie."""
        return self.work / "adapters" / f"{self.name}-seed{self.seed}"

    def row_file(self, method: Method) -> Path:
        return self.work / "rows" / f"{self.name}-{method.key}-seed{self.seed}.json"

    def row(self, method: Method) -> Row:
        """The method's figures, read or computed."""
        path = self.row_file(method)
        if path.is_file():
            kept: Row = json.loads(path.read_text())
            if kept["recipe"] != asdict(self.recipe) or kept["held_out"] != len(self.subject.held_out):
                raise LordbaError(f"{path}: was made with other settings; name another --work, or remove it")
            return kept
        row = self._compute(method)
        with new_file(path) as file:
            file.write_text(json.dumps(row, indent=2) + "\n")
        return row

    def _compute(self, method: Method) -> Row:
        reference = self.reference()
        lora = self.trained(LORA)
        if method.how == "trained":
            found = self.trained(method)
            update, head = self._update(found), found.head
        else:
            assert isinstance(lora.adapter, LoraAdapter)
            update = convert(method, lora.adapter)
            head = lora.head
        judged = reference if method is LORA else self._judge(update, head)
        return {
            "model": self.subject.model_name,
            "task": self.subject.task,
            "method": method.name,
            "r": method.r,
            "scale_code": method.scale_code,
            "seed": self.seed,
            "bytes": update.nbytes,
            "bits_per_weight": update.bits,
            "metric": self.subject.metric,
            "value": judged.value,
            "loss": judged.loss,
            "kl_to_lora": max(0.0, reference.kl(judged)),
            **update.measures,
            "recipe": asdict(self.recipe),
            "held_out": len(self.subject.held_out),
        }

    def reference(self) -> Judgement:
        """What the fp16 LoRA says of the held-out examples."""
        if self._reference is None:
            lora = self.trained(LORA)
            self._reference = self._judge(self._update(lora), lora.head)
        return self._reference

    def _judge(self, update: Update, head: Any) -> Judgement:
        self.subject.use(update.factors)
        return self.subject.judge(head)

    @staticmethod
    def _update(trained: Trained) -> Update:
        if isinstance(trained.adapter, Adapter):
            return of_adapter(trained.adapter, {})
        return Update({}, 0, 0, {}) if trained.adapter is None else of_lora(trained.adapter)

    def trained(self, method: Method) -> Trained:
        """An adapter that is trained by itself, read or made."""
        folder, signs = self.folder / method.key, method.scale_code is not None
        if folder.is_dir():
            return Trained.load(folder, self.subject, signs)
        made = self._train(method)
        made.save(folder)
        # As stored, in fp16: what is judged is what a file holds.
        return made if made.adapter is None else Trained.load(folder, self.subject, signs)

    def _train(self, method: Method) -> Trained:
        recipe, subject = self.recipe, self.subject
        whole = recipe.steps + recipe.further

        def told(step: int, loss: float) -> None:
            self.told(f"{self.name}, seed {self.seed}, {method.key}: step {step + 1}, loss {loss:.3f}")

        fresh = recipe.fresh(self.seed, recipe.steps if method is LORA else whole, method.name == "direct_lowmem")
        if method.name == "base":
            return train_head(subject, fresh, told)
        if method.name in ("lora", "lora_whole"):
            return train_lora(subject, method.r, fresh, told)
        if method.name == "direct":
            return train_signs(subject, method.r, fresh, told)
        if method.name == "direct_lowmem":
            return train_signs(subject, method.r, fresh, told, latents="bfloat16")
        further = recipe.continuation(self.seed + FURTHER_SEED, signs=method.name == "admm_qat")
        train = {"lora_longer": train_lora, "admm_qat": train_signs}[method.name]
        return train(subject, method.r, further, told, self.trained(LORA))
