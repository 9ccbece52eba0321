"""Core ML: a tiny Llama's packages by the interpreter, against transformers; sizes, options, refusals, families."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MAX_SEQ_LEN, random_adapter, some_tokens, tiny_model, transformers_logits
from mil_programs import ct, on_macos

from lordba import run
from lordba.adapter import Adapter
from lordba.errors import LordbaError
from lordba.export import __main__ as command
from lordba.export.bundle import export_coreml, export_executorch
from lordba.export.coreml.decoder import CoremlDecoder
from lordba.export.coreml.delegate import recover_package
from lordba.export.coreml.lowering import CoremlOptions, convert
from lordba.export.coreml.package import WEIGHTS_NAME, added_bytes
from lordba.export.coreml.probe import CoremlProbe, stored_parts
from lordba.export.coreml.target import CoremlTarget, function_names
from lordba.export.target import ExportOptions
from lordba.runtime.bundle import Bundle, read_bundle
from lordba.runtime.coreml_runner import CoremlRunner
from lordba.runtime.session import Session, open_runner
from lordba.signs import unpack_signs

TOKENS = some_tokens(24)
PROMPT = 10
WITH_NONE = (None, "north", "south-pole")


@pytest.fixture(scope="module")
def adapters(tiny_base) -> dict[str, Adapter]:
    return {name: random_adapter(tiny_base.model, r, seed=r) for name, r in (("north", 8), ("south-pole", 16))}


@pytest.fixture(scope="module")
def exported(tiny_base, adapters, tmp_path_factory) -> Callable[..., Bundle]:
    """fp16 bundles by options, each exported once; tests must not write to them."""
    made: dict[str, Bundle] = {}

    def exported(**options) -> Bundle:
        key = repr(options)
        if key not in made:
            folder = tmp_path_factory.mktemp("bundles") / "bundle"
            export_coreml(tiny_base, adapters, ExportOptions(folder, max_seq_len=MAX_SEQ_LEN, **options))
            made[key] = read_bundle(folder, "coreml")
        return made[key]

    return exported


@pytest.fixture(scope="module")
def bundle(exported) -> Bundle:
    return exported(base_quant="int4")


@pytest.fixture(scope="module")
def float_package(tiny_base, adapters, tmp_path_factory) -> tuple[CoremlTarget, Path]:
    """A package in float32, all but the states."""
    folder = tmp_path_factory.mktemp("float")
    options = ExportOptions(folder, base_quant="none", max_seq_len=MAX_SEQ_LEN)
    target = CoremlTarget(tiny_base, adapters, options, precision="fp32")
    target.capture()
    target.lower("sha256:0", [])
    target.write(folder)
    return target, folder / "model.mlpackage"


def package_logits(path: Path, function: str, *, exact: bool = True) -> np.ndarray:
    """One prefill, then decode steps."""
    from lordba.backends.coreml.interpreter import load

    loaded = load(path, exact=exact).function(function)
    state = loaded.new_state()
    rows = []
    for begin, end in [(0, PROMPT), *((i, i + 1) for i in range(PROMPT, len(TOKENS)))]:
        inputs = {"tokens": np.array([TOKENS[begin:end]], np.int32), "start": np.array([begin], np.int32)}
        rows.append(loaded.run(inputs, state)["logits"][0])
    return np.stack(rows)


def expected(tiny_base, adapter: Adapter | None) -> np.ndarray:
    return transformers_logits(tiny_base.model, TOKENS, adapter)[PROMPT - 1 :].numpy()


def off_by(found: np.ndarray, reference: np.ndarray) -> float:
    return float(np.abs(found - reference).max() / np.abs(reference).max())


class TestFloat:
    @pytest.mark.parametrize("name, function", [(None, "base"), ("north", "north"), ("south-pole", "south_pole")])
    def test_equals_transformers_and_no_other_adapter(self, float_package, tiny_base, adapters, name, function):
        found = package_logits(float_package[1], function)
        for other in WITH_NONE:
            off = off_by(found, expected(tiny_base, adapters.get(other)))
            assert off <= 1e-5 if other == name else off > 1e-2

    def test_one_flipped_sign_is_caught_by_logits_and_by_the_probe(self, float_package, adapters, tmp_path):
        target, path = float_package
        broken = tmp_path / "broken.mlpackage"
        shutil.copytree(path, broken)
        flip_sign(broken, "north", "adapter_b_13")
        reference = package_logits(path, "north")
        assert off_by(package_logits(broken, "north"), reference) > 1e-4
        assert np.array_equal(package_logits(broken, "south_pole"), package_logits(path, "south_pole"))
        probe = CoremlProbe(target.captured, torch.tensor(TOKENS), adapters, lambda _: {})
        errors = []
        for package in (path, broken):
            parts = stored_parts(target.captured, adapters["north"], constants(package, "north"))
            errors.append(probe.error_of(adapters["north"], parts))
        assert errors[0] == 0 and errors[1] > 1e-3

    def test_an_adapter_that_is_not_there_is_caught(self, float_package, adapters):
        target, path = float_package
        parts = stored_parts(target.captured, adapters["north"], constants(path, "base"))
        probe = CoremlProbe(target.captured, torch.tensor(TOKENS), adapters, lambda _: parts)
        assert probe.worst_error("north") == float("inf")


def constants(path: Path, function: str) -> dict[str, np.ndarray]:
    from lordba.backends.coreml.interpreter import load

    return {constant.name: constant.value for constant in load(path).function(function).constants()}


def blob_offset(path: Path, function: str, name: str) -> int:
    """Where the weight file holds the indices of a 1-bit constant."""
    program = ct.utils.load_spec(str(path)).mlProgram.functions[function]
    for operation in program.block_specializations[program.opset].operations:
        if operation.type == "constexpr_lut_to_dense" and operation.outputs[0].name.startswith(name + "_"):
            return operation.inputs["indices"].arguments[0].value.blobFileValue.offset
    raise AssertionError(f"no constant {name}")


def flip_sign(path: Path, function: str, name: str) -> None:
    """Flip the first sign of a constant in the weight file: its header of 64 bytes says where the data begins."""
    file = path / WEIGHTS_NAME
    raw = bytearray(file.read_bytes())
    offset = blob_offset(path, function, name)
    raw[int.from_bytes(raw[offset + 16 : offset + 24], "little")] ^= 1
    file.write_bytes(raw)


class TestBundle:
    def test_every_check_passes(self, bundle):
        manifest = bundle.manifest
        assert (manifest.target, manifest.program, manifest.adapter_mode) == ("coreml", "model.mlpackage", "functions")
        assert manifest.base_quant == "int4" and "coremltools" in manifest.toolchain
        assert {(a.name, a.function) for a in manifest.adapters} == {("north", "north"), ("south-pole", "south_pole")}
        assert all(check.passed for check in manifest.parity)
        checks = {(check.check, check.adapter) for check in manifest.parity}
        ways = ("program", "program without fp16 rounding")
        assert {(way, name) for way in ways for name in WITH_NONE} <= checks
        assert {("quality gate", None), ("added weights", "north"), ("adapter ops", "north")} <= checks

    def test_signs_are_one_bit_and_the_adapters_own(self, bundle, adapters):
        """Read by coremltools' blob reader, not by the interpreter."""
        from coremltools.libmilstoragepython import _BlobStorageReader

        reader = _BlobStorageReader(str(bundle.program / WEIGHTS_NAME))
        for name, function in (("north", "north"), ("south-pole", "south_pole")):
            modules = [adapters[name].modules[path] for path in bundle.manifest.modules if path]
            for i, module in enumerate(modules):
                for part, packed, columns in (("a", module.a_signs, module.d_in), ("b", module.b_signs, module.r)):
                    bits = reader.read_uint1_data(blob_offset(bundle.program, function, f"adapter_{part}_{i}"))
                    signs = 1 - 2 * np.asarray(bits).astype(np.int8)
                    assert np.array_equal(signs, unpack_signs(packed, columns).numpy().reshape(-1))

    def test_functions_share_the_base(self, bundle, adapters):
        order = ["base", "north", "south_pole"]
        sizes = added_bytes(bundle.program, order)
        weights = (bundle.program / WEIGHTS_NAME).stat().st_size
        assert sum(weight for weight, _ in sizes.values()) == weights - 64  # the file's own header
        for function, adapter in zip(order[1:], adapters.values(), strict=True):
            blobs = 2 * len(adapter.modules) + 16  # signs, and a few tables
            assert adapter.nbytes <= sizes[function][0] <= adapter.nbytes + 128 * blobs
        assert sizes["base"][0] > 5 * sizes["north"][0]

    def test_swap_and_generate(self, bundle):
        session = Session(bundle, runner=CoremlRunner(bundle, reference=True))
        texts = {}
        for name in (*WITH_NONE, "north"):
            session.use(name)
            made = list(session.generate(TOKENS[:PROMPT], 6))
            assert texts.setdefault(name, made) == made
        assert len({tuple(text) for text in texts.values()}) == 3

    @on_macos
    @pytest.mark.parametrize("name", WITH_NONE)
    def test_core_ml_itself_agrees(self, bundle, name):
        """Never run so far: there is no Mac at hand."""
        logits = []
        for reference in (False, True):
            session = Session(bundle, name, CoremlRunner(bundle, reference=reference))
            steps = [TOKENS[:PROMPT], *([token] for token in TOKENS[PROMPT:])]
            logits.append(np.stack([session.feed(step) for step in steps]))
        assert off_by(*logits) < 0.02

    def test_run_command(self, bundle, monkeypatch, capsys):
        arguments = [
            "lordba.run",
            str(bundle.folder),
            "--prompt",
            "Once",
            "--adapter",
            "north",
            "--max-new-tokens",
            "4",
        ]
        monkeypatch.setattr("sys.argv", [*arguments, "--reference"])
        run.main()
        said = capsys.readouterr()
        assert said.out.strip() and "it is slow" in said.err
        monkeypatch.setattr("platform.system", lambda: "Linux")
        monkeypatch.setattr("sys.argv", arguments)
        with pytest.raises(LordbaError, match="Core ML runs on Apple systems alone; --reference"):
            run.main()

    def test_reference_is_refused_for_other_targets(self, bundle):
        other = Bundle(bundle.folder, dataclasses.replace(bundle.manifest, target="onnx"))
        with pytest.raises(LordbaError, match="--reference is for Core ML bundles"):
            open_runner(other, reference=True)


