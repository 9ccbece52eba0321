"""Writing an adapter folder (docs/format.md), from tensors of PyTorch or arrays of NumPy: the same bytes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lordba.files import new_folder, write_safetensors

FORMAT_VERSION = 1
CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."
SCALE_NAMES = ("in", "mid", "out")


class StoredModule(NamedTuple):
    """One module as the file holds it, tensors or arrays; scales and ranges of s_in, s_mid and s_out."""

    r: int
    d_in: int
    d_out: int
    a_signs: Any
    b_signs: Any
    scales: tuple[Any, Any, Any]
    ranges: tuple[Any, Any, Any]
    """fp16 [2] each, or None for scales that are floats."""


def write_adapter_folder(
    folder: Path,
    modules: Mapping[str, StoredModule],
    scale_code: str,
    base_name: str | None,
    base_fingerprint: str | None,
    peft_config: Mapping[str, object],
) -> None:
    """Write an adapter of modules by path; an existing adapter is replaced only once the new one is complete."""
    tensors: dict[str, Any] = {}
    shapes: dict[str, dict[str, int]] = {}
    for path, module in sorted(modules.items()):
        key = PREFIX + path
        shapes[key] = {"d_in": module.d_in, "d_out": module.d_out, "r": module.r}
        tensors[f"{key}.lordba_A.signs"] = module.a_signs
        tensors[f"{key}.lordba_B.signs"] = module.b_signs
        for name, values, scale_range in zip(SCALE_NAMES, module.scales, module.ranges, strict=True):
            tensors[f"{key}.lordba_scale_{name}"] = values
            if scale_range is not None:
                tensors[f"{key}.lordba_scale_{name}.range"] = scale_range
    config = {
        **peft_config,
        "peft_type": "LORDBA",
        "format_version": FORMAT_VERSION,
        "scale_code": scale_code,
        "r": max(module.r for module in modules.values()),
        "target_modules": sorted({path.rsplit(".", 1)[-1] for path in modules}),
        "base_model_name_or_path": base_name,
        "base_fingerprint": base_fingerprint,
    }
    metadata = {"format": "lordba", "format_version": str(FORMAT_VERSION), "shapes": json.dumps(shapes)}
    with new_folder(folder, replaceable_if=CONFIG_NAME) as out:
        write_safetensors(out / WEIGHTS_NAME, tensors, metadata)
        (out / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")
