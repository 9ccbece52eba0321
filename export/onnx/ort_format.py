"""ONNX Runtime's own format (`.ort`), which its reduced builds for phones load: a pair, with our kernel and without.

In this format an operator is either a kernel's or inlined for good: `model.native.ort` needs our library, `model.ort`
runs everywhere and never natively. Adapters are the same files as `model.onnx` takes. Weights lie inside each.
"""

from pathlib import Path

from lordba.backends.onnxruntime import library
from lordba.runtime.onnx_adapter import onnxruntime

NATIVE_NAME = "model.native.ort"
PORTABLE_NAME = "model.ort"


def write_ort_pair(model: Path) -> None:
    """Write both forms of an .onnx file beside it."""
    runtime = onnxruntime()
    for name, native in ((NATIVE_NAME, True), (PORTABLE_NAME, False)):
        options = runtime.SessionOptions()
        options.log_severity_level = 3
        # not all optimizations: the last level's are for the machine that converts
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(model.with_name(name))
        options.add_session_config_entry("session.save_model_format", "ORT")
        if native:
            options.register_custom_ops_library(str(library()))
        runtime.InferenceSession(str(model), options)