@pytest.mark.parametrize(
    "options",
    [
        {"base_quant": "int8", "adapter_mode": "inputs"},
        {"base_quant": "int8", "ios": 16, "stateless": True},
        {"base_quant": "none", "sign_storage": "int8"},
    ],
    ids=["inputs", "ios16", "int8 signs"],
)
def test_every_check_passes(exported, options):
    manifest = exported(**options).manifest
    assert all(check.passed for check in manifest.parity), [c for c in manifest.parity if not c.passed]
    assert {("adapter ops", "north"), ("program", "south-pole")} <= {(c.check, c.adapter) for c in manifest.parity}


def test_delegate_of_executorch(tiny_base, adapters, tmp_path):
    """The package is recovered from the .pte, and passes the checks of the Core ML target."""
    options = ExportOptions(tmp_path / "out", "int4", max_seq_len=MAX_SEQ_LEN, delegate="coreml")
    export_executorch(tiny_base, {"north": adapters["north"]}, options)
    bundle = read_bundle(tmp_path / "out", "executorch")
    assert bundle.manifest.requires == ["CoreMLBackend", "iOS 18"] and bundle.manifest.adapter_mode == "methods"
    assert all(check.passed for check in bundle.manifest.parity)
    package = recover_package(bundle.program.read_bytes(), tmp_path / "recovered")
    assert np.array_equal(constants(package, "north")["adapter_a_0_decoded_cast_fp16"], north_signs(adapters))
    with pytest.raises(LordbaError, match="needs ExecuTorch's Core ML backend"):
        open_runner(bundle)


