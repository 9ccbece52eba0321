"""The bundle: its manifest, what is refused before anything runs, and that a failed export leaves nothing behind."""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import MAX_SEQ_LEN, VOCABULARY, random_adapter, tiny_model

from lordba.adapter import Adapter
from lordba.errors import LordbaError
from lordba.export import bundle as export_bundle
from lordba.export.bundle import ExportOptions, export_executorch
from lordba.export.executorch import target as executorch_target
from lordba.export.executorch.lowering import Lowered
from lordba.export.executorch.target import ExecuTorchTarget
from lordba.models import BaseModel, fingerprint
from lordba.runtime.bundle import MANIFEST_NAME, Bundle, read_bundle
from lordba.runtime.session import Session

MANIFEST_TYPES = {
    "format_version": int,
    "target": str,
    "program": str,
    "base": {"name": str, "fingerprint": str},
    "base_quant": str,
    "toolchain": dict,
    "requires": [str],
    "files": [{"path": str, "bytes": int, "sha256": str}],
    "adapters": [
        {
            "name": str, "file": str, "r": int, "scale_code": str, "modules": int, "bytes": int,
            "fp16_lora_bytes": int, "file_bytes": int,
        }
    ],
    "parity": [
        {"check": str, "adapter": (str, type(None)), "metric": str, "value": float, "limit": float, "passed": bool}
    ],
}  # fmt: skip


def check_types(value: object, types: object, where: str) -> None:
    if isinstance(types, dict):
        assert isinstance(value, dict) and set(types) <= set(value), where
        for key, expected in types.items():
            check_types(value[key], expected, f"{where}.{key}")
    elif isinstance(types, list):
        assert isinstance(value, list) and value, where
        for i, item in enumerate(value):
            check_types(item, types[0], f"{where}[{i}]")
    else:
        assert isinstance(value, types), where


@pytest.fixture
def bundle(tiny_bundle: Callable[..., Bundle]) -> Bundle:
    return tiny_bundle("none", "ptd")


@pytest.fixture
def copied(bundle: Bundle, tmp_path: Path) -> Path:
    """A copy of the float bundle that a test may damage."""
    shutil.copytree(bundle.folder, tmp_path / "copy")
    return tmp_path / "copy"


