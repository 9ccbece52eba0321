"""The embedded default, SmolLM2 with the adapters that ship: every figure that the export promises, measured."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from conftest import smollm2_missing, transformers_logits
from torch import Tensor

from lordba.adapter import Adapter, load_adapter
from lordba.blob import HEADER, MAGIC, RECORD
from lordba.export import bundle as export_bundle
from lordba.export.bundle import ExportOptions, export_executorch, shipped_adapters
from lordba.export.executorch.target import MAX_SEQ_LEN
from lordba.export.verify import text_windows
from lordba.models import BaseModel, load_base
from lordba.run import load_tokenizer
from lordba.runtime.bundle import Bundle, ParityCheck, read_bundle
from lordba.runtime.executorch_runner import Program
from lordba.runtime.session import Session

pytestmark = [pytest.mark.slow, pytest.mark.skipif(smollm2_missing() is not None, reason=f"{smollm2_missing()}")]

NAMES = ("movie-sentiment", "shakespeare")
WITH_NONE = (None, *NAMES)
PROMPT = "Review: I saw it twice and would go again. The king is a fool, but what a fool!\nSentiment:"
STEPS = 40
FLOAT_LENGTH = 128
WINDOWS = 5


@contextmanager
def verified_on(windows: int) -> Iterator[None]:
    """Exports in here are verified on so many windows of the text."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_bundle, "text_windows", lambda *arguments: text_windows(*arguments).first(windows))
        yield


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
    with verified_on(WINDOWS):
        export_executorch(base, adapters, ExportOptions(folder))
    return read_bundle(folder, "executorch")


@pytest.fixture(scope="module")
def floating(base, adapters, tmp_path_factory) -> Bundle:
    """The float program, verified by the export on one window only: `test_float_program` does it independently."""
    folder = tmp_path_factory.mktemp("smollm2") / "floating"
    options = ExportOptions(folder, "none", "ptd", FLOAT_LENGTH)
    with verified_on(1):
        export_executorch(base, adapters, options)
    return read_bundle(folder, "executorch")


@pytest.fixture(scope="module")
def tokens(base) -> list[int]:
    """A prompt and what the base makes of it."""
    prompt = base.tokenizer(PROMPT, return_tensors="pt").input_ids
    return base.model.generate(prompt, max_new_tokens=STEPS, do_sample=False, eos_token_id=None)[0].tolist()


@pytest.fixture(scope="module")
def references(base, adapters, tokens) -> dict[str | None, Tensor]:
    """transformers' logits from the last prompt token on, with each adapter unmerged; None is the base alone."""
    wanted: dict[str | None, Adapter | None] = {None: None, **adapters}
    return {name: transformers_logits(base.model, tokens, a)[-STEPS - 1 :] for name, a in wanted.items()}


@pytest.fixture(scope="module")
def found(floating, tokens) -> dict[str | None, Tensor]:
    """The float program's logits at the same places: one prefill, then decode steps."""
    session, result = Session(floating), {}
    for name in WITH_NONE:
        session.use(name)
        rows = [session.feed(tokens[:-STEPS])] + [session.feed([token]) for token in tokens[-STEPS:]]
        result[name] = torch.stack([torch.from_numpy(row) for row in rows])
    return result


def mean_kl(reference: Tensor, logits: Tensor) -> float:
    p, q = (t.double().log_softmax(-1) for t in (reference, logits))
    return (p.exp() * (p - q)).sum(-1).mean().item()


def figures(bundle: Bundle, check: str) -> dict[tuple[str | None, str], ParityCheck]:
    return {(c.adapter, c.metric): c for c in bundle.manifest.parity if c.check == check}


def test_two_adapters_ship():
    assert tuple(shipped_adapters()) == NAMES


def test_both_bundles_are_for_this_base(quantized, floating, adapters):
    (fingerprint,) = {bundle.manifest.base["fingerprint"] for bundle in (quantized, floating)}
    assert all(adapter.base_fingerprint == fingerprint for adapter in adapters.values())
    assert (quantized.manifest.base_quant, floating.manifest.base_quant) == ("int4", "none")


@pytest.mark.parametrize("name", WITH_NONE)
class TestFloatProgram:
    """Where a wrongly applied adapter shows."""

    def test_equals_transformers_at_prefill_and_while_decoding(self, found, references, name):
        assert len(found[name]) > 32
        assert (found[name] - references[name]).abs().max() <= 2e-3
        assert mean_kl(references[name], found[name]) <= 1e-6
        assert (found[name].argmax(-1) == references[name].argmax(-1)).double().mean() >= 0.999

    def test_equals_no_other_adapter(self, found, references, name):
        for other in set(WITH_NONE) - {name}:
            assert (found[name] - references[other]).abs().max() > 100 * 2e-3
            assert mean_kl(references[other], found[name]) > 1e-2

    def test_export_found_the_same(self, floating, name):
        checks = figures(floating, "program")
        assert checks[name, "max_abs_err"].value <= 2e-3
        assert checks[name, "mean_kl"].value <= 1e-6
        assert checks[name, "top1_agreement"].value >= 0.999
        assert name is None or figures(floating, "adapter ops")[name, "max_rel_err"].value <= 1e-6


