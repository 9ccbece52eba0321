"""The memory benchmark counts what autograd keeps, and training LoRDBA keeps no more than training a LoRA."""

import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import memory


def test_bytes_are_counted_by_storage():
    """A product keeps both factors; a view and a parameter cost nothing more."""
    x = torch.randn(8, 16, requires_grad=True)
    layer = nn.Linear(16, 4, bias=False)
    assert memory.saved_bytes(layer, lambda model: model(x).sum()) == x.nbytes
    assert memory.saved_bytes(layer, lambda model: (x * x.view(8, 16)).sum()) == x.nbytes
    assert memory.saved_bytes(layer, lambda model: (x * (x + 1)).sum()) == 2 * x.nbytes
    assert memory.saved_bytes(layer, lambda model: model(x.detach()).sum()) == x.nbytes  # for the weight's gradient
    assert memory.saved_bytes(layer.requires_grad_(False), lambda model: model(x).sum()) == 0


def test_one_layer_keeps_x_alone_and_its_state_is_that_of_a_lora():
    rows = {row["method"]: row for row in memory.one_layer(64)}
    assert rows.keys() == memory.METHODS.keys()
    ours, lora = rows["lordba"], rows["lora_bf16"]
    assert ours["saved_beyond_x_bytes"] == 0 < lora["saved_beyond_x_bytes"] < rows["naive_ste"]["saved_beyond_x_bytes"]
    assert ours["adapter_state_bytes"] == lora["adapter_state_bytes"]
    assert rows["lordba_lowmem"]["adapter_state_bytes"] <= 0.7 * lora["adapter_state_bytes"]
    assert rows["lordba_fp32"]["saved_beyond_x_bytes"] == 0


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_whole_model_keeps_no_more_than_with_a_lora(family):
    saved = {}
    for name in ("lora_bf16", "naive_ste", "lordba"):
        model = memory.METHODS[name].build(tiny_model(family).bfloat16()).train()
        saved[name] = memory.saved_bytes(model, memory.token_loss(64))
    assert saved["lordba"] < saved["lora_bf16"] < saved["naive_ste"]
