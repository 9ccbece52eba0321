"""ONNX bundles: what the export writes and promises, hot swap, checks before the first run, quantized bases, .ort."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import MAX_SEQ_LEN, random_adapter, random_module, some_tokens, tiny_model, transformers_logits

from lordba import run
from lordba.adapter import Adapter
from lordba.backends.onnxruntime import native_calls
from lordba.blob import make_blob
from lordba.errors import LordbaError
from lordba.export.bundle import ExportOptions, export_onnx
from lordba.export.onnx.ort_format import NATIVE_NAME, PORTABLE_NAME
from lordba.export.onnx.target import OnnxTarget
from lordba.runtime.bundle import Bundle, read_bundle
from lordba.runtime.onnx_adapter import INPUT, OnnxAdapter, ProgramInfo, write_onnx_adapter
from lordba.runtime.onnx_runner import OnnxRunner
from lordba.runtime.session import Session
from lordba.scales import ScaleCode

TOKENS = some_tokens(24)
PROMPT = 10
WITH_NONE = (None, "north", "south")


@pytest.fixture(scope="module")
def adapters(tiny_base) -> dict[str, Adapter]:
    return {name: random_adapter(tiny_base.model, r, seed=r) for name, r in (("north", 8), ("south", 16))}


@pytest.fixture(scope="module")
def exported(tiny_base, adapters, tmp_path_factory) -> Callable[..., Bundle]:
    """Bundles by base_quant and accuracy_level, each exported once; tests must not write to them."""
    made: dict[tuple[str, int], Bundle] = {}

    def exported(base_quant: str = "none", accuracy_level: int = 4) -> Bundle:
        key = base_quant, accuracy_level
        if key not in made:
            folder = tmp_path_factory.mktemp("bundles") / f"{base_quant}-{accuracy_level}"
            options = ExportOptions(folder, base_quant, accuracy_level=accuracy_level, ort_format=base_quant == "none")
            export_onnx(tiny_base, adapters, options)
            made[key] = read_bundle(folder, "onnx")
        return made[key]

    return exported


@pytest.fixture
def bundle(exported) -> Bundle:
    return exported()


def open_session(bundle: Bundle, name: str | None = None, **options: bool) -> Session:
    return Session(bundle, name, OnnxRunner(bundle, threads=1, **options))


def logits(session: Session) -> np.ndarray:
    """One prefill, then decode steps."""
    session.reset()
    return np.stack([session.feed(TOKENS[:PROMPT])] + [session.feed([token]) for token in TOKENS[PROMPT:]])


def expected(tiny_base, adapter: Adapter | None) -> np.ndarray:
    return transformers_logits(tiny_base.model, TOKENS, adapter)[PROMPT - 1 :].numpy()


def off_by(found: np.ndarray, reference: np.ndarray) -> float:
    return float(np.abs(found - reference).max() / np.abs(reference).max())


class TestSession:
    @pytest.mark.parametrize("native", [True, False])
    @pytest.mark.parametrize("name", WITH_NONE)
    def test_equals_transformers_and_no_other_adapter(self, bundle, tiny_base, adapters, name, native):
        before = native_calls()
        found = logits(open_session(bundle, name, native=native))
        assert native_calls() - before == (14 * (1 + len(TOKENS) - PROMPT) if native else 0)
        for other in WITH_NONE:
            off = off_by(found, expected(tiny_base, adapters.get(other)))
            assert off <= 1e-4 if other == name else off > 1e-2

    @pytest.mark.parametrize("native", [True, False])
    def test_hot_swap_by_adapter_and_by_plain_inputs_is_the_same_to_the_last_bit(self, bundle, native):
        by_adapter, by_input = (open_session(bundle, native=native, as_feeds=as_feeds) for as_feeds in (False, True))
        fresh = {name: logits(open_session(bundle, name, native=native)) for name in WITH_NONE}
        for name in ("south", "north", None, "south"):
            for session in (by_adapter, by_input):
                session.use(name)
                assert np.array_equal(logits(session), fresh[name])

    def test_a_swap_loads_no_program(self, bundle, monkeypatch):
        session = open_session(bundle)
        monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_: pytest.fail("loaded the program again"))
        session.use("north")
        session.feed(TOKENS)

    def test_generates_what_feeding_gives(self, bundle):
        session = open_session(bundle, "north")
        made = list(session.generate(TOKENS[:PROMPT], 12))
        tokens = list(TOKENS[:PROMPT])
        for token in made:
            session.reset()
            assert int(session.feed(tokens).argmax()) == token
            tokens.append(token)

    def test_the_end_of_the_context(self, bundle):
        session = open_session(bundle)
        assert session.max_seq_len == 128
        with pytest.raises(LordbaError, match="do not fit the program, which was exported for 128"):
            session.feed([5] * 129)

    def test_run_command(self, bundle, monkeypatch, capsys):
        texts = {}
        for name in ("none", "north", "south"):
            arguments = [
                "lordba.run",
                str(bundle.folder),
                "--prompt",
                "Once",
                "--adapter",
                name,
                "--max-new-tokens",
                "12",
            ]
            monkeypatch.setattr("sys.argv", arguments)
            run.main()
            texts[name] = capsys.readouterr().out
            tokenizer = run.load_tokenizer(bundle)
            session = open_session(bundle, None if name == "none" else name)
            assert texts[name] == tokenizer.decode(list(session.generate(tokenizer.encode("Once").ids, 12))) + "\n"
        assert len(set(texts.values())) == 3


class TestManifest:
    def test_what_it_says(self, bundle, adapters):
        manifest = bundle.manifest
        assert (manifest.target, manifest.program, manifest.adapter_mode) == ("onnx", "model.onnx", "onnx_adapter")
        assert set(manifest.modules) == set(adapters["north"].modules) and manifest.no_adapter is None
        assert manifest.requires == [] and "onnxruntime" in manifest.toolchain
        names = {file.path for file in manifest.files}
        assert {"model.onnx", "model.onnx.data", "genai_config.json", "adapters/north.onnx_adapter"} <= names
        assert all(check.passed for check in manifest.parity)
        checks = {(check.check, check.adapter) for check in manifest.parity}
        assert {(way, name) for way in ("program", "program without our kernel") for name in WITH_NONE} <= checks

    def test_a_damaged_file_is_found(self, bundle, tmp_path):
        shutil.copytree(bundle.folder, tmp_path / "copy")
        data = tmp_path / "copy/model.onnx.data"
        raw = bytearray(data.read_bytes())
        raw[100] ^= 1
        data.write_bytes(raw)
        with pytest.raises(LordbaError, match=r"model\.onnx\.data: its contents do not match"):
            read_bundle(tmp_path / "copy")

    def test_a_program_of_another_base(self, bundle):
        other = dataclasses.replace(bundle.manifest, base={"name": "tiny", "fingerprint": "sha256:" + "0" * 64})
        with pytest.raises(LordbaError, match=r"model\.onnx: was made for the base sha256"):
            OnnxRunner(Bundle(bundle.folder, other))

    def test_a_program_without_a_place(self, bundle):
        other = dataclasses.replace(bundle.manifest, modules=[*bundle.manifest.modules, "model.layers.9.mlp.up_proj"])
        with pytest.raises(LordbaError, match=r"no place for an adapter of model\.layers\.9"):
            OnnxRunner(Bundle(bundle.folder, other))

    def test_length_must_fit_the_model(self, tiny_base, adapters):
        with pytest.raises(LordbaError, match=r"--max-seq-len 129: .* 2 to 128"):
            OnnxTarget(tiny_base, adapters, ExportOptions(Path("unused"), max_seq_len=129))
        assert OnnxTarget(tiny_base, adapters, ExportOptions(Path("unused"), max_seq_len=MAX_SEQ_LEN)).max_seq_len == 64


class TestAWrongAdapter:
    """ONNX Runtime itself takes these, or fails in the middle of a run."""

    @pytest.fixture(scope="class")
    def info(self, exported) -> ProgramInfo:
        return OnnxRunner(exported(), threads=1).info

    @pytest.fixture
    def check(self, bundle, info, tmp_path) -> Callable[..., None]:
        runner = OnnxRunner(bundle, threads=1)

        def check(tensors: dict[str, np.ndarray], version: int | None = None) -> None:
            path = tmp_path / "wrong.onnx_adapter"
            write_onnx_adapter(path, tensors, info.model_version if version is None else version)
            runner.use(runner.load_file(path))

        return check

    def test_the_right_one_is_taken(self, check, info, adapters):
        check({INPUT: info.blob(adapters["north"])})

    def test_one_with_fewer_modules_is_taken(self, bundle, tiny_base, info, adapters, tmp_path):
        modules = {path: module for path, module in adapters["north"].modules.items() if "q_proj" in path}
        partial = dataclasses.replace(adapters["north"], modules=modules)
        info.write(partial, tmp_path / "partial.onnx_adapter")
        for native in (True, False):
            runner = OnnxRunner(bundle, native=native, threads=1)
            session = Session(bundle, None, runner)
            runner.use(runner.load_file(tmp_path / "partial.onnx_adapter"))
            found = logits(session)
            assert off_by(found, expected(tiny_base, partial)) <= 1e-4
            assert off_by(found, expected(tiny_base, adapters["north"])) > 1e-2

    def test_another_base(self, check, info, adapters):
        other = dataclasses.replace(info, fingerprint="sha256:" + "12" * 32)
        with pytest.raises(LordbaError, match=r"wrong\.onnx_adapter: was made for another base or for other modules"):
            check({INPUT: info.blob(adapters["north"])}, other.model_version)

    def test_modules_in_another_order(self, check, info, adapters):
        """Of equal sizes, which nothing but the model version tells."""
        paths = list(info.modules)
        i, j = (paths.index(f"model.layers.{layer}.mlp.up_proj") for layer in (0, 1))
        paths[i], paths[j] = paths[j], paths[i]
        other = dataclasses.replace(info, modules={path: info.modules[path] for path in paths})
        assert list(other.modules.values()) == list(info.modules.values())
        with pytest.raises(LordbaError, match="for other modules"):
            check({INPUT: other.blob(adapters["north"])}, other.model_version)

    def test_a_newer_version(self, bundle, info, adapters, tmp_path, monkeypatch):
        monkeypatch.setattr("lordba.runtime.onnx_adapter.ADAPTER_VERSION", 3)
        info.write(adapters["north"], tmp_path / "new.onnx_adapter")
        monkeypatch.undo()
        with pytest.raises(LordbaError, match=r"new\.onnx_adapter: adapter version 3 is not known"):
            OnnxRunner(bundle, threads=1).load_file(tmp_path / "new.onnx_adapter")

    @pytest.mark.parametrize(
        "tensors, said",
        [
            ({"model.layers.0.mlp.up_proj.signs": np.zeros(8, np.uint8)}, "must hold the tensor 'adapter' alone"),
            ({}, "must hold the tensor 'adapter' alone"),
            ({INPUT: np.zeros((160, 1), np.uint8)}, r"found tensor\(uint8\) \[160, 1\]"),
            ({INPUT: np.zeros(160, np.float32)}, r"found tensor\(float\) \[160\]"),
            ({INPUT: np.zeros(160, np.uint8)}, "not an adapter blob"),
            ({INPUT: np.zeros(3, np.uint8)}, "shorter than its header"),
        ],
    )
    def test_names_shapes_and_types(self, check, tensors, said):
        with pytest.raises(LordbaError, match=said):
            check(tensors)

    def test_records(self, check, info, adapters):
        """Rank 0, other sizes, another scale code, fewer modules: each with the right model version."""
        path = "model.layers.0.mlp.up_proj"
        right = [adapters["north"].modules[name] for name in info.modules]
        at = list(info.modules).index(path)
        wrong: dict[str, list] = {
            f"{path} is of rank 0": [None],
            f"{path} is of rank 3, 64 to 32 channels with log4": [random_module(64, 32, 3)],
            f"{path} is of rank 8, 64 to 96 channels with fp16": [random_module(64, 96, 8, ScaleCode.FP16)],
            "holds 13 modules, the program takes 14": [],
        }
        for said, module in wrong.items():
            with pytest.raises(LordbaError, match=said):
                check({INPUT: make_blob([*right[:at], *module, *right[at + 1 :]]).numpy()})

    def test_not_an_adapter_file(self, bundle, tmp_path):
        (tmp_path / "no.onnx_adapter").write_bytes(b"hello")
        with pytest.raises(LordbaError, match="no adapter file"):
            OnnxRunner(bundle, threads=1).load_file(tmp_path / "no.onnx_adapter")
        with pytest.raises(LordbaError, match="no adapter file"):
            OnnxRunner(bundle, threads=1).load_file(tmp_path / "missing.onnx_adapter")

    def test_onnx_runtime_would_have_run_an_adapter_of_another_base(self, bundle, info, adapters, tmp_path):
        """Why we check: the control of this class."""
        other = dataclasses.replace(info, fingerprint="sha256:" + "0" * 64)
        other.write(adapters["north"], tmp_path / "other.onnx_adapter")
        adapter = OnnxAdapter(tmp_path / "other.onnx_adapter")
        assert adapter.model_version == other.model_version != info.model_version
        runner = OnnxRunner(bundle, threads=1)
        runner._run_options.add_active_adapter(adapter.lora)
        assert np.array_equal(runner.run(TOKENS, 0), open_session(bundle, "north").feed(TOKENS))


@pytest.mark.parametrize("base_quant, level", [("int4", 0), ("int4", 4), ("int8", 4)])
class TestQuantized:
    def test_every_check_passes(self, exported, base_quant, level):
        manifest = exported(base_quant, level).manifest
        assert manifest.base_quant == base_quant and manifest.requires == ["com.microsoft::MatMulNBits"]
        assert all(check.passed for check in manifest.parity)
        metrics = {check.metric for check in manifest.parity if check.check == "program"}
        assert metrics == ({"mean_kl", "perplexity_ratio"} if level else {"max_abs_err", "mean_kl", "top1_agreement"})

    def test_nearest_to_its_own_float_model(self, exported, tiny_base, adapters, base_quant, level):
        references = {name: expected(tiny_base, adapters.get(name)) for name in WITH_NONE}
        for native in (True, False):
            session = open_session(exported(base_quant, level), native=native)
            for name in WITH_NONE:
                session.use(name)
                distance = {other: off_by(logits(session), reference) for other, reference in references.items()}
                assert min(distance, key=distance.__getitem__) == name, distance

    def test_smaller_than_float(self, exported, base_quant, level):
        float_size, size = (
            (exported(*key).folder / "model.onnx.data").stat().st_size for key in (("none", 4), (base_quant, level))
        )
        assert size < float_size / 3


class TestOrtFormat:
    """The same logits from both .ort files; the native one needs the library."""

    def variant(self, bundle: Bundle, program: str) -> Bundle:
        return Bundle(bundle.folder, dataclasses.replace(bundle.manifest, program=program))

    @pytest.mark.parametrize("name", WITH_NONE)
    @pytest.mark.parametrize("program, native", [(NATIVE_NAME, True), (PORTABLE_NAME, False)])
    def test_equals_the_onnx_program(self, bundle, program, native, name):
        before = native_calls()
        found = logits(open_session(self.variant(bundle, program), name, native=native))
        assert (native_calls() > before) == native
        assert off_by(found, logits(open_session(bundle, name, native=native))) <= 1e-6

    def test_the_native_one_needs_the_library(self, bundle):
        with pytest.raises(LordbaError, match="cannot load it"):
            OnnxRunner(self.variant(bundle, NATIVE_NAME), native=False)

    def test_listed_in_the_manifest(self, bundle):
        assert {NATIVE_NAME, PORTABLE_NAME} <= {file.path for file in bundle.manifest.files}


def test_adapters_of_several_scale_codes_share_one_program_of_fp32_scales(tiny_base, tmp_path):
    adapters = {
        code.value: random_adapter(tiny_base.model, 8, code, seed=i) for i, code in enumerate(ScaleCode, start=1)
    }
    export_onnx(tiny_base, adapters, ExportOptions(tmp_path / "mixed", "none"))
    session = open_session(read_bundle(tmp_path / "mixed"))
    for name, adapter in adapters.items():
        session.use(name)
        assert off_by(logits(session), expected(tiny_base, adapter)) <= 1e-4


def test_an_adapter_that_does_not_fit_is_refused(tiny_base, tmp_path):
    other = tiny_model(hidden_size=96)
    adapter = dataclasses.replace(random_adapter(other), base_fingerprint=None)
    with pytest.raises(LordbaError, match=r"adapter pirate: module .* maps"):
        export_onnx(tiny_base, {"pirate": adapter}, ExportOptions(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_cannot_be_exported(tiny_base, adapters, monkeypatch, tmp_path):
    def fail(*_, **__):
        raise torch.onnx.errors.OnnxExporterError("no") from ValueError("data-dependent")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(LordbaError, match=r"cannot be captured .*ValueError: data-dependent"):
        export_onnx(tiny_base, adapters, ExportOptions(tmp_path / "out", "none"))
    assert list(tmp_path.iterdir()) == []
