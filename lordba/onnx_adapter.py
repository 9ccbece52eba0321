"""An adapter in ONNX Runtime's own file form, `.onnx_adapter`: one named tensor per adapter input of a node.

ONNX Runtime checks neither names nor shapes nor the base that an adapter belongs to: what a name does not match it
ignores. `OnnxAdapter.check` does, before anything runs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lordba.adapter import Adapter, SignModule
from lordba.errors import LordbaError
from lordba.scales import ScaleCode, decode_scales

ADAPTER_VERSION = 1
SUFFIX = ".onnx_adapter"
PARAMETERS = ("a_signs", "b_signs", "s_in", "s_mid", "s_out", "s_ranges")
Dim = int | str | None


def parameters(code: ScaleCode) -> tuple[str, ...]:
    """Names of a node's adapter inputs, in order; s_ranges only where scales are codes."""
    return PARAMETERS if code.is_coded else PARAMETERS[:-1]


def model_version(fingerprint: str) -> int:
    """The base's fingerprint "sha256:..." as the 31 bits that an adapter file has room for."""
    return int(fingerprint.removeprefix("sha256:")[:8], 16) & 0x7FFFFFFF


def module_tensors(module: SignModule, code: ScaleCode) -> dict[str, np.ndarray]:
    """One module's inputs by name, with scales in this code: the adapter's own, or fp32."""
    signs = {"a_signs": module.a_signs.numpy(), "b_signs": module.b_signs.numpy()}
    scales = dict(zip(("s_in", "s_mid", "s_out"), module.scales, strict=True))
    if code is module.s_in.code:
        tensors = signs | {name: scale.values.numpy() for name, scale in scales.items()}
        ranges = [scale.range for scale in module.scales if scale.range is not None]
        return tensors | ({"s_ranges": torch.stack(ranges).numpy()} if ranges else {})
    if code is ScaleCode.FP32:
        return signs | {name: decode_scales(scale).numpy() for name, scale in scales.items()}
    raise LordbaError(f"the program takes {code.value} scales, the adapter has {module.s_in.code.value}")


def adapter_tensors(adapter: Adapter, code: ScaleCode) -> dict[str, np.ndarray]:
    """Every input of the adapter by its name in the model, `<module path>.<input>`."""
    return {
        f"{path}.{name}": tensor
        for path, module in sorted(adapter.modules.items())
        for name, tensor in module_tensors(module, code).items()
    }


def write_onnx_adapter(path: Path, tensors: Mapping[str, np.ndarray], fingerprint: str) -> None:
    """Write tensors as ONNX Runtime's adapter file for a base with this fingerprint."""
    runtime = onnxruntime()
    file = runtime.AdapterFormat()
    file.set_adapter_version(ADAPTER_VERSION)
    file.set_model_version(model_version(fingerprint))
    values = {name: runtime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(t)) for name, t in tensors.items()}
    file.set_parameters(values)
    file.export_adapter(str(path))


@dataclass(frozen=True)
class ParameterInfo:
    """An overridable input of a program: ONNX Runtime's name of its type, and its shape, None where any size fits."""

    type: str
    shape: tuple[Dim, ...]


class OnnxAdapter:
    """An adapter file that was read: as ONNX Runtime's LoraAdapter, and as plain inputs."""

    def __init__(self, path: Path) -> None:
        self.path = path
        runtime = onnxruntime()
        try:
            self._file = runtime.AdapterFormat.read_adapter(str(path))  # owns the memory of `inputs`
            self.adapter_version: int = self._file.get_adapter_version()
            self.model_version: int = self._file.get_model_version()
            self.inputs: dict[str, Any] = self._file.get_parameters()
            self.lora = runtime.LoraAdapter()
            self.lora.Load(str(path))
        except Exception as error:  # the binding's exceptions share no other type
            raise LordbaError(f"{path}: is no adapter file that ONNX Runtime can read ({error!s:.200})") from error

    def check(self, expected: Mapping[str, ParameterInfo], fingerprint: str) -> None:
        """Raise unless this adapter is for a program of these inputs and this base."""
        if self.adapter_version != ADAPTER_VERSION:
            raise LordbaError(
                f"{self.path}: adapter version {self.adapter_version} is not known here (this lordba reads "
                f"{ADAPTER_VERSION}); install a newer lordba or export the adapter again"
            )
        if self.model_version != model_version(fingerprint):
            raise LordbaError(
                f"{self.path}: was made for another base (its model version is {self.model_version:#010x}, the "
                f"program's base is {fingerprint[:15]}...); export the adapter with this base"
            )
        if unknown := sorted(set(self.inputs) - set(expected)):
            raise LordbaError(f"{self.path}: holds {unknown[0]}, which the program lacks; export it for this program")
        _check_complete(self.path, self.inputs, expected)
        for name, value in self.inputs.items():
            info, shape = expected[name], value.shape()
            fits = len(shape) == len(info.shape) and all(
                size == found for size, found in zip(info.shape, shape, strict=True) if isinstance(size, int)
            )
            if value.data_type() != info.type or not fits:
                wanted = [size if isinstance(size, int) else "any" for size in info.shape]
                raise LordbaError(
                    f"{self.path}: {name} is {value.data_type()} {list(shape)}, the program takes {info.type} "
                    f"{wanted}; export the adapter for this program"
                )
        self._check_ranks()

    def _check_ranks(self) -> None:
        """Within a module every tensor must be of one rank."""
        for name, value in self.inputs.items():
            if name.endswith(".a_signs"):
                path, rank = name.removesuffix(".a_signs"), value.shape()[0]
                width, mid = self.inputs[f"{path}.b_signs"].shape()[1], self.inputs[f"{path}.s_mid"].shape()[0]
                # with log4 two scales share a byte
                if rank < 1 or width != (rank + 7) // 8 or mid not in (rank, (rank + 1) // 2):
                    raise LordbaError(
                        f"{self.path}: {path} has {rank} rows of A, {width} bytes per row of B and {mid} stored "
                        "middle scales, which fit no one rank; the file is damaged, export it again"
                    )


def _check_complete(path: Path, names: Mapping[str, Any], expected: Mapping[str, ParameterInfo]) -> None:
    """A module of which only some tensors are there would run with the defaults of the others."""
    modules = {name.rpartition(".")[0] for name in names}
    if not modules:
        raise LordbaError(f"{path}: holds no tensors; export the adapter again")
    wanted = [name for name in expected if name.rpartition(".")[0] in modules]
    if missing := sorted(set(wanted) - set(names)):
        raise LordbaError(f"{path}: lacks {missing[0]}; the file is incomplete, export the adapter again")


def onnxruntime() -> Any:
    """The onnxruntime package; raises LordbaError if it is not installed or too old to take adapters."""
    try:
        import onnxruntime as runtime
    except ImportError as error:
        raise LordbaError(f"ONNX Runtime is not installed ({error}); run: pip install 'lordba[onnx]'") from error
    if not hasattr(runtime, "LoraAdapter"):
        raise LordbaError(f"onnxruntime {runtime.__version__} takes no adapters; install 1.20 or newer")
    return runtime


def parameter_infos(overridable: Sequence[Any]) -> dict[str, ParameterInfo]:
    """A session's overridable initializers by name."""
    return {arg.name: ParameterInfo(arg.type, tuple(arg.shape)) for arg in overridable}
