"""An adapter in ONNX Runtime's own file form, `.onnx_adapter`: one tensor, `adapter`, the adapter blob (lordba.blob).

One tensor and not some per module, for ONNX Runtime looks every one of them up by name at each run. A module without
adapter has rank 1 and scales of zero: the operator's body in standard operators knows no rank 0.

ONNX Runtime finds a wrong name or shape in the middle of a run, and another base, program or version never.
`OnnxAdapter.check` looks at all of it before anything runs.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lordba.adapter import Adapter, SignModule, zero_module
from lordba.blob import make_blob, module_count, read_record
from lordba.errors import LordbaError
from lordba.scales import ScaleCode, decode_scales, encode_scales

ADAPTER_VERSION = 2
SUFFIX = ".onnx_adapter"
INPUT = "adapter"
"""The tensor's name, in files and programs."""


def with_code(module: SignModule, code: ScaleCode) -> SignModule:
    """The module with scales in this code: its own, or fp32."""
    if code is module.s_in.code:
        return module
    if code is not ScaleCode.FP32:
        raise LordbaError(f"the program takes {code.value} scales, the adapter has {module.s_in.code.value}")
    s_in, s_mid, s_out = (encode_scales(decode_scales(scale), code) for scale in module.scales)
    return replace(module, s_in=s_in, s_mid=s_mid, s_out=s_out)


def no_adapter(d_in: int, d_out: int, code: ScaleCode) -> SignModule:
    """What stands for a layer without adapter."""
    return zero_module(d_in, d_out, 1, code)


def write_onnx_adapter(path: Path, tensors: Mapping[str, np.ndarray], version: int) -> None:
    """Write tensors as ONNX Runtime's adapter file for programs of this model version."""
    runtime = onnxruntime()
    file = runtime.AdapterFormat()
    file.set_adapter_version(ADAPTER_VERSION)
    file.set_model_version(version)
    values = {name: runtime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(t)) for name, t in tensors.items()}
    file.set_parameters(values)
    file.export_adapter(str(path))


@dataclass(frozen=True)
class ProgramInfo:
    """What a program says of itself in its metadata: its base, and the (d_in, d_out) of every module it can adapt.

    The modules are in the order of the adapter's records; `scale_code` is the one that the operator's body reads.
    """

    fingerprint: str
    scale_code: ScaleCode
    modules: Mapping[str, tuple[int, int]]

    def metadata(self) -> dict[str, str]:
        """As the model's own metadata."""
        return {
            "lordba.base_fingerprint": self.fingerprint,
            "lordba.scale_code": self.scale_code.value,
            "lordba.modules": json.dumps({path: list(size) for path, size in self.modules.items()}),
        }

    @property
    def model_version(self) -> int:
        """The base and the order of the modules as the 31 bits that an adapter file has room for."""
        text = "\n".join([self.fingerprint, *self.modules])
        return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) & 0x7FFFFFFF

    def blob(self, adapter: Adapter | None) -> np.ndarray:
        """An adapter, or none, as this program takes it: uint8 [n]. Its modules must be the program's."""
        found = adapter.modules if adapter else {}
        modules = [
            with_code(found[path], self.scale_code) if path in found else no_adapter(*size, self.scale_code)
            for path, size in self.modules.items()
        ]
        return make_blob(modules).numpy()

    def write(self, adapter: Adapter, path: Path) -> None:
        """Write an adapter's file for this program."""
        write_onnx_adapter(path, {INPUT: self.blob(adapter)}, self.model_version)

    @staticmethod
    def read(metadata: Mapping[str, str], program: Path) -> "ProgramInfo":
        """From a loaded model's metadata."""
        try:
            modules = {path: tuple(size) for path, size in json.loads(metadata["lordba.modules"]).items()}
            return ProgramInfo(metadata["lordba.base_fingerprint"], ScaleCode(metadata["lordba.scale_code"]), modules)
        except (KeyError, ValueError) as error:
            raise LordbaError(f"{program}: is not a program of lordba.export ({error!r}); export it again") from error


class OnnxAdapter:
    """An adapter file that was read: `lora` for ONNX Runtime's LoraAdapter API, `inputs` as plain inputs of a run."""

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

    def check(self, program: ProgramInfo) -> None:
        """Raise unless this adapter is whole, of this version, and for this program and its base."""
        if self.adapter_version != ADAPTER_VERSION:
            raise LordbaError(
                f"{self.path}: adapter version {self.adapter_version} is not known here (this lordba reads "
                f"{ADAPTER_VERSION}); install a newer lordba or export the adapter again"
            )
        if self.model_version != program.model_version:
            raise LordbaError(
                f"{self.path}: was made for another base or for other modules (its model version is "
                f"{self.model_version:#010x}, the program's {program.model_version:#010x}); export the adapter with "
                "this program"
            )
        if set(self.inputs) != {INPUT}:
            raise LordbaError(
                f"{self.path}: must hold the tensor {INPUT!r} alone, found {sorted(self.inputs)[:3]}; export it again"
            )
        value = self.inputs[INPUT]
        if value.data_type() != "tensor(uint8)" or len(value.shape()) != 1:
            raise LordbaError(
                f"{self.path}: {INPUT} must be tensor(uint8) of one dimension, found {value.data_type()} "
                f"{list(value.shape())}; export it again"
            )
        self._check_blob(torch.from_numpy(value.numpy()), program)

    def _check_blob(self, blob: Tensor, program: ProgramInfo) -> None:
        count = module_count(blob)
        if count != len(program.modules):
            raise LordbaError(
                f"{self.path}: holds {count} modules, the program takes {len(program.modules)}; export it again"
            )
        for index, (path, size) in enumerate(program.modules.items()):
            record = read_record(blob, index)
            if (record.d_in, record.d_out, record.code) != (*size, program.scale_code) or record.r < 1:
                raise LordbaError(
                    f"{self.path}: {path} is of rank {record.r}, {record.d_in} to {record.d_out} channels with "
                    f"{record.code.value} scales; the program takes a rank of at least 1, {size[0]} to {size[1]} "
                    f"channels, {program.scale_code.value} scales; export the adapter for this program"
                )


def onnxruntime() -> Any:
    """The onnxruntime package; raises LordbaError if it is not installed or too old to take adapters."""
    try:
        import onnxruntime as runtime
    except ImportError as error:
        raise LordbaError(f"ONNX Runtime is not installed ({error}); run: pip install 'lordba[onnx]'") from error
    if not hasattr(runtime, "LoraAdapter"):
        raise LordbaError(f"onnxruntime {runtime.__version__} takes no adapters; install 1.20 or newer")
    return runtime
