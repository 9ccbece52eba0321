"""Small LoRAs for the tests of conversion, and the conversion command in this process."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lordba import convert
from lordba.adapter import CONFIG_NAME, WEIGHTS_NAME
from lordba.files import write_safetensors
from lordba.lora import LoraModule


def random_lora(d_out: int, d_in: int, r: int, seed: int = 0, spread: float = 0.5) -> LoraModule:
    """A LoRA whose spectrum decays and whose rows differ in size, as trained ones do."""
    g = torch.Generator().manual_seed(seed)
    rows = torch.exp(spread * torch.randn(d_out, 1, generator=g))
    b = rows * torch.randn(d_out, r, generator=g) * torch.exp(-torch.arange(r) / 4)
    return LoraModule(torch.randn(r, d_in, generator=g) / d_in**0.5, 0.02 * b, scaling=2.0)


def dense(b: Tensor, a: Tensor) -> Tensor:
    return b.double() @ a.double()


def saved_lora(folder: Path, **config: Any) -> Path:
    """A small LoRA as PEFT writes it."""
    module = random_lora(24, 20, 4)
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    folder.mkdir(parents=True)
    tensors = {f"{prefix}.lora_A.weight": module.a, f"{prefix}.lora_B.weight": module.b}
    write_safetensors(folder / WEIGHTS_NAME, tensors, {"format": "pt"})
    plain = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "target_modules": ["q_proj"]}
    (folder / CONFIG_NAME).write_text(json.dumps(plain | config))
    return folder


def run_convert(monkeypatch: pytest.MonkeyPatch, *args: object) -> None:
    monkeypatch.setattr(sys, "argv", ["convert", *map(str, args)])
    convert.main()
