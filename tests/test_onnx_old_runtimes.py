"""One library and one program with older versions of ONNX Runtime: native from 1.17 on, the body before.

LORDBA_OLD_ONNXRUNTIMES names a folder with a subfolder per version, each made by
`pip install --target FOLDER/VERSION onnxruntime==VERSION "numpy<2"`.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import random_adapter, some_tokens, tiny_model, transformers_logits

from lordba.backends.onnxruntime import library
from lordba.export.onnx.decoder import OnnxDecoder
from lordba.export.onnx.lowering import lower, save
from lordba.runtime.onnx_adapter import INPUT, ProgramInfo
from lordba.scales import ScaleCode

FOLDER = os.environ.get("LORDBA_OLD_ONNXRUNTIMES")
TOKENS = some_tokens(12)
NODES = 14
pytestmark = pytest.mark.skipif(FOLDER is None, reason="LORDBA_OLD_ONNXRUNTIMES names no folder of old versions")

RUN = """
import ctypes, sys
library, program, given, out = sys.argv[1:]
import numpy as np
import onnxruntime
for _ in range(2):  # the second session says nothing again
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.register_custom_ops_library(library)
    session = onnxruntime.InferenceSession(program, options, providers=["CPUExecutionProvider"])
loaded = ctypes.CDLL(library)
loaded.lordba_native_calls.restype = ctypes.c_uint64
before = loaded.lordba_native_calls()
(logits,) = session.run(["logits"], dict(np.load(given)))
np.savez(out, logits=logits, calls=loaded.lordba_native_calls() - before)
print(onnxruntime.__version__)
"""


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def adapter(model):
    return random_adapter(model, r=16, seed=1)


@pytest.fixture(scope="module")
def program(model, adapter, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("program")
    decoder = OnnxDecoder(model, set(adapter.modules), ScaleCode.LOG4).eval()
    save(lower(decoder, {}), folder / "model.onnx")
    length = len(TOKENS)
    kinds = [f"{layer}.{kind}" for layer in range(2) for kind in ("key", "value")]
    feeds = {
        "input_ids": np.array([TOKENS]),
        "attention_mask": np.ones((1, length), np.int64),
        "position_ids": np.arange(length)[None],
        **{f"past_key_values.{kind}": np.zeros((1, 2, 0, 16), np.float32) for kind in kinds},
        INPUT: ProgramInfo("", ScaleCode.LOG4, decoder.sizes).blob(adapter),
    }
    np.savez(folder / "feeds.npz", **feeds)
    return folder / "model.onnx"


@pytest.mark.parametrize("version, native", [("1.16.3", False), ("1.17.3", True)])
def test_old_runtime(program, model, adapter, tmp_path, version, native):
    assert FOLDER is not None
    arguments = [str(library()), str(program), str(program.with_name("feeds.npz")), str(tmp_path / "out.npz")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [
            sys.executable,
            "-I",
            "-c",
            f"import sys; sys.path.insert(0, {str(Path(FOLDER) / version)!r})\n{RUN}",
            *arguments,
        ],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == version
    found = np.load(tmp_path / "out.npz")
    expected = transformers_logits(model, TOKENS, adapter).numpy()
    assert np.abs(found["logits"][0] - expected).max() <= 1e-4 * np.abs(expected).max()
    assert found["calls"] == (NODES if native else 0)
    assert result.stderr.count("lordba: ONNX Runtime 1.16.3 is older than 1.17") == (0 if native else 1)
