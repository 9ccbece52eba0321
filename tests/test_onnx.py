"""ONNX programs and bundles of tiny models in ONNX Runtime, against transformers: on, off, swapped, tampered with."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import FAMILIES, random_adapter, random_module, some_tokens, tiny_model, transformers_logits
from onnx.reference import ReferenceEvaluator

import lordba
from lordba.adapter import Adapter
from lordba.backends.onnxruntime import library
from lordba.blob import read_record
from lordba.errors import LordbaError
from lordba.export.onnx.decoder import AdapterNode, OnnxDecoder
from lordba.export.onnx.lowering import lower, save
from lordba.export.onnx.op import DOMAIN, NAME
from lordba.runtime.onnx_adapter import INPUT, OnnxAdapter, ProgramInfo, write_onnx_adapter
from lordba.scales import ScaleCode

TOLERANCE = 1e-4  # relative to the largest logit
TOKENS = some_tokens(24)
RANKS = {"north": 8, "south": 16, "west": 32}
KINDS = [f"{layer}.{kind}" for layer in range(2) for kind in ("key", "value")]
BASE_PRINT = "sha256:" + "ab" * 32


def run(
    session: onnxruntime.InferenceSession,
    tokens: Sequence[Sequence[int]],
    pieces: Sequence[int],
    adapter: OnnxAdapter | None = None,
    padding: Sequence[int] = (),
) -> np.ndarray:
    """Feed rows of tokens in pieces of these lengths, the first padding[i] of row i masked: [B, T, vocabulary]."""
    options = onnxruntime.RunOptions()
    if adapter is not None:
        options.add_active_adapter(adapter.lora)
    ids = np.array(tokens)
    mask = np.ones_like(ids)
    for row, count in enumerate(padding):
        mask[row, :count] = 0
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    shapes = {value.name: value.shape for value in session.get_inputs()}
    past = {
        name: np.zeros((len(ids), shape[1], 0, shape[3]), np.float32)
        for name, shape in shapes.items()
        if name.startswith("past")
    }
    rows, start = [], 0
    for n in pieces:
        end = start + n
        feeds = {
            "input_ids": ids[:, start:end],
            "attention_mask": mask[:, :end],
            "position_ids": positions[:, start:end],
        }
        feeds = {name: value for name, value in feeds.items() if name in shapes}
        names = [output.name for output in session.get_outputs()]
        logits, *present = session.run(names, {**feeds, **past}, options)
        past = {name.replace("present", "past_key_values"): v for name, v in zip(names[1:], present, strict=True)}
        rows.append(logits)
        start = end
    return np.concatenate(rows, 1)


def open_session(path: Path, native: bool) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    if native:
        options.register_custom_ops_library(str(library()))
    return onnxruntime.InferenceSession(str(path), options)


def off_by(found: np.ndarray, expected: torch.Tensor) -> float:
    """The largest error relative to the largest logit."""
    return float(np.abs(found - expected.numpy()).max() / expected.abs().max())


def program(model, adapters: dict[str, Adapter], folder: Path, code: ScaleCode = ScaleCode.LOG4) -> Path:
    """Lower a model with places for these adapters, and write the adapters beside it."""
    decoder = OnnxDecoder(model, {path for a in adapters.values() for path in a.modules}, code).eval()
    info = ProgramInfo(BASE_PRINT, code, decoder.sizes)
    save(lower(decoder, info.metadata()), folder / "model.onnx")
    for name, adapter in adapters.items():
        info.write(adapter, folder / f"{name}.onnx_adapter")
    return folder / "model.onnx"


def info_of(path: Path) -> ProgramInfo:
    """What a program says of itself."""
    entries = onnx.load(path, load_external_data=False).metadata_props
    return ProgramInfo.read({entry.key: entry.value for entry in entries}, path)


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_transformers(family, tmp_path):
    """Prefill, decode and pieces, with our kernel and without, with the adapter and without it."""
    model = tiny_model(family)
    adapter = random_adapter(model, seed=1)
    path = program(model, {"a": adapter}, tmp_path)
    onnx.checker.check_model(str(path), full_check=True)
    wanted = {None: transformers_logits(model, TOKENS), "a": transformers_logits(model, TOKENS, adapter)}
    assert off_by(wanted["a"].numpy(), wanted[None]) > 1000 * TOLERANCE
    for native in (True, False):
        session = open_session(path, native)
        for pieces in ([24], [9, 1, 1, 6, 7]):
            for name, expected in wanted.items():
                file = OnnxAdapter(tmp_path / "a.onnx_adapter") if name else None
                assert off_by(run(session, [TOKENS], pieces, file)[0], expected) <= TOLERANCE


class TestProgram:
    """One llama with adapters of three ranks."""

    @pytest.fixture(scope="class")
    def model(self):
        return tiny_model()

    @pytest.fixture(scope="class")
    def adapters(self, model) -> dict[str, Adapter]:
        return {name: random_adapter(model, r, seed=r) for name, r in RANKS.items()}

    @pytest.fixture(scope="class")
    def path(self, model, adapters, tmp_path_factory) -> Path:
        return program(model, {"north": adapters["north"]}, tmp_path_factory.mktemp("program"))

    def test_optimums_names_and_dynamic_sizes(self, path):
        graph = onnx.load(path).graph
        overridable = {value.name for value in graph.initializer}
        shapes = {
            value.name: [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
            for value in (*graph.input, *graph.output)
            if value.name not in overridable
        }
        assert shapes == {
            "input_ids": ["batch", "length"],
            "attention_mask": ["batch", "total"],
            "position_ids": ["batch", "length"],
            **{f"past_key_values.{kind}": ["batch", 2, "past", 16] for kind in KINDS},
            "logits": ["batch", "length", 320],
            **{f"present.{kind}": ["batch", 2, "total", 16] for kind in KINDS},
        }

    def test_one_node_per_module_and_one_adapter_for_all(self, path, adapters):
        model = onnx.load(path)
        nodes = [node for node in model.graph.node if node.domain == DOMAIN]
        assert [(node.op_type, node.name, list(node.input[2:])) for node in nodes] == [
            (NAME, list(info_of(path).modules)[node.attribute[0].i], [INPUT]) for node in nodes
        ]
        assert sorted(node.name for node in nodes) == sorted(adapters["north"].modules)
        overridable = {value.name for value in model.graph.initializer} & {v.name for v in model.graph.input}
        assert overridable == {INPUT}

    def test_says_nothing_of_the_machine_that_made_it(self, path):
        data = path.read_bytes() + path.with_name("model.onnx.data").read_bytes()
        for word in (b"site-packages", b".py", str(Path(lordba.__file__).parents[1]).encode()):
            assert word not in data

    @pytest.mark.parametrize("native", [True, False])
    def test_adapters_of_other_ranks_on_the_same_file(self, path, model, adapters, native, tmp_path):
        session = open_session(path, native)
        found = {}
        for name, adapter in adapters.items():
            file = tmp_path / f"{name}.onnx_adapter"
            info_of(path).write(adapter, file)
            found[name] = run(session, [TOKENS], [24], OnnxAdapter(file))[0]
        for name, other in itertools.product(adapters, repeat=2):
            off = off_by(found[name], transformers_logits(model, TOKENS, adapters[other]))
            assert off <= TOLERANCE if name == other else off > 100 * TOLERANCE

    def test_a_single_flipped_sign_shows(self, path, model, adapters, tmp_path):
        info = info_of(path)
        blob = info.blob(adapters["north"])
        index = list(info.modules).index("model.layers.0.self_attn.v_proj")
        blob[read_record(torch.from_numpy(blob), index).offsets[1]] ^= 1
        write_onnx_adapter(tmp_path / "broken.onnx_adapter", {INPUT: blob}, info.model_version)
        session = open_session(path, native=True)
        found = run(session, [TOKENS], [24], OnnxAdapter(tmp_path / "broken.onnx_adapter"))[0]
        assert off_by(found, transformers_logits(model, TOKENS, adapters["north"])) > 10 * TOLERANCE

    def test_a_batch_with_padding_on_the_left(self, path, model, adapters):
        """What a padded row computes from its own tokens on is what it would compute alone."""
        session = open_session(path, native=True)
        adapter = OnnxAdapter(path.with_name("north.onnx_adapter"))
        rows = [some_tokens(14, seed=1), some_tokens(14, seed=2), some_tokens(14, seed=3)]
        padding = [0, 5, 9]
        found = run(session, rows, [11, 1, 2], adapter, padding)
        for row, count, logits in zip(rows, padding, found, strict=True):
            expected = transformers_logits(model, row[count:], adapters["north"])
            assert off_by(logits[count:], expected) <= TOLERANCE
        unmasked = run(session, rows, [11, 1, 2], adapter)
        assert off_by(unmasked[1][5:], transformers_logits(model, rows[1][5:], adapters["north"])) > 10 * TOLERANCE

    def test_onnxs_reference_evaluator(self, path, model, adapters):
        evaluator = ReferenceEvaluator(str(path))
        feeds = {
            "input_ids": np.array([TOKENS[:6]]),
            "attention_mask": np.ones((1, 6), np.int64),
            "position_ids": np.arange(6)[None],
            **{
                f"past_key_values.{i}.{kind}": np.zeros((1, 2, 0, 16), np.float32)
                for i in (0, 1)
                for kind in ("key", "value")
            },
        }
        defaults = {v.name: onnx.numpy_helper.to_array(v) for v in onnx.load(path).graph.initializer}
        base = evaluator.run(["logits"], {**feeds, INPUT: defaults[INPUT]})[0][0]
        assert off_by(base, transformers_logits(model, TOKENS[:6])) <= TOLERANCE
        adapted = evaluator.run(["logits"], {**feeds, INPUT: info_of(path).blob(adapters["north"])})[0][0]
        assert off_by(adapted, transformers_logits(model, TOKENS[:6], adapters["north"])) <= TOLERANCE


@pytest.mark.parametrize("code", list(ScaleCode))
def test_every_scale_code(code, tmp_path):
    model = tiny_model(num_hidden_layers=1)
    adapter = random_adapter(model, r=5, code=code)
    session = open_session(program(model, {"a": adapter}, tmp_path, code), native=True)
    found = run(session, [TOKENS], [24], OnnxAdapter(tmp_path / "a.onnx_adapter"))[0]
    assert off_by(found, transformers_logits(model, TOKENS, adapter)) <= TOLERANCE


def test_an_adapted_head_and_biases(tmp_path):
    model = tiny_model(num_hidden_layers=1, attention_bias=True, mlp_bias=True)
    modules = {**random_adapter(model, only=("k_proj", "down_proj")).modules, "lm_head": random_module(64, 320, 3)}
    adapter = Adapter(modules, ScaleCode.LOG4)
    session = open_session(program(model, {"a": adapter}, tmp_path), native=True)
    found = run(session, [TOKENS], [24], OnnxAdapter(tmp_path / "a.onnx_adapter"))[0]
    assert off_by(found, transformers_logits(model, TOKENS, adapter)) <= TOLERANCE


def test_an_exporter_that_drops_or_merges_nodes_is_caught(monkeypatch):
    model = tiny_model(num_hidden_layers=1)
    decoder = OnnxDecoder(model, set(random_adapter(model).modules), ScaleCode.LOG4).eval()
    forward = AdapterNode.forward
    lost = decoder.nodes["model.layers.0.mlp.up_proj"]
    monkeypatch.setattr(AdapterNode, "forward", lambda self, x: self.linear(x) if self is lost else forward(self, x))
    with pytest.raises(LordbaError, match=r"1 of 7 modules have no ai.lordba::SignAdapter .*up_proj"):
        lower(decoder, {})


def test_two_nodes_of_one_module_are_caught():
    model = tiny_model(num_hidden_layers=1)
    decoder = OnnxDecoder(model, set(random_adapter(model).modules), ScaleCode.LOG4).eval()
    decoder.nodes["model.layers.0.mlp.up_proj"].index = 0
    with pytest.raises(LordbaError, match=r"1 of 7 modules .*up_proj.*of 7 nodes"):
        lower(decoder, {})


def test_sliding_windows_are_refused():
    model = tiny_model("mistral", sliding_window=16)
    with pytest.raises(LordbaError, match="sliding-window"):
        lower(OnnxDecoder(model, set(random_adapter(model).modules), ScaleCode.LOG4).eval(), {})