def test_a_single_flipped_sign_shows(floating, base, adapters, tokens, tmp_path):
    """One of 2.4 million per factor: the program's logits move as transformers' do when the same sign is flipped."""
    name, path = "shakespeare", "model.layers.0.self_attn.v_proj"
    module = adapters[name].modules[path]
    signs = module.b_signs.clone()
    signs[0, 0] ^= 1
    broken = replace(adapters[name], modules={**adapters[name].modules, path: replace(module, b_signs=signs)})
    eager = [transformers_logits(base.model, tokens, a)[-1].double() for a in (broken, adapters[name])]
    data = bytearray(floating.adapter_file(name).read_bytes())
    start = data.index(MAGIC)
    record = RECORD.unpack_from(data, start + HEADER.size + RECORD.size * floating.manifest.modules.index(path))
    data[start + record[5]] ^= 1
    (tmp_path / "broken.ptd").write_bytes(data)
    runs = []
    for file in (tmp_path / "broken.ptd", floating.adapter_file(name)):
        runs.append(Program(floating.program, file).execute([torch.tensor([tokens]), torch.tensor([0])])[0].flatten())
        runs[-1] = runs[-1].double()
    expected, moved = eager[0] - eager[1], runs[0] - runs[1]
    assert torch.cosine_similarity(expected, moved, dim=0) > 0.9
    assert expected.norm() / 2 < moved.norm() < expected.norm() * 2


class TestQuantizedProgram:
    def test_verified_on_enough_text(self, base):
        windows = text_windows(lambda text: base.tokenizer(text).input_ids, MAX_SEQ_LEN)
        assert sum(len(windows.targets(i)) for i in range(len(windows.tokens))) >= 2500

    def test_near_the_eager_decoder_and_good_enough(self, quantized):
        checks = figures(quantized, "program")
        for name in WITH_NONE:
            assert 0 < checks[name, "mean_kl"].value <= 0.035
        assert checks[None, "perplexity_ratio"].value <= 1.015
        assert figures(quantized, "quality gate")[None, "perplexity_ratio_to_float"].value <= 1.05
        assert all(check.passed for check in quantized.manifest.parity)

    @pytest.mark.parametrize("name", NAMES)
    def test_adapter_ops(self, quantized, name):
        assert 0 < figures(quantized, "adapter ops")[name, "max_rel_err"].value <= 1e-6

    def test_nearest_to_its_own_float_model(self, quantized, references, tokens):
        session = Session(quantized)
        for name in WITH_NONE:
            session.use(name)
            rows = [session.feed(tokens[:-STEPS])] + [session.feed([token]) for token in tokens[-STEPS:]]
            logits = torch.stack([torch.from_numpy(row) for row in rows])
            distance = {other: mean_kl(reference, logits) for other, reference in references.items()}
            assert min(distance, key=distance.__getitem__) == name, distance

    def test_sizes(self, quantized):
        assert quantized.program.stat().st_size < 170e6
        for entry in quantized.manifest.adapters:
            assert (entry.r, entry.modules) == (16, 210)
            assert entry.fp16_lora_bytes / entry.bytes >= 12.5
            assert (quantized.folder / entry.file).stat().st_size <= 1.2 * entry.bytes

    @pytest.mark.parametrize("prompt", [PROMPT, "Once upon a time, there was a little"])
    def test_an_adapter_changes_the_text(self, quantized, prompt):
        ids = load_tokenizer(quantized).encode(prompt).ids
        session = Session(quantized)
        made = {}
        for name in WITH_NONE:
            session.use(name)
            made[name] = tuple(session.generate(ids, 24))
        assert len(set(made.values())) == len(WITH_NONE)

    @pytest.mark.parametrize("name", NAMES)
    def test_executorchs_own_runner_generates_the_same(self, quantized, name):
        from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner

        prompt = "Once upon a time, there was a little"
        tokenizer = load_tokenizer(quantized)
        expected = tokenizer.decode(list(Session(quantized, name).generate(tokenizer.encode(prompt).ids, 24)))
        runner = TextLLMRunner(
            str(quantized.program), str(quantized.folder / "tokenizer.json"), str(quantized.adapter_file(name))
        )
        pieces: list[str] = []
        runner.generate(prompt, GenerationConfig(max_new_tokens=24, temperature=0.0, echo=False), pieces.append)
        assert "".join(pieces) == expected
