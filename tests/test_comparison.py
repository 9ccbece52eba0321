"""Programs to compare with compute what they stand for: the base alone, or the adapter as a dense LoRA."""

import numpy as np
import pytest
from conftest import MAX_SEQ_LEN, some_tokens, tiny_model, transformers_logits

from lordba.errors import LordbaError
from lordba.export.bundle import ExportOptions
from lordba.export.comparison import export_comparison
from lordba.runtime.session import Session

TOKENS = some_tokens(24)
LIMITS = {"lora-fp32": 1e-5, "lora-fp16": 5e-3, "none": 1e-5}  # of the largest logit
CASES = [
    ("executorch", "none"),
    ("executorch", "lora-fp32"),
    ("onnx", "none"),
    ("onnx", "lora-fp32"),
    ("onnx", "lora-fp16"),
]


def worst(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("target, form", CASES)
def test_it_computes_the_adapter_or_the_base(comparison, north_south, target, form):
    adapter = None if form == "none" else north_south["north"]
    expected = transformers_logits(tiny_model(), TOKENS, adapter).numpy()
    session = Session(comparison(target, form))
    first, *others = (session.feed(TOKENS[:20]), *(session.feed([token]) for token in TOKENS[20:]))
    found = np.stack([first, *others])
    assert worst(found, expected[19:]) < LIMITS[form]
    wrong = transformers_logits(tiny_model(), TOKENS, north_south["south"] if adapter else north_south["north"]).numpy()
    assert worst(found, wrong[19:]) > 0.1


def test_a_dense_lora_does_not_cut_the_delegate(comparison_figures):
    assert comparison_figures["executorch", "lora-fp32"] == comparison_figures["executorch", "none"]


def test_the_manifest_says_what_a_dense_lora_takes(comparison):
    (entry,) = comparison("onnx", "lora-fp32").manifest.adapters
    assert (entry.name, entry.r, entry.scale_code, entry.bytes) == ("north", 8, "fp32", 2 * entry.fp16_lora_bytes)
    assert comparison("onnx", "none").manifest.adapters == []


def test_one_adapter_at_a_time(tiny_base, north_south, tmp_path):
    options = ExportOptions(tmp_path / "out", "none", None, MAX_SEQ_LEN)
    with pytest.raises(LordbaError, match="takes one adapter, found 2"):
        export_comparison(tiny_base, north_south, "lora-fp32", "executorch", options, lambda _: None)
    with pytest.raises(LordbaError, match="exist for --target onnx"):
        one = {"north": north_south["north"]}
        export_comparison(tiny_base, one, "lora-fp32", "coreml", options, lambda _: None)
    assert not (tmp_path / "out").exists()