def north_signs(adapters: dict[str, Adapter]) -> np.ndarray:
    module = next(iter(adapters["north"].modules.values()))
    return unpack_signs(module.a_signs, module.d_in).numpy()


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral", "gemma", "phi", "gpt2"])
def test_families(family, tmp_path):
    model = tiny_model(family)
    adapter = random_adapter(model, 8, seed=1)
    decoder = CoremlDecoder(model, {"north": adapter}, MAX_SEQ_LEN, precision="fp32").eval()
    decoder.use(adapter)
    convert(decoder, CoremlOptions()).save(str(tmp_path / "model.mlpackage"))
    reference = transformers_logits(model, TOKENS, adapter)[PROMPT - 1 :].numpy()
    assert off_by(package_logits(tmp_path / "model.mlpackage", "main"), reference) <= 1e-5


def test_norms_hold_activations_whose_squares_exceed_fp16(tmp_path):
    """As SmolLM2 has them; the residual stream holds such an activation from the first layer on."""
    model = tiny_model()
    model.model.embed_tokens.weight.data[:, 5] = 3000.0
    adapter = random_adapter(model, 8, seed=1)
    decoder = CoremlDecoder(model, {"north": adapter}, MAX_SEQ_LEN).eval()
    decoder.round_weights()
    decoder.use(adapter)
    convert(decoder, CoremlOptions()).save(str(tmp_path / "model.mlpackage"))
    reference = decoder.logits(torch.tensor(TOKENS), adapter)[PROMPT - 1 :].numpy()
    assert off_by(package_logits(tmp_path / "model.mlpackage", "main", exact=False), reference) <= 0.02


