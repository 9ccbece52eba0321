"""onnxruntime-genai generates from a bundle and switches adapters: with the body, and with our kernel."""

import ctypes
import json
import shutil
from pathlib import Path

import pytest
from conftest import random_adapter, some_tokens

from lordba.backends.onnxruntime import library
from lordba.export.bundle import ExportOptions, export_onnx
from lordba.runtime.bundle import read_bundle
from lordba.runtime.onnx_runner import OnnxRunner
from lordba.runtime.session import Session

genai = pytest.importorskip("onnxruntime_genai")
PROMPT = some_tokens(7)
NEW = 12
NAMES = (None, "north", "south")


@pytest.fixture(scope="module")
def folder(tiny_base, tmp_path_factory) -> Path:
    adapters = {name: random_adapter(tiny_base.model, r, seed=r) for name, r in (("north", 8), ("south", 16))}
    folder = tmp_path_factory.mktemp("bundle") / "none"
    export_onnx(tiny_base, adapters, ExportOptions(folder, "none"))
    return folder


@pytest.fixture(scope="module")
def expected(folder) -> dict[str | None, list[int]]:
    bundle = read_bundle(folder)
    session = Session(bundle, runner=OnnxRunner(bundle, threads=1))
    made = {}
    for name in NAMES:
        session.use(name)
        made[name] = list(session.generate(PROMPT, NEW))
    assert len({tuple(tokens) for tokens in made.values()}) == len(NAMES)
    return made


def generate(folder: Path) -> dict[str | None, list[int]]:
    """What genai generates with every adapter in turn, by one model and one Adapters object."""
    model = genai.Model(str(folder))
    adapters = genai.Adapters(model)
    for name in NAMES[1:]:
        adapters.load(str(folder / f"adapters/{name}.onnx_adapter"), name)
    made: dict[str | None, list[int]] = {}
    for name in NAMES:
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(max_length=len(PROMPT) + NEW, do_sample=False)
        generator = genai.Generator(model, parameters)
        if name:
            generator.set_active_adapter(adapters, name)
        generator.append_tokens(PROMPT)
        made[name] = []
        while not generator.is_done():
            generator.generate_next_token()
            made[name].append(int(generator.get_next_tokens()[0]))
    return made


def without_end(tokens: list[int], end: int = 2) -> list[int]:
    return tokens[: tokens.index(end)] if end in tokens else tokens


def test_generates_and_switches_adapters_with_the_body(folder, expected):
    assert {name: without_end(tokens) for name, tokens in generate(folder).items()} == expected


@pytest.fixture
def native_folder(folder, tmp_path) -> Path:
    """The library lies beside the model: genai refuses one that lies just anywhere."""
    copy = tmp_path / "native"
    shutil.copytree(folder, copy)
    shutil.copy(library(), copy)
    config = json.loads((copy / "genai_config.json").read_text())
    config["model"]["decoder"]["session_options"]["custom_ops_library"] = library().name
    (copy / "genai_config.json").write_text(json.dumps(config))
    return copy


def test_our_kernel_runs_in_genai(native_folder, expected):
    loaded = ctypes.CDLL(str(native_folder / library().name))  # held, or genai's release would unload it
    loaded.lordba_native_calls.restype = ctypes.c_uint64
    before = loaded.lordba_native_calls()
    made = {name: without_end(tokens) for name, tokens in generate(native_folder).items()}
    assert made == expected
    runs = sum(len(tokens) for tokens in expected.values())
    assert loaded.lordba_native_calls() - before >= 14 * runs
