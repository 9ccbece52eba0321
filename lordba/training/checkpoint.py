"""Checkpoints of a training run: folders that appear complete or not at all, without pickle.

`checkpoints/step-000040/` is a PEFT checkpoint of the latents, plus `optimizer.safetensors` and `state.json`.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from peft import PeftModel, set_peft_model_state_dict
from torch import Tensor

from lordba.adapter import WEIGHTS_NAME
from lordba.errors import LordbaError
from lordba.files import new_folder, write_safetensors

STATE_NAME, OPTIMIZER_NAME = "state.json", "optimizer.safetensors"
_STEP = re.compile(r"step-(\d{6,})")


def save_checkpoint(folder: Path, model: PeftModel, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Write the checkpoint of state["step"], then remove older ones."""
    with new_folder(folder / f"step-{state['step']:06d}", replaceable_if=STATE_NAME) as out:
        model.save_pretrained(str(out), save_embedding_layers=False)
        (out / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
        tensors = {
            f"{number}.{name}": value.detach().cpu().contiguous()
            for number, of in optimizer.state_dict()["state"].items()
            for name, value in of.items()
        }
        write_safetensors(out / OPTIMIZER_NAME, tensors, {"format": "pt"})
        (out / STATE_NAME).write_text(json.dumps(state, indent=2) + "\n")
    for old in folder.iterdir():
        match = _STEP.fullmatch(old.name)
        if old.name.startswith(".step-") or (match and int(match[1]) < state["step"]):
            shutil.rmtree(old)


def last_checkpoint(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint and its state."""
    found = sorted(path for path in folder.glob("step-*") if _STEP.fullmatch(path.name))
    if not found:
        return None
    try:
        return found[-1], json.loads((found[-1] / STATE_NAME).read_text())
    except (OSError, ValueError) as error:
        raise LordbaError(f"{found[-1]}: is no usable checkpoint ({error}); remove this folder") from error


def load_checkpoint(path: Path, model: PeftModel, optimizer: torch.optim.Optimizer) -> None:
    """Put latents and optimizer state back as they were."""
    weights = safetensors.torch.load_file(path / WEIGHTS_NAME)
    set_peft_model_state_dict(model, weights)
    numbered: dict[int, dict[str, Tensor]] = {}
    for name, value in safetensors.torch.load_file(path / OPTIMIZER_NAME).items():
        number, _, key = name.partition(".")
        numbered.setdefault(int(number), {})[key] = value
    optimizer.load_state_dict({"state": numbered, "param_groups": optimizer.state_dict()["param_groups"]})