@pytest.mark.parametrize(
    "family, changes, said",
    [
        ("gemma2", {}, "no sliding-window or soft-capped attention"),
        ("mistral", {"sliding_window": 16}, "no sliding-window"),
    ],
)
def test_families_that_are_refused(family, changes, said):
    decoder = CoremlDecoder(tiny_model(family, **changes), {}, MAX_SEQ_LEN).eval()
    with pytest.raises(LordbaError, match=said):
        convert(decoder, CoremlOptions())


class TestOptions:
    def test_states_need_ios_18(self, tiny_base, adapters):
        with pytest.raises(LordbaError, match="--ios 17 has no states for a KV cache; add --stateless"):
            CoremlTarget(tiny_base, adapters, ExportOptions(Path("unused"), ios=17))

    def test_int4_needs_ios_18(self, tiny_base, adapters):
        target = CoremlTarget(tiny_base, adapters, ExportOptions(Path("unused"), ios=17, stateless=True))
        target.capture()
        with pytest.raises(LordbaError, match="--base-quant int4 needs --ios 18"):
            target.quantize("int4")

    def test_length_must_fit_the_model(self, tiny_base, adapters):
        with pytest.raises(LordbaError, match=r"--max-seq-len 129: .* 2 to 128"):
            CoremlTarget(tiny_base, adapters, ExportOptions(Path("unused"), max_seq_len=129))

    @pytest.mark.parametrize("names", [("base",), ("a-b", "a_b"), ("1st",)])
    def test_names_of_functions(self, adapters, names):
        with pytest.raises(LordbaError, match="is taken or no name"):
            function_names(dict.fromkeys(names, adapters["north"]))

    @pytest.mark.parametrize(
        "line, said",
        [
            ("--target onnx --ios 17", "--ios is for --target coreml"),
            ("--target coreml --route fast", "--route is for --target executorch"),
            ("--target coreml --adapter-mode ptd", "--target coreml takes functions or inputs"),
            ("--target onnx --adapter-mode inputs", "--adapter-mode is for --target executorch or coreml"),
            ("--target coreml --delegate coreml", "--delegate is for --target executorch"),
            ("--target executorch --sign-storage int8", "--sign-storage is for --target coreml"),
        ],
    )
    def test_options_of_other_targets(self, line, said):
        with pytest.raises(LordbaError, match=said):
            command.check_options(command.parser().parse_args(line.split()))
