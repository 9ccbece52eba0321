"""Bundles for the app in android_demo: what is chosen for phones, and what the manifest says beside."""

import json
from dataclasses import replace
from pathlib import Path

from lordba.errors import LordbaError
from lordba.files import new_file
from lordba.runtime.bundle import MANIFEST_NAME
from lordba.runtime.onnx_adapter import ProgramInfo

from .target import ExportOptions

ONNX_MAX_SEQ_LEN = 1024
"""What models take (8192 and more) would fill a phone's memory with KV cache."""
KEY = "android"
FORMAT_VERSION = 1


def for_android(options: ExportOptions, target: str) -> ExportOptions:
    """Options that were left open, as the app wants them: adapters that swap without a reload."""
    if target == "coreml" or options.delegate == "coreml":
        raise LordbaError("--android: Core ML runs on Apple systems alone; take --target executorch or onnx")
    return replace(options, adapter_mode=options.adapter_mode or "input") if target == "executorch" else options


def describe(folder: Path, target: str) -> None:
    """Add to a bundle's manifest what the app needs to install further adapters.

    `adapter_scale_code` is the one that the program takes, null for any: an ONNX program takes one alone.
    """
    path = folder / MANIFEST_NAME
    record = json.loads(path.read_text())
    code = _program_info(folder / record["program"]).scale_code.value if target == "onnx" else None
    record[KEY] = {"format_version": FORMAT_VERSION, "adapter_scale_code": code}
    with new_file(path) as file:
        file.write_text(json.dumps(record, indent=2) + "\n")


def _program_info(program: Path) -> ProgramInfo:
    import onnx

    model = onnx.load(str(program), load_external_data=False)
    return ProgramInfo.read({entry.key: entry.value for entry in model.metadata_props}, program)
