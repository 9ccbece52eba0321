"""An adapter in ONNX Runtime's own file form, `.onnx_adapter`: two named tensors per adapted module.

`<path>.signs` holds A and then B, each as in the adapter folder; `<path>.scales` holds s_in, s_mid and s_out as stored,
and before int8 and log4 codes their ranges, lo and hi of each vector in fp16 (12 bytes). The rank follows from the
length of the scales; where two share a byte (log4), an odd rank gets one more row of A, whose scale is 0 already.
Two tensors and not six, for ONNX Runtime looks every one of them up by name at each run.

ONNX Runtime finds a wrong name or shape in the middle of a run, and another base or version never.
`OnnxAdapter.check` looks at all of it before anything runs.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lordba.adapter import Adapter, SignModule
from lordba.errors import LordbaError
from lordba.scales import ScaleCode, decode_scales
from lordba.signs import packed_width

ADAPTER_VERSION = 1
SUFFIX = ".onnx_adapter"
PARAMETERS = ("signs", "scales")
RANGE_BYTES = 12
_TYPES = {ScaleCode.FP32: "tensor(float)", ScaleCode.FP16: "tensor(float16)"}


def parameter_shapes(code: ScaleCode, d_in: int, d_out: int, r: int) -> dict[str, tuple[int, ...]]:
    """The shape of each of a module's tensors."""
    stored = sum(code.stored_length(n) for n in (d_in, r, d_out))
    rows = r + r % 2 if code is ScaleCode.LOG4 else r
    return {
        "signs": (rows * packed_width(d_in) + d_out * packed_width(r),),
        "scales": (RANGE_BYTES * code.is_coded + stored,),
    }


def rank_of(code: ScaleCode, d_in: int, d_out: int, scales: int) -> int:
    """The rank of a module with so many elements of scales; log4 tells even ranks only."""
    stored = scales - RANGE_BYTES * code.is_coded - code.stored_length(d_in) - code.stored_length(d_out)
    return 2 * stored if code is ScaleCode.LOG4 else stored


def module_tensors(module: SignModule, code: ScaleCode) -> dict[str, np.ndarray]:
    """One module's tensors by name, with scales in this code: the adapter's own, or fp32."""
    if code is module.s_in.code:
        ranges = [scale.range.view(torch.uint8) for scale in module.scales if scale.range is not None]
        parts: list[Tensor] = [*ranges, *(scale.values for scale in module.scales)]
    elif code is ScaleCode.FP32:
        parts = [decode_scales(scale) for scale in module.scales]
    else:
        raise LordbaError(f"the program takes {code.value} scales, the adapter has {module.s_in.code.value}")
    a_signs = module.a_signs
    if code is ScaleCode.LOG4 and module.r % 2:
        a_signs = torch.nn.functional.pad(a_signs, (0, 0, 0, 1))
    signs = torch.cat([a_signs.flatten(), module.b_signs.flatten()])
    return {"signs": signs.numpy(), "scales": torch.cat(parts).numpy()}


def adapter_tensors(adapter: Adapter, code: ScaleCode) -> dict[str, np.ndarray]:
    """Every tensor of the adapter by its name in the model."""
    return {
        f"{path}.{name}": tensor
        for path, module in sorted(adapter.modules.items())
        for name, tensor in module_tensors(module, code).items()
    }


def model_version(fingerprint: str) -> int:
    """The base's fingerprint "sha256:..." as the 31 bits that an adapter file has room for."""
    return int(fingerprint.removeprefix("sha256:")[:8], 16) & 0x7FFFFFFF


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
class ProgramInfo:
    """What a program says of itself in its metadata: its base, and the (d_in, d_out) of every module it can adapt."""

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
        if self.model_version != model_version(program.fingerprint):
            raise LordbaError(
                f"{self.path}: was made for another base (its model version is {self.model_version:#010x}, the "
                f"program's base is {program.fingerprint[:15]}...); export the adapter with this base"
            )
        names = set(self.inputs)
        paths = {name.rpartition(".")[0] for name in names}
        if not paths:
            raise LordbaError(f"{self.path}: holds no tensors; export the adapter again")
        expected = {f"{path}.{name}" for path in paths & set(program.modules) for name in PARAMETERS}
        if unknown := sorted(names - expected):
            raise LordbaError(f"{self.path}: holds {unknown[0]}, which the program lacks; export it for this program")
        if missing := sorted(expected - names):
            raise LordbaError(f"{self.path}: lacks {missing[0]}; the file is incomplete, export the adapter again")
        for path in sorted(paths):
            self._check_module(path, program)

    def _check_module(self, path: str, program: ProgramInfo) -> None:
        code, size = program.scale_code, program.modules[path]
        rank = rank_of(code, *size, (self.inputs[f"{path}.scales"].shape() or [0])[0])
        shapes = parameter_shapes(code, *size, max(rank, 1))
        for name, shape in shapes.items():
            value = self.inputs[f"{path}.{name}"]
            kind = _TYPES.get(code, "tensor(uint8)") if name == "scales" else "tensor(uint8)"
            if value.data_type() != kind or tuple(value.shape()) != shape:
                raise LordbaError(
                    f"{self.path}: {path}.{name} is {value.data_type()} {list(value.shape())}, the program takes "
                    f"{kind} {list(shape)} for rank {rank}; export the adapter for this program"
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
