"""Reading and writing PEFT's LoRA folders against stock PEFT itself; and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_adapter, random_module, some_tokens, tiny_model, transformers_logits
from loras import dense, run_convert, saved_lora
from safetensors.torch import load_file
from torch import Tensor

from lordba.adapter import CONFIG_NAME, WEIGHTS_NAME, Adapter
from lordba.convert import convert_lora
from lordba.errors import LordbaError
from lordba.files import write_safetensors
from lordba.lora import read_lora, to_lora, write_lora
from lordba.scales import ScaleCode

LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


# PEFT


def peft_model(model: Any, seed: int = 0, **options: Any) -> Any:
    """Stock PEFT on a random model, with random B so that the LoRA does something."""
    import peft

    torch.manual_seed(seed)
    chosen: dict[str, Any] = {"r": 4, "lora_alpha": 12, "target_modules": LLAMA} | options
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**chosen))
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    return wrapped.eval()


def deltas(wrapped: Any) -> dict[str, Tensor]:
    """What stock PEFT itself would merge: {path: [d_out, d_in] float64}."""
    found = {}
    for name, layer in wrapped.base_model.model.named_modules():
        if hasattr(layer, "get_delta_weight"):
            delta = layer.get_delta_weight("default").double()
            found[name] = delta.T if type(layer.base_layer).__name__ == "Conv1D" else delta
    return found


PEFT_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "alpha": ("llama", {"lora_alpha": 32}),
    "rslora": ("llama", {"use_rslora": True}),
    "patterns": (
        "llama",
        {
            "rank_pattern": {"q_proj": 2, r"model\.layers\.1\.mlp\.(up|down)_proj": 6, "layers.0.mlp.up_proj": 3},
            "alpha_pattern": {"v_proj": 40, "layers.1.mlp.up_proj": 5},
        },
    ),
    "rslora with patterns": (
        "llama",
        {"use_rslora": True, "rank_pattern": {"k_proj": 9}, "alpha_pattern": {"k_proj": 2}},
    ),
    "one layer of one target": ("llama", {"target_modules": ["v_proj"], "layers_to_transform": [1]}),
    "targets by expression": ("llama", {"target_modules": r".*\.1\..*(q|v)_proj"}),
    "Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "harmless initialisation": ("llama", {"init_lora_weights": "gaussian", "lora_dropout": 0.1}),
}


@pytest.mark.parametrize("case", PEFT_CASES)
@pytest.mark.filterwarnings("ignore")
def test_scaling_and_layout_are_those_of_stock_peft(case, tmp_path):
    family, options = PEFT_CASES[case]
    wrapped = peft_model(tiny_model(family), **options)
    wrapped.save_pretrained(tmp_path)
    lora = read_lora(tmp_path)
    expected = deltas(wrapped)
    assert lora.modules.keys() == expected.keys()
    for path, module in lora.modules.items():
        torch.testing.assert_close(module.scaling * dense(module.b, module.a), expected[path], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.filterwarnings("ignore")
def test_a_converted_lora_runs_as_stock_peft_does_within_its_error(family, tmp_path):
    """High rank, so that the error is small; PEFT merges, LordbaLinear does not."""
    targets = LLAMA if family == "llama" else ["c_attn", "c_proj", "c_fc"]
    tokens = some_tokens(12)
    wrapped = peft_model(tiny_model(family), target_modules=targets)
    wrapped.save_pretrained(tmp_path)
    base = transformers_logits(tiny_model(family), tokens)
    adapter, reports = convert_lora(read_lora(tmp_path), rank=40, scale_code="fp32")
    found = transformers_logits(tiny_model(family), tokens, adapter)
    merged = transformers_logits(wrapped.merge_and_unload(), tokens)
    assert max(r.error for r in reports) < 0.15
    assert (found - merged).norm() < 0.2 * (base - merged).norm()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.filterwarnings("ignore")
def test_stock_peft_loads_what_to_lora_writes_and_computes_the_same(family, tmp_path):
    from peft import PeftModel

    model, tokens = tiny_model(family), some_tokens(12)
    adapter = random_adapter(model, r=5)
    modules = dict(adapter.modules)
    path = next(iter(modules))  # one module of another rank, and one module left out
    modules[path] = random_module(modules[path].d_in, modules[path].d_out, 3)
    del modules[list(modules)[-1]]
    adapter = Adapter(modules, adapter.scale_code, peft_config={"task_type": "CAUSAL_LM"})
    write_lora(to_lora(adapter), tmp_path / "lora")
    loaded = PeftModel.from_pretrained(tiny_model(family), tmp_path / "lora").eval()
    assert deltas(loaded).keys() == modules.keys()
    expected = transformers_logits(model, tokens, adapter)
    torch.testing.assert_close(transformers_logits(loaded, tokens), expected, rtol=1e-4, atol=1e-4)
    assert (transformers_logits(model, tokens) - expected).abs().max() > 0.1  # the adapter does something


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_loras_are_read_and_written(dtype, tmp_path):
    adapter = Adapter({"m": random_module(20, 24, 4)}, ScaleCode.LOG4)
    write_lora(to_lora(adapter), tmp_path, dtype)
    lora = read_lora(tmp_path)
    assert lora.modules["m"].a.dtype == dtype
    _, (report,) = convert_lora(lora, scale_code="fp32")
    assert report.error < 4 * torch.finfo(dtype).eps


# Folders as they come


def edit_tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS_NAME)
        change(tensors)
        write_safetensors(folder / WEIGHTS_NAME, tensors, {"format": "pt"})

    return edit


def set_config(**config: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / CONFIG_NAME
        path.write_text(json.dumps(json.loads(path.read_text()) | config))

    return edit


Q = "base_model.model.model.layers.0.self_attn.q_proj"
A, B = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"


def to_pickle(folder: Path) -> None:
    (folder / WEIGHTS_NAME).rename(folder / "adapter_model.bin")


def truncate(folder: Path) -> None:
    weights = folder / WEIGHTS_NAME
    weights.write_bytes(weights.read_bytes()[:-9])


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "DoRA": (set_config(use_dora=True), "use_dora"),
    "DoRA tensors": (edit_tensors(lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.ones(24)})), "DoRA"),
    "lora_bias": (set_config(lora_bias=True), "lora_bias"),
    "lora_bias tensors": (edit_tensors(lambda t: t.update({f"{Q}.lora_B.bias": torch.ones(24)})), "lora_bias"),
    "bias": (set_config(bias="lora_only"), "bias"),
    "embedding": (
        edit_tensors(lambda t: t.update({"base_model.model.embed.lora_embedding_A": torch.ones(4, 9)})),
        "lora_embedding_A.*embedding",
    ),
    "modules_to_save": (set_config(modules_to_save=["lm_head"]), "modules_to_save"),
    "saved base weights": (
        edit_tensors(lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(9, 9)})),
        "lm_head.weight",
    ),
    "convolution": (
        edit_tensors(lambda t: t.update({A: torch.ones(4, 20, 3, 3), B: torch.ones(24, 4, 1, 1)})),
        "convolution",
    ),
    "IA3": (set_config(peft_type="IA3"), "IA3"),
    "no type": (set_config(peft_type=None), "None"),
    "LoRDBA already": (set_config(peft_type="LORDBA"), "--to lora"),
    "layer_replication": (set_config(layer_replication=[[0, 2], [1, 3]]), "layer_replication"),
    "trainable_token_indices": (set_config(trainable_token_indices=[3]), "trainable_token_indices"),
    "target_parameters": (set_config(target_parameters=["experts.w"]), "target_parameters"),
    "aLoRA": (set_config(alora_invocation_tokens=[3]), "alora_invocation_tokens"),
    "QA-LoRA": (set_config(use_qalora=True), "use_qalora"),
    "KaSA": (set_config(kasa_config={"beta": 1}), "kasa_config"),
    "PiSSA": (set_config(init_lora_weights="pissa_niter_4"), "pissa_niter_4"),
    "OLoRA": (set_config(init_lora_weights="olora"), "olora"),
    "a future variant": (set_config(use_quantum=True), "use_quantum"),
    "rank of another adapter": (set_config(r=8), "rank 8.*rank 4"),
    "no alpha": (set_config(lora_alpha=None), "lora_alpha"),
    "alpha of NaN": (set_config(lora_alpha=float("nan")), "nan"),
    "a bad pattern": (set_config(rank_pattern={"(": 4}), "rank_pattern"),
    "a pattern list": (set_config(alpha_pattern=["q"]), "alpha_pattern"),
    "ranks that differ": (edit_tensors(lambda t: t.update({B: torch.ones(24, 5)})), r"q_proj.*\[24, 5\]"),
    "half a pair": (edit_tensors(lambda t: t.pop(A)), "lacks lora_A"),
    "nothing": (edit_tensors(lambda t: t.clear()), "no LoRA"),
    "NaN": (edit_tensors(lambda t: t[B].fill_(float("nan"))), "lora_B.weight.*NaN"),
    "integers": (edit_tensors(lambda t: t.update({A: t[A].int()})), "lora_A.weight.*torch.int32"),
    "pickle": (to_pickle, r"adapter_model\.bin.*safe_serialization"),
    "truncated": (truncate, "truncated"),
    "no weights": (lambda folder: (folder / WEIGHTS_NAME).unlink(), "not found"),
    "no configuration": (lambda folder: (folder / CONFIG_NAME).unlink(), "adapter_config.json"),
    "no JSON": (lambda folder: (folder / CONFIG_NAME).write_text("{"), "JSON"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_linear_lora_is_refused_by_name_with_nothing_written(case, tmp_path, monkeypatch):
    spoil, complaint = REFUSED[case]
    lora = saved_lora(tmp_path / "lora")
    run_convert(monkeypatch, lora, tmp_path / "fine")
    spoil(lora)
    with pytest.raises(LordbaError, match=f"(?s){complaint}") as caught:
        run_convert(monkeypatch, lora, tmp_path / "out")
    assert str(lora) in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fine", "lora"]


def test_an_adapter_in_the_only_subfolder_is_found(tmp_path):
    saved_lora(tmp_path / "default")
    assert len(read_lora(tmp_path).modules) == 1
    saved_lora(tmp_path / "other")
    with pytest.raises(LordbaError, match=r"2 adapters \(default, other\)"):
        read_lora(tmp_path)
    with pytest.raises(LordbaError, match="no such folder"):
        read_lora(tmp_path / "missing")
