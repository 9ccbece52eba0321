"""Latents from an adapter that a bundle holds, without PyTorch: where further training on a device starts."""

import struct

import numpy as np

from lordba.errors import LordbaError
from lordba.runtime.bundle import Bundle
from lordba.runtime.device_trainer import DeviceTrainer
from lordba.runtime.install import MAGIC

_RECORD = struct.Struct("<4I6Q")
_HEADER_BYTES = 32


def read_latents(bundle: Bundle, name: str, trainer: DeviceTrainer) -> None:
    """Set a trainer's latents to an adapter of the bundle; both factors of a rank get the same size.

    What lordba.training.latents.to_latents makes of its folder. LordbaError for another rank or other modules.
    """
    file = bundle.adapter_file(name)
    assert file is not None
    raw = file.read_bytes()
    blob = raw[raw.index(MAGIC) :]
    for i, module in enumerate(trainer.modules):
        if module.r == 0:
            continue
        r, d_in, d_out, code, *offsets, _ = _RECORD.unpack_from(blob, _HEADER_BYTES + _RECORD.size * i)
        if (r, d_in, d_out) != (module.r, module.d_in, module.d_out):
            raise LordbaError(
                f"--init {name}: has rank {r} in {bundle.manifest.modules[i]}, the training program {module.r}; "
                "start from another adapter or from nothing"
            )
        a = _signs(blob, offsets[0], r, d_in)
        b = _signs(blob, offsets[1], d_out, r)
        s_in, s_mid, s_out = (_scales(blob, at, code, n) for at, n in zip(offsets[2:], (d_in, r, d_out), strict=True))
        a, b = a * (s_mid[:, None] * s_in), b * s_out[:, None]
        of_a, of_b = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=0)
        nonzero = (of_a > 0) & (of_b > 0)
        balance = np.sqrt(np.divide(of_b, of_a, out=np.ones_like(of_a), where=nonzero), where=nonzero, out=np.ones(r))
        to_a, to_b = trainer.factors(i)
        to_a[:], to_b[:] = a * balance[:, None], b / balance


def _signs(blob: bytes, at: int, rows: int, columns: int) -> np.ndarray:
    """+1 and -1, float64 [rows, columns]."""
    width = (columns + 7) // 8
    packed = np.frombuffer(blob, np.uint8, rows * width, at).reshape(rows, width)
    return 1 - 2.0 * np.unpackbits(packed, axis=1, bitorder="little")[:, :columns]


def _scales(blob: bytes, at: int, code: int, n: int) -> np.ndarray:
    """float64 [n] of a section of a blob (docs/format.md)."""
    if code < 2:
        return np.frombuffer(blob, (np.float32, np.float16)[code], n, at).astype(np.float64)
    if code == 2:
        lo, step = np.frombuffer(blob, np.float32, 2, at)
        codes = np.frombuffer(blob, np.uint8, n, at + 8).astype(np.float64)
        return np.where(codes > 0, lo + step * (codes - 1), 0.0)
    levels = np.frombuffer(blob, np.float32, 16, at).astype(np.float64)
    pairs = np.frombuffer(blob, np.uint8, (n + 1) // 2, at + 64)
    return levels[np.stack([pairs & 15, pairs >> 4], -1).ravel()[:n]]