class TestManifest:
    def test_keys_and_types(self, bundle):
        check_types(json.loads((bundle.folder / MANIFEST_NAME).read_text()), MANIFEST_TYPES, "manifest")

    def test_head(self, bundle, tiny_base):
        manifest = bundle.manifest
        assert (manifest.format_version, manifest.target, manifest.program) == (1, "executorch", "model.pte")
        assert manifest.base == {"name": "tiny", "fingerprint": fingerprint(tiny_base.model)}
        assert manifest.base_quant == "none" and manifest.eos_ids == [2] and manifest.max_seq_len == MAX_SEQ_LEN
        assert manifest.toolchain["torch"].startswith("2.13.0") and manifest.toolchain["executorch"] == "1.5.1"

    def test_requires_names_our_op_and_nothing_that_the_runtime_always_has(self, bundle):
        assert any(op.startswith("lordba::sign_adapter.") for op in bundle.manifest.requires)
        assert all(op.startswith(("lordba::", "llama::")) for op in bundle.manifest.requires)

    def test_files_are_all_there_with_their_hashes(self, bundle):
        listed = {file.path: file for file in bundle.manifest.files}
        present = {str(p.relative_to(bundle.folder)) for p in bundle.folder.rglob("*") if p.is_file()}
        assert set(listed) == present - {MANIFEST_NAME}
        assert {f"adapters/{name}.ptd" for name in ("north", "south", "none")} < present
        for path, file in listed.items():
            data = (bundle.folder / path).read_bytes()
            assert (file.bytes, file.sha256) == (len(data), hashlib.sha256(data).hexdigest())

    def test_adapters(self, bundle, north_south):
        assert [a.name for a in bundle.manifest.adapters] == ["north", "south"]
        for entry in bundle.manifest.adapters:
            modules = north_south[entry.name].modules.values()
            assert (entry.r, entry.scale_code, entry.modules) == (8, "log4", 14)
            assert entry.fp16_lora_bytes == sum(2 * 8 * (m.d_in + m.d_out) for m in modules)
            signs = sum(8 * -(-m.d_in // 8) + m.d_out for m in modules)
            codes = sum(-(-n // 2) for m in modules for n in (m.d_in, 8, m.d_out))
            assert entry.bytes == signs + codes + len(modules) * 3 * 4  # each range is two fp16
            assert entry.file_bytes == (bundle.folder / entry.file).stat().st_size

    def test_modules_are_those_of_the_adapters(self, bundle, north_south):
        assert sorted(filter(None, bundle.manifest.modules)) == sorted(north_south["north"].modules)

    @pytest.mark.parametrize("base_quant", ["none", "int4", "int8"])
    def test_parity_is_recorded_with_its_limits_and_passed(self, tiny_bundle, base_quant):
        parity = tiny_bundle(base_quant).manifest.parity
        assert all(check.passed for check in parity)
        limits = {(c.check, c.adapter, c.metric): c.limit for c in parity}
        for adapter in (None, "north", "south"):
            if base_quant == "none":
                assert limits["program", adapter, "max_abs_err"] == 2e-3
                assert limits["program", adapter, "top1_agreement"] == 0.999
            assert limits["program", adapter, "mean_kl"] == (1e-6 if base_quant == "none" else 0.035)
            if adapter:
                assert limits["adapter ops", adapter, "max_rel_err"] == 1e-6
        assert ("quality gate", None, "perplexity_ratio_to_float") in limits or base_quant == "none"

    def test_the_program_answers_what_an_llm_runner_asks(self, bundle):
        from executorch.runtime import Runtime

        Session(bundle)  # registers the kernels
        program = Runtime.get().load_program(bundle.program, data_path=bundle.adapter_file("north"))

        def constant(name):
            return program.load_method(name).execute([])

        assert constant("get_max_context_len") == [MAX_SEQ_LEN] and constant("get_max_seq_len") == [MAX_SEQ_LEN - 1]
        assert constant("get_vocab_size") == [VOCABULARY] and constant("get_n_layers") == [2]
        assert constant("get_bos_id") == [1] and constant("get_eos_ids") == [2]
        for name in ("use_kv_cache", "use_sdpa_with_kv_cache", "enable_dynamic_shape"):
            assert constant(name) == [True]


class TestRefused:
    """Every error names the file."""

    def refused(self, folder: Path, name: str, said: str, target: str | None = "executorch") -> None:
        with pytest.raises(LordbaError, match=said) as raised:
            read_bundle(folder, target)
        assert str(folder / name) in str(raised.value)

    def test_undamaged_copy_is_read(self, copied):
        assert read_bundle(copied, "executorch").adapter_file("north") == copied / "adapters/north.ptd"

    def test_no_bundle(self, tmp_path):
        self.refused(tmp_path / "nowhere", MANIFEST_NAME, "not found.*lordba.export")

    @pytest.mark.parametrize("name", ["adapters/south.ptd", "model.pte", "tokenizer.json"])
    def test_tampered(self, copied, name):
        data = bytearray((copied / name).read_bytes())
        data[len(data) // 2] ^= 1
        (copied / name).write_bytes(data)
        self.refused(copied, name, "sha256")

    def test_truncated(self, copied):
        data = (copied / "adapters/north.ptd").read_bytes()
        (copied / "adapters/north.ptd").write_bytes(data[:-1])
        self.refused(copied, "adapters/north.ptd", f"expected {len(data)} bytes, found {len(data) - 1}")

    def test_missing(self, copied):
        (copied / "model.pte").unlink()
        self.refused(copied, "model.pte", "missing")

    @pytest.mark.parametrize(
        "changes, said",
        [
            ({"format_version": 2}, r"format_version 2 .*reads 1"),
            ({"target": "onnx"}, "for onnx, not for executorch"),
            ({"adapters": [{"name": "north"}]}, "lacks or misspells"),
            ({"files": None}, "lacks or misspells"),
        ],
    )
    def test_manifest(self, copied, changes, said):
        record = json.loads((copied / MANIFEST_NAME).read_text())
        (copied / MANIFEST_NAME).write_text(json.dumps(record | changes))
        self.refused(copied, MANIFEST_NAME, said)

    @pytest.mark.parametrize("path", ["../secret", "/etc/passwd", "adapters/../../secret"])
    def test_a_file_outside(self, copied, path):
        (copied.parent / "secret").write_text("x")
        record = json.loads((copied / MANIFEST_NAME).read_text())
        record["files"].append({"path": path, "bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()})
        (copied / MANIFEST_NAME).write_text(json.dumps(record))
        self.refused(copied, MANIFEST_NAME, f"outside the bundle: {path}")

    @pytest.mark.parametrize("key", sorted(MANIFEST_TYPES))
    def test_manifest_without_a_key(self, copied, key):
        record = json.loads((copied / MANIFEST_NAME).read_text())
        del record[key]
        (copied / MANIFEST_NAME).write_text(json.dumps(record))
        self.refused(copied, MANIFEST_NAME, key)

    @pytest.mark.parametrize("text", ["", "{", "[]", "null", '"manifest"'])
    def test_manifest_that_is_none(self, copied, text):
        (copied / MANIFEST_NAME).write_text(text)
        self.refused(copied, MANIFEST_NAME, "not a readable manifest")

    def test_keys_of_later_versions_are_ignored(self, copied):
        record = json.loads((copied / MANIFEST_NAME).read_text())
        (copied / MANIFEST_NAME).write_text(json.dumps(record | {"colour": "green"}))
        assert read_bundle(copied).manifest.target == "executorch"

    @pytest.mark.parametrize("path", ["program", "file"])
    def test_a_program_or_adapter_that_the_files_do_not_list(self, copied, path):
        record = json.loads((copied / MANIFEST_NAME).read_text())
        if path == "program":
            record["program"] = "../other.pte"
        else:
            record["adapters"][0]["file"] = "../other.ptd"
        (copied / MANIFEST_NAME).write_text(json.dumps(record))
        self.refused(copied, MANIFEST_NAME, r"uses \.\./other.pt.*do not list")

    def test_unknown_adapter(self, bundle):
        with pytest.raises(LordbaError, match="no adapter 'east'; it holds north, south, none"):
            bundle.adapter_file("east")

    def test_operator_that_the_runtime_lacks(self, bundle):
        manifest = dataclasses.replace(bundle.manifest, requires=[*bundle.manifest.requires, "lordba::no_such.out"])
        with pytest.raises(LordbaError, match=r"lacks: lordba::no_such.out;"):
            Session(Bundle(bundle.folder, manifest))


class TestFailedExport:
    """Lowering and verification are replaced by stand-ins: here only what is written matters."""

    @pytest.fixture(autouse=True)
    def stand_ins(self, monkeypatch) -> None:
        lowered = Lowered(b"a program", ["lordba::sign_adapter.blob_out"], 1, None)
        monkeypatch.setattr(executorch_target, "lower", lambda *_: lowered)
        monkeypatch.setattr(export_bundle, "verify", lambda *_: ([], []))

    @pytest.fixture
    def export(self, tiny_base: BaseModel, north_south: dict[str, Adapter]) -> Callable[[Path], object]:
        def export(output: Path, adapters: dict[str, Adapter] = north_south) -> object:
            return export_executorch(tiny_base, adapters, ExportOptions(output, "none", "input", MAX_SEQ_LEN))

        return export

    @pytest.mark.parametrize("step", ["lower", "write", "verify"])
    @pytest.mark.parametrize("fault", [LordbaError("no"), RuntimeError("no"), KeyboardInterrupt()])
    def test_leaves_nothing_new_and_the_old_bundle_intact(self, export, monkeypatch, tmp_path, step, fault):
        def fail(*_):
            raise fault

        old = tmp_path / "old"
        export(old)
        before = {path: path.read_bytes() for path in old.rglob("*") if path.is_file()}
        monkeypatch.setattr(*((export_bundle, step) if step == "verify" else (ExecuTorchTarget, step)), fail)
        for output in (tmp_path / "new", old):
            with pytest.raises(type(fault)):
                export(output)
        assert list(tmp_path.iterdir()) == [old]
        assert {path: path.read_bytes() for path in old.rglob("*") if path.is_file()} == before

    def test_a_bundle_replaces_an_older_one_whole(self, export, tmp_path, north_south):
        export(tmp_path / "out")
        export(tmp_path / "out", {"north": north_south["north"]})
        assert [a.name for a in read_bundle(tmp_path / "out").manifest.adapters] == ["north"]
        assert not (tmp_path / "out/adapters/south.blob").exists() and list(tmp_path.iterdir()) == [tmp_path / "out"]

    def test_a_folder_that_is_no_bundle_is_not_touched(self, export, tmp_path):
        (tmp_path / "photos").mkdir()
        (tmp_path / "photos/cat.jpg").write_text("meow")
        with pytest.raises(LordbaError, match=r"photos.*no manifest\.json") as raised:
            export(tmp_path / "photos")
        assert str(tmp_path / "photos") in str(raised.value)
        assert [p.name for p in tmp_path.rglob("*")] == ["photos", "cat.jpg"]

    def test_an_empty_folder_may_be_used(self, export, tmp_path):
        (tmp_path / "out").mkdir()
        export(tmp_path / "out")
        assert read_bundle(tmp_path / "out").manifest.adapter_mode == "input"

    @pytest.mark.parametrize("output", ["file", "file/below"])
    def test_a_file_in_the_way(self, export, tmp_path, output):
        (tmp_path / "file").write_text("mine")
        with pytest.raises(LordbaError) as raised:
            export(tmp_path / output)
        assert str(tmp_path / output) in str(raised.value)
        assert (tmp_path / "file").read_text() == "mine" and list(tmp_path.iterdir()) == [tmp_path / "file"]

    @pytest.mark.parametrize("output", ["file", "file/below", "photos"])
    def test_a_bad_output_is_known_before_the_work(self, export, monkeypatch, tmp_path, output):
        (tmp_path / "file").write_text("mine")
        (tmp_path / "photos").mkdir()
        (tmp_path / "photos/cat.jpg").write_text("meow")
        monkeypatch.setattr(ExecuTorchTarget, "lower", lambda *_: pytest.fail("lowered for nothing"))
        with pytest.raises(LordbaError):
            export(tmp_path / output)

    def test_an_adapter_of_another_base_is_refused(self, export, tmp_path, tiny_base, north_south):
        other = random_adapter(tiny_model(seed=1))
        with pytest.raises(LordbaError, match=r"adapter pirate.*made for the base tiny") as raised:
            export(tmp_path / "out", {**north_south, "pirate": other})
        assert other.base_fingerprint in str(raised.value) and fingerprint(tiny_base.model) in str(raised.value)
        assert list(tmp_path.iterdir()) == []

    def test_an_adapter_that_names_no_base_is_taken(self, export, tmp_path, north_south):
        export(tmp_path / "out", {"north": dataclasses.replace(north_south["north"], base_fingerprint=None)})
        assert read_bundle(tmp_path / "out").manifest.adapters[0].name == "north"

    def test_no_adapters(self, export, tmp_path):
        with pytest.raises(LordbaError, match="--adapter FOLDER"):
            export(tmp_path / "out", {})


class TestQualityGate:
    """`auto` takes int4 where it is good enough, and says what it measured."""

    @pytest.mark.parametrize("gate, chosen", [(1.05, "int4"), (0.0, "int8")])
    def test_auto(self, monkeypatch, tiny_base, north_south, gate, chosen):
        monkeypatch.setattr(export_bundle, "GATE", gate)
        windows = export_bundle.Windows(torch.randint(3, VOCABULARY, (2, 40)))
        options = ExportOptions(Path("unused"), "auto", "ptd", MAX_SEQ_LEN)
        target = ExecuTorchTarget(tiny_base, north_south, options)
        base_quant, quality = export_bundle.quantized(target, tiny_base, windows, options, lambda _: None)
        assert base_quant == chosen
        assert quality["eager"] / quality["float"] == pytest.approx(1, abs=0.05)
