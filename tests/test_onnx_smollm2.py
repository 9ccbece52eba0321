"""The embedded default, SmolLM2 with the adapters that ship, as ONNX bundles: every figure the export promises."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from conftest import smollm2_missing, transformers_logits

from lordba.adapter import Adapter, load_adapter
from lordba.backends.onnxruntime import native_calls
from lordba.export import bundle as export_bundle
from lordba.export.bundle import ExportOptions, export_onnx, shipped_adapters
from lordba.export.verify import text_windows
from lordba.models import BaseModel, load_base
from lordba.run import load_tokenizer
from lordba.runtime.bundle import Bundle, read_bundle
from lordba.runtime.onnx_runner import OnnxRunner
from lordba.runtime.session import Session

pytestmark = [pytest.mark.slow, pytest.mark.skipif(smollm2_missing() is not None, reason=f"{smollm2_missing()}")]

NAMES = ("movie-sentiment", "shakespeare")
WITH_NONE = (None, *NAMES)
PROMPT = "Review: I saw it twice and would go again. The king is a fool, but what a fool!\nSentiment:"
STEPS = 24
WINDOWS = 5


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return load_base()


@pytest.fixture(scope="module")
def adapters() -> dict[str, Adapter]:
    return {name: load_adapter(folder) for name, folder in shipped_adapters().items()}


@pytest.fixture(scope="module")
def quantized(base, adapters, tmp_path_factory) -> Bundle:
    """What the command writes by default, verified on some windows; the gate runs the command itself, with all."""
    folder = tmp_path_factory.mktemp("smollm2") / "quantized"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_bundle, "text_windows", lambda *arguments: text_windows(*arguments).first(WINDOWS))
        export_onnx(base, adapters, ExportOptions(folder))
    return read_bundle(folder, "onnx")


@pytest.fixture(scope="module")
def exact(quantized) -> Bundle:
    """The same program with float activations, as --accuracy-level 0 writes it."""
    model = onnx.load(quantized.program, load_external_data=False)
    levels = [a for node in model.graph.node for a in node.attribute if a.name == "accuracy_level"]
    assert {attribute.i for attribute in levels} == {4}
    for attribute in levels:
        attribute.i = 0
    onnx.save(model, quantized.folder / "exact.onnx")
    return replace(quantized, manifest=replace(quantized.manifest, program="exact.onnx"))


@pytest.fixture(scope="module")
def tokens(base) -> list[int]:
    prompt = base.tokenizer(PROMPT, return_tensors="pt").input_ids
    return base.model.generate(prompt, max_new_tokens=STEPS, do_sample=False, eos_token_id=None)[0].tolist()


@pytest.fixture(scope="module")
def references(base, adapters, tokens) -> dict[str | None, np.ndarray]:
    wanted: dict[str | None, Adapter | None] = {None: None, **adapters}
    return {name: transformers_logits(base.model, tokens, a)[-STEPS - 1 :].numpy() for name, a in wanted.items()}


def logits(session: Session, tokens: list[int]) -> np.ndarray:
    session.reset()
    return np.stack([session.feed(tokens[:-STEPS])] + [session.feed([token]) for token in tokens[-STEPS:]])


def mean_kl(reference: np.ndarray, found: np.ndarray) -> float:
    p, q = (torch.from_numpy(t).double().log_softmax(-1) for t in (reference, found))
    return (p.exp() * (p - q)).sum(-1).mean().item()


class TestQuantized:
    def test_promises(self, quantized):
        checks = {(c.check, c.adapter, c.metric): c.value for c in quantized.manifest.parity}
        for way in ("program", "program without our kernel"):
            for name in WITH_NONE:
                assert 0 < checks[way, name, "mean_kl"] <= 0.006
        assert checks["program", None, "perplexity_ratio"] <= 1.01
        assert checks["quality gate", None, "perplexity_ratio_to_float"] <= 1.05
        for name in NAMES:
            assert 0 < checks["adapter ops", name, "max_rel_err"] <= 1e-6
        assert all(check.passed for check in quantized.manifest.parity)

    def test_sizes(self, quantized):
        assert quantized.manifest.base_quant == "int4"
        assert (quantized.folder / "model.onnx.data").stat().st_size < 150e6
        for entry in quantized.manifest.adapters:
            assert (entry.r, entry.modules) == (16, 210)
            assert (quantized.folder / entry.file).stat().st_size <= 1.2 * entry.bytes

    @pytest.mark.parametrize("native", [True, False])
    def test_nearest_to_its_own_float_model(self, quantized, references, tokens, native):
        session = Session(quantized, runner=OnnxRunner(quantized, native=native, threads=1))
        for name in WITH_NONE:
            session.use(name)
            before = native_calls()
            found = logits(session, tokens)
            assert native_calls() - before == (210 * (STEPS + 1) if native else 0)
            distance = {other: mean_kl(reference, found) for other, reference in references.items()}
            assert min(distance, key=distance.__getitem__) == name, distance

    def test_swap_by_plain_inputs_is_the_same_to_the_last_bit(self, quantized, tokens):
        sessions = [
            Session(quantized, "shakespeare", OnnxRunner(quantized, threads=1, as_feeds=as_feeds))
            for as_feeds in (False, True)
        ]
        one, other = (logits(session, tokens) for session in sessions)
        assert np.array_equal(one, other)

    def test_an_adapter_changes_the_text(self, quantized):
        ids = load_tokenizer(quantized).encode("Once upon a time, there was a little").ids
        session = Session(quantized, runner=OnnxRunner(quantized, threads=1))
        made = {}
        for name in WITH_NONE:
            session.use(name)
            made[name] = tuple(session.generate(ids, STEPS))
        assert len(set(made.values())) == len(WITH_NONE)


@pytest.mark.parametrize("name", WITH_NONE)
def test_with_float_activations_it_is_transformers(exact, references, tokens, name):
    """The split of the 4-bit codes loses nothing: the program equals the float model, not only a quantized reference.

    The embedding and head are int8 in groups, which the GGUF's own Q8_0 is too.
    """
    found = logits(Session(exact, name, OnnxRunner(exact, threads=1)), tokens)
    assert np.abs(found - references[name]).max() <= 2e-2
    assert mean_kl(references[name], found) <= 1e-5
    for other in set(WITH_NONE) - {name}:
        assert mean_kl(references[other], found) > 1e-2
