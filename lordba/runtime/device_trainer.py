"""A training program in ExecuTorch's runtime, without PyTorch: backends/training/lordba_trainer.h by ctypes."""

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lordba.backends.executorch import library
from lordba.errors import LordbaError

OPTIMIZERS = {"sgd": 0, "adamw": 1, "adamw8bit": 2}
SCALE_CODES = {"fp32": 0, "fp16": 1, "int8": 2, "log4": 3}
IGNORED = -100
_MESSAGE_BYTES = 1000
_NOTE_BYTES = 1 << 24


class _Optimizer(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_int),
        ("beta1", ctypes.c_float),
        ("beta2", ctypes.c_float),
        ("epsilon", ctypes.c_float),
        ("decay", ctypes.c_float),
    )


class _Module(ctypes.Structure):
    _fields_ = (
        ("r", ctypes.c_uint32),
        ("d_in", ctypes.c_uint32),
        ("d_out", ctypes.c_uint32),
        ("offset", ctypes.c_uint64),
    )


class _Packed(ctypes.Structure):
    _fields_ = (
        ("a_signs", ctypes.c_void_p),
        ("b_signs", ctypes.c_void_p),
        ("scales", ctypes.c_void_p * 3),
        ("ranges", ctypes.c_uint16 * 6),
    )


@dataclass(frozen=True)
class TrainedModule:
    """One layer of a training program: A [r, d_in] lies at `offset` of the latents, then B [d_out, r]; r = 0: none."""

    r: int
    d_in: int
    d_out: int
    offset: int


@dataclass(frozen=True)
class PackedModule:
    """One layer's adapter as an adapter folder stores it (docs/format.md); `ranges` fp16 [3, 2] for int8 and log4.

    `sizes` are r, d_in and d_out.
    """

    sizes: tuple[int, int, int]
    a_signs: np.ndarray
    b_signs: np.ndarray
    scales: tuple[np.ndarray, np.ndarray, np.ndarray]
    ranges: np.ndarray | None

    @property
    def nbytes(self) -> int:
        """Stored bytes: signs, scales and their ranges."""
        ranges = 0 if self.ranges is None else self.ranges.nbytes
        return self.a_signs.nbytes + self.b_signs.nbytes + sum(scales.nbytes for scales in self.scales) + ranges


@dataclass(frozen=True)
class Optimizer:
    """What moves the latents: sgd (beta1 is the momentum), adamw, or adamw8bit with one byte per moment."""

    kind: str = "adamw"
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    decay: float = 0.0


