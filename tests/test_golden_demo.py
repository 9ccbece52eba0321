"""The golden files of the Kotlin and Swift packages say what this package computes."""

import json
from pathlib import Path

import pytest
import torch
from golden.demo import make
from tokenizers import Tokenizer

from lordba.adapter import load_adapter
from lordba.layers import attach
from lordba.profiling.record import Series, overhead
from lordba.runtime.bundle import read_bundle

GOLDEN = Path(make.__file__).parent


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer-plain"])
def test_tokenizers(name):
    tokenizer = Tokenizer.from_file(str(GOLDEN / name / "tokenizer.json"))
    assert json.loads((GOLDEN / name / "cases.json").read_text()) == make.cases(tokenizer)


def test_sampling_draws_in_proportion():
    assert json.loads((GOLDEN / "sampling.json").read_text()) == make.sampling()
    logits, draws = torch.tensor([0.3, 1.0, -0.5, 0.3]).numpy(), 4000
    tokens = [make.sample(logits, 0.8, 3, 1.0, (i + 0.5) / draws) for i in range(draws)]
    kept = torch.tensor([0.3, 1.0, -1e9, 0.3]) / 0.8
    counts = torch.bincount(torch.tensor(tokens), minlength=4) / draws
    torch.testing.assert_close(counts, kept.softmax(0), atol=1e-3, rtol=0)


def test_the_model_gives_the_golden_logits_with_its_adapter_and_without():
    import transformers

    golden = json.loads((GOLDEN / "model" / "logits.json").read_text())
    model = transformers.AutoModelForCausalLM.from_pretrained(GOLDEN / "model", dtype=torch.float32)
    tokens = torch.tensor([golden["tokens"]])
    expected = {name: torch.tensor(row) for name, row in golden["last_logits"].items()}
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits[0, -1], expected["none"], atol=1e-5, rtol=1e-5)
        attach(model, load_adapter(GOLDEN / "model" / "adapter"))
        torch.testing.assert_close(model(tokens).logits[0, -1], expected["adapter"], atol=1e-5, rtol=1e-5)
    assert (expected["none"] - expected["adapter"]).abs().max() > 0.1


def test_the_bundle_is_whole():
    assert read_bundle(GOLDEN / "bundle").adapter_file("golden").is_file()


def test_the_profile_file():
    given, text = make.profile()
    assert json.loads((GOLDEN / "profile" / "samples.json").read_text()) == json.loads(json.dumps(given))
    assert (GOLDEN / "profile" / "profile.json").read_text() == text


def test_a_difference_below_the_noise_is_not_quoted():
    def series(adapter: str, samples: list[float]) -> Series:
        return Series("onnx", "m", "int4", adapter, "decode", 1, 1, samples)

    base = series("none", [10.0, 10.1, 9.9, 10.2, 9.8])
    assert overhead(series("lordba", [10.05, 10.15, 9.95, 10.25, 9.85]), base)[0] is None
    quoted, noise = overhead(series("lordba", [11.0, 11.1, 10.9, 11.2, 10.8]), base)
    assert quoted == pytest.approx(10.0)
    # by hand: every median absolute deviation is 0.1
    assert noise == pytest.approx(100 * 2 * 2 * 1.4826 * 0.1 / 5**0.5 / 10)
