"""Capture: both paths compute what transformers computes, with and without adapter, and leave the model alone."""

import pytest
import torch
from conftest import (
    FAMILIES,
    FAST_FAMILIES,
    MAX_SEQ_LEN,
    VOCABULARY,
    random_adapter,
    random_module,
    some_tokens,
    tiny_model,
    transformers_logits,
)
from torch import Tensor

from lordba.adapter import Adapter
from lordba.errors import LordbaError
from lordba.export.executorch.capture import Captured, capture
from lordba.export.executorch.decoder import why_not_fast
from lordba.export.executorch.quantize import quantize_base
from lordba.scales import ScaleCode

TOLERANCE = 2e-5
ROUTES = [(family, "fast") for family in FAST_FAMILIES] + [(family, "generic") for family in FAMILIES]
ROPES = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "original_max_position_embeddings": 32,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
}


@torch.no_grad()
def logits_of(captured: Captured, adapter: Adapter | None, tokens: list[int], steps: list[int]) -> Tensor:
    """Feed the tokens in pieces of these lengths; logits of every token, [T, vocabulary]."""
    assert sum(steps) == len(tokens)
    captured.slot.blob = captured.slot.blob_of(adapter)
    captured.module.all_logits = True
    rows, start = [], 0
    for n in steps:
        rows.append(captured.module(torch.tensor([tokens[start : start + n]]), torch.tensor([start]))[0])
        start += n
    return torch.cat(rows)


def check(model, adapter: Adapter, route: str) -> None:
    """Prefill, decode, and pieces: all equal transformers, with the adapter and without."""
    captured = capture(model, {"a": adapter}, MAX_SEQ_LEN, route)
    assert captured.route == route
    tokens = some_tokens(24)
    with_adapter, without = transformers_logits(model, tokens, adapter), transformers_logits(model, tokens)
    assert (with_adapter - without).abs().max() > 1000 * TOLERANCE
    for steps in ([24], [1] * 24, [9, 1, 1, 6, 7]):
        for wanted, expected in ((adapter, with_adapter), (None, without)):
            found = logits_of(captured, wanted, tokens, steps)
            torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family, route", ROUTES)
def test_equals_transformers(family, route):
    model = tiny_model(family)
    check(model, random_adapter(model, seed=1), route)


@pytest.mark.parametrize("rope", ROPES)
def test_fast_path_knows_static_rotary_embeddings(rope):
    model = tiny_model(rope_parameters={"rope_type": rope, "rope_theta": 100.0, **ROPES[rope]})
    assert model.model.rotary_emb.rope_type == rope
    check(model, random_adapter(model), "fast")


@pytest.mark.parametrize("route", ["fast", "generic"])
@pytest.mark.parametrize("tied", [True, False])
def test_biases_and_an_adapted_head(route, tied):
    model = tiny_model(attention_bias=True, mlp_bias=True, tie_word_embeddings=tied)
    modules = dict(random_adapter(model, only=("k_proj", "down_proj")).modules)
    modules["lm_head"] = random_module(64, VOCABULARY, 3)
    check(model, Adapter(modules, ScaleCode.LOG4), route)


def test_only_the_last_logits_are_made_unless_all_are_wanted():
    model = tiny_model()
    captured = capture(model, {"a": random_adapter(model)}, MAX_SEQ_LEN)
    captured.slot.blob = captured.slot.blob_of(None)
    tokens = some_tokens(5)
    logits = captured.module(torch.tensor([tokens]), torch.tensor([0]))
    assert logits.shape == (1, 1, VOCABULARY)
    torch.testing.assert_close(logits[0, 0], transformers_logits(model, tokens)[-1], atol=TOLERANCE, rtol=0)


def test_places_are_the_union_of_all_adapters():
    model = tiny_model()
    adapters = {"q": random_adapter(model, only=("q_proj",)), "up": random_adapter(model, only=("0.mlp.up_proj",))}
    slot = capture(model, adapters, MAX_SEQ_LEN, "fast").slot
    adapted = set(adapters["q"].modules) | set(adapters["up"].modules)
    assert {path for path in slot.paths if path} == adapted
    assert [path is None for path in slot.paths] == [False, True, True, True, False, False, True, True]
    slot = capture(model, adapters, MAX_SEQ_LEN, "generic").slot
    assert sorted(path for path in slot.paths if path) == sorted(adapted) and None not in slot.paths


