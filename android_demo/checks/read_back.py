"""Reads with Python what WrittenTest.kt wrote on the JVM: `python android_demo/checks/read_back.py FOLDER`."""

import json
import sys
from pathlib import Path

import numpy as np

from lordba.adapter import load_adapter
from lordba.blob import make_blob
from lordba.runtime.bundle import read_bundle
from lordba.runtime.onnx_adapter import INPUT, OnnxAdapter, ProgramInfo
from lordba.scales import ScaleCode

GOLDEN = Path(__file__).parents[2] / "tests" / "golden"


def check_adapters(folder: Path) -> None:
    for code in ScaleCode:
        golden = load_adapter(GOLDEN / f"adapter-{code.value}")
        expected = make_blob(list(golden.modules.values())).numpy()
        written = load_adapter(folder / f"adapter-{code.value}")
        np.testing.assert_array_equal(make_blob(list(written.modules.values())).numpy(), expected)
        assert written.base_fingerprint == golden.base_fingerprint
        for name, stored in ((code.value, code), (f"{code.value}-as-fp32", ScaleCode.FP32)):
            check_onnx(folder / f"{name}.onnx_adapter", golden, stored)
    print("adapter folders and ONNX Runtime's adapter files of every scale code hold the golden adapters")


def check_onnx(path: Path, golden, code: ScaleCode) -> None:
    """As ONNX Runtime reads it, and as a program of this base would take it."""
    sizes = {module: (m.d_in, m.d_out) for module, m in golden.modules.items()}
    program = ProgramInfo(golden.base_fingerprint, code, sizes)
    found = OnnxAdapter(path)
    np.testing.assert_array_equal(found.inputs[INPUT].numpy(), program.blob(golden))
    found.check(program)


def check_bundle(folder: Path) -> None:
    bundle = read_bundle(folder)
    files = [bundle.adapter_file(name) for name in ("golden", "installed", "tuned")]
    assert all(file and file.read_bytes() == files[0].read_bytes() for file in files if files[0])
    assert bundle.adapter("tuned").scale_code == "log4"
    print("the bundle with an installed and a fine-tuned adapter is whole, and both are the golden adapter's bytes")


def check_profile(path: Path) -> None:
    rows = json.loads(path.read_text())["rows"]
    golden = json.loads((GOLDEN / "demo" / "profile" / "profile.json").read_text())["rows"]
    assert [set(row) for row in rows] == [set(golden[0])] * 6, rows
    assert {row["ms_p50"] for row in rows} == {1.0}
    print("the profile has the rows and keys of the golden one")


def main() -> None:
    folder = Path(sys.argv[1])
    check_adapters(folder)
    check_bundle(folder / "bundle")
    check_profile(folder / "profile.json")


if __name__ == "__main__":
    main()
