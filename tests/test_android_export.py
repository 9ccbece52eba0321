"""`python -m lordba.export --android`: what is chosen for the app, and what its manifest says."""

import json
from pathlib import Path

import onnx
import pytest

from lordba.errors import LordbaError
from lordba.export.android import describe, for_android
from lordba.export.target import ExportOptions
from lordba.runtime.onnx_adapter import ProgramInfo
from lordba.scales import ScaleCode

OPTIONS = ExportOptions(Path("bundle"), android=True)


def test_adapters_are_inputs_unless_said():
    assert for_android(OPTIONS, "executorch").adapter_mode == "input"
    asked = ExportOptions(Path("bundle"), adapter_mode="ptd", android=True)
    assert for_android(asked, "executorch").adapter_mode == "ptd"
    assert for_android(OPTIONS, "onnx") == OPTIONS


@pytest.mark.parametrize(
    ("options", "target"), [(OPTIONS, "coreml"), (ExportOptions(Path("bundle"), delegate="coreml"), "executorch")]
)
def test_core_ml_is_refused(options, target):
    with pytest.raises(LordbaError, match="Apple systems"):
        for_android(options, target)


@pytest.mark.parametrize(("target", "code"), [("onnx", ScaleCode.INT8), ("executorch", None)])
def test_the_manifest_says_which_scales_a_program_takes(tmp_path, target, code):
    graph = onnx.helper.make_graph([], "nothing", [], [])
    model = onnx.helper.make_model(graph)
    onnx.helper.set_model_props(model, ProgramInfo("sha256:00", ScaleCode.INT8, {"layer": (8, 8)}).metadata())
    onnx.save(model, str(tmp_path / "model.onnx"))
    (tmp_path / "manifest.json").write_text(json.dumps({"format_version": 1, "program": "model.onnx", "kept": "é"}))
    describe(tmp_path, target)
    record = json.loads((tmp_path / "manifest.json").read_text())
    assert record.pop("android") == {"format_version": 1, "adapter_scale_code": code and code.value}
    assert record == {"format_version": 1, "program": "model.onnx", "kept": "é"}