@pytest.mark.parametrize(
    "family, changes, reason",
    [
        ("gpt2", {}, "family gpt2"),
        ("llama", {"hidden_act": "gelu"}, "gelu"),
        ("mistral", {"sliding_window": 16}, "sliding-window"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}, "sliding-window"),
        ("llama", {"rope_parameters": LONGROPE}, "longrope changes with the length"),
    ],
)
def test_why_not_fast(family, changes, reason):
    model = tiny_model(family, **changes)
    assert reason in why_not_fast(model)
    with pytest.raises(LordbaError, match=reason):
        capture(model, {}, MAX_SEQ_LEN, "fast")


@pytest.mark.parametrize("family", FAST_FAMILIES)
def test_fast_is_preferred_where_it_computes_the_same(family):
    assert capture(tiny_model(family), {}, MAX_SEQ_LEN).route == "fast"


def test_generic_path_stands_in():
    model = tiny_model(hidden_act="gelu")
    assert capture(model, {}, MAX_SEQ_LEN).route == "generic"
    check(model, random_adapter(model), "generic")


def test_generic_path_refuses_what_it_would_compute_wrongly():
    model = tiny_model("mistral", sliding_window=16)
    with pytest.raises(LordbaError, match="sliding-window"):
        captured = capture(model, {}, MAX_SEQ_LEN)
        logits_of(captured, None, some_tokens(24), [24])


@pytest.mark.parametrize("family, route", [("llama", "fast"), ("llama", "generic"), ("gpt2", "generic")])
def test_the_callers_model_stays_as_it_is(family, route):
    model, tokens = tiny_model(family), some_tokens(9)
    adapter = random_adapter(model)
    logits = transformers_logits(model, tokens)
    types = {name: type(module) for name, module in model.named_modules()}
    weights = {name: weight for name, weight in model.named_parameters(remove_duplicate=False)}
    config = model.config.to_dict()
    attention = model.config._attn_implementation
    captured = capture(model, {"a": adapter}, MAX_SEQ_LEN, route)
    quantize_base(captured.module, "int8")
    logits_of(captured, adapter, tokens, [9])
    assert torch.equal(transformers_logits(model, tokens), logits)
    assert {name: type(module) for name, module in model.named_modules()} == types
    assert all(weight is weights[name] for name, weight in model.named_parameters(remove_duplicate=False))
    assert model.config.to_dict() == config and model.config._attn_implementation == attention


def test_captures_share_weights_but_no_state():
    model, tokens = tiny_model(), some_tokens(9)
    adapter = random_adapter(model)
    first, second = (capture(model, {"a": adapter}, MAX_SEQ_LEN, "generic") for _ in range(2))
    expected = transformers_logits(model, tokens, adapter)
    logits_of(second, None, some_tokens(9, seed=1), [9])
    torch.testing.assert_close(logits_of(first, adapter, tokens, [4, 5]), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    "path, size, said",
    [("model.layers.5.mlp.up_proj", (64, 96), "lacks"), ("model.layers.0.mlp.up_proj", (64, 64), "maps 64 to 96")],
)
@pytest.mark.parametrize("route", ["fast", "generic"])
def test_an_adapter_that_does_not_fit_is_refused(route, path, size, said):
    adapter = Adapter({path: random_module(*size, 4)}, ScaleCode.LOG4)
    with pytest.raises(LordbaError, match=said) as raised:
        capture(tiny_model(), {"pirate": adapter}, MAX_SEQ_LEN, route)
    assert "pirate" in str(raised.value) and path in str(raised.value)


@pytest.mark.parametrize("length", [0, 1, 129])
def test_length_must_fit_the_model(length):
    with pytest.raises(LordbaError, match=rf"--max-seq-len {length}: .* 2 to 128"):
        capture(tiny_model(), {}, length)