class DeviceTrainer:
    """A loaded training program with its latents, gradients and optimizer; for one thread at a time."""

    def __init__(self, program: Path, optimizer: Optimizer | None = None, seed: int = 0) -> None:
        """Latents begin as a LoRA's do: A random by `seed`, B zero. Raises LordbaError for any other program."""
        self._handle: int | None = None
        self._api = _api()
        chosen = optimizer or Optimizer()
        given = _Optimizer(OPTIMIZERS[chosen.kind], chosen.beta1, chosen.beta2, chosen.epsilon, chosen.decay)
        message = ctypes.create_string_buffer(_MESSAGE_BYTES)
        handle = self._api.open(str(program).encode(), ctypes.byref(given), seed, message, _MESSAGE_BYTES)
        if not handle:
            raise LordbaError(message.value.decode(errors="replace"))
        self._handle = handle
        self.longest = int(self._api.longest(handle))
        self.planned_bytes = int(self._api.planned_bytes(handle))
        self.modules = [self._module(i) for i in range(self._api.modules(handle))]
        size = self._api.size(handle)
        self.latents: np.ndarray = np.ctypeslib.as_array(self._api.latents(handle), (size,))
        """The trainer's own memory, float32 [size]; it lives as long as the trainer."""

    def __del__(self) -> None:
        if self._handle:
            self._api.close(self._handle)

    @property
    def steps(self) -> int:
        """Updates so far, those before a checkpoint included."""
        return int(self._api.steps(self._handle))

    def factors(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Views of a module's latents: A [r, d_in] and B [d_out, r]."""
        m = self.modules[index]
        a_end = m.offset + m.r * m.d_in
        a, b = self.latents[m.offset : a_end], self.latents[a_end : a_end + m.d_out * m.r]
        return a.reshape(m.r, m.d_in), b.reshape(m.d_out, m.r)

    def add(self, tokens: Sequence[int], targets: Sequence[int], weight: float) -> float:
        """Add a sequence's gradients; returns weight * the sum of its cross-entropies in nats.

        targets[i] is the token that follows tokens[i], or -100 where none is learned.
        """
        if len(tokens) != len(targets):
            raise LordbaError(f"{len(tokens)} tokens have {len(targets)} targets; give one for each")
        ids, following = (np.ascontiguousarray(values, np.int64) for values in (tokens, targets))
        loss = ctypes.c_double()
        self._check(
            self._api.add(self._handle, _pointer(ids), _pointer(following), len(ids), weight, ctypes.byref(loss))
        )
        return loss.value

    def gradients(self) -> np.ndarray:
        """What was added since the last update, float32 [size], laid out as the latents are."""
        found = np.zeros_like(self.latents)
        self._check(self._api.gradients(self._handle, _pointer(found)))
        return found

    def update(self, rate: float, largest_norm: float = float("inf")) -> None:
        """One step of the optimizer; gradients longer than `largest_norm` are scaled down to it."""
        self._check(self._api.update(self._handle, rate, largest_norm))

    def save(self, file: Path, note: bytes = b"") -> None:
        """Write a checkpoint, complete or not at all: latents, optimizer state, steps, and a note."""
        self._check(self._api.save(self._handle, str(file).encode(), note, len(note)))

    def load(self, file: Path) -> bytes:
        """Go on from a checkpoint; returns its note. LordbaError if it is damaged or of another program."""
        note = ctypes.create_string_buffer(_NOTE_BYTES)
        used = ctypes.c_size_t()
        self._check(self._api.load(self._handle, str(file).encode(), note, _NOTE_BYTES, ctypes.byref(used)))
        return note.raw[: used.value]

    def write_adapter(self, file: Path, code: str, template: Path | None = None) -> None:
        """Write the adapter as a program's runtime reads it; `template` is a .ptd of the bundle, None makes a blob."""
        other = None if template is None else str(template).encode()
        self._check(self._api.write_adapter(self._handle, SCALE_CODES[code], other, str(file).encode()))

    def pack(self, index: int, code: str) -> PackedModule:
        """A module's signs and scales."""
        m = self.modules[index]
        dtype = {"fp32": np.float32, "fp16": np.float16}.get(code, np.uint8)
        lengths = [(n + 1) // 2 if code == "log4" else n for n in (m.d_in, m.r, m.d_out)]
        a, b = np.zeros((m.r, (m.d_in + 7) // 8), np.uint8), np.zeros((m.d_out, (m.r + 7) // 8), np.uint8)
        scales = [np.zeros(n, dtype) for n in lengths]
        packed = _Packed(_pointer(a), _pointer(b), (ctypes.c_void_p * 3)(*map(_pointer, scales)))
        self._check(self._api.pack(self._handle, index, SCALE_CODES[code], ctypes.byref(packed)))
        ranges = np.array(packed.ranges, np.uint16).view(np.float16).reshape(3, 2)
        coded = code in ("int8", "log4")
        stored = (scales[0], scales[1], scales[2])
        return PackedModule((m.r, m.d_in, m.d_out), a, b, stored, ranges if coded else None)

    def _module(self, index: int) -> TrainedModule:
        found = _Module()
        self._check(self._api.module_at(self._handle, index, ctypes.byref(found)))
        return TrainedModule(found.r, found.d_in, found.d_out, found.offset)

    def _check(self, status: int) -> None:
        if status:
            raise LordbaError(self._api.error(self._handle).decode(errors="replace"))


def _pointer(array: np.ndarray) -> int:
    return array.ctypes.data


@functools.cache
def _api() -> Any:
    """The functions of lordba_trainer.h by their names' last part, with their types."""
    handle, text, size, number = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int
    u32, u64, f32, array = ctypes.c_uint32, ctypes.c_uint64, ctypes.c_float, ctypes.c_void_p
    functions: dict[str, tuple[Any, ...]] = {
        "open": (handle, text, array, u64, text, size),
        "close": (None, handle),
        "error": (text, handle),
        "longest": (u32, handle),
        "modules": (u32, handle),
        "module_at": (number, handle, u32, array),
        "size": (u64, handle),
        "latents": (ctypes.POINTER(f32), handle),
        "steps": (u64, handle),
        "planned_bytes": (u64, handle),
        "add": (number, handle, array, array, size, f32, array),
        "gradients": (number, handle, array),
        "update": (number, handle, f32, f32),
        "save": (number, handle, text, text, size),
        "load": (number, handle, text, text, size, array),
        "write_adapter": (number, handle, number, text, text),
        "pack": (number, handle, u32, number, array),
    }
    loaded = library()

    class Api:
        pass

    api = Api()
    for name, (result, *arguments) in functions.items():
        function = getattr(loaded, f"lordba_trainer_{name}")
        function.restype, function.argtypes = result, arguments
        setattr(api, name, function)
    return api
