"""The runtime's form of an adapter: one block of bytes that the kernels read in place (docs/format.md).

Little endian. Header: magic, version, module count, total bytes. Then one 64-byte record per module, then the data:
signs exactly as in the adapter folder, scales as their stored codes, each preceded by what its codes mean
(log4: a table of 16 floats; int8: lo and step), so that kernels need no exponentials. r = 0 means no adapter.
"""

import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lordba.adapter import SignModule
from lordba.errors import LordbaError
from lordba.scales import EncodedScales, ScaleCode, levels
from lordba.signs import packed_width

MAGIC = b"LORDBA\0\0"
VERSION = 1
HEADER = struct.Struct("<8sIIQQ")  # magic, version, modules, total bytes, reserved
RECORD = struct.Struct("<4I6Q")  # r, d_in, d_out, scale code; offsets of A, B, s_in, s_mid, s_out; reserved
CODE_NUMBERS = {ScaleCode.FP32: 0, ScaleCode.FP16: 1, ScaleCode.INT8: 2, ScaleCode.LOG4: 3}
_CODES = {number: code for code, number in CODE_NUMBERS.items()}


def make_blob(modules: Sequence[SignModule | None], size: int | None = None) -> Tensor:
    """Lay modules out, in the program's order, as uint8 [n]; None stands for a layer without adapter.

    `size` pads with zeros, so that adapters of different size fit the one static shape that a program has.
    """
    data = bytearray()
    start = HEADER.size + RECORD.size * len(modules)
    records = bytearray()

    def place(section: bytes) -> int:
        data.extend(b"\0" * (-(start + len(data)) % 4))
        offset = start + len(data)
        data.extend(section)
        return offset

    for module in modules:
        if module is None:
            records += RECORD.pack(0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
            continue
        offsets = [place(_bytes(module.a_signs)), place(_bytes(module.b_signs))]
        offsets += [place(_scale_section(s)) for s in module.scales]
        records += RECORD.pack(module.r, module.d_in, module.d_out, CODE_NUMBERS[module.s_in.code], *offsets, 0)
    total = start + len(data)
    if size is not None and size < total:
        raise LordbaError(f"an adapter of {total} bytes does not fit a program made for at most {size} bytes")
    header = HEADER.pack(MAGIC, VERSION, len(modules), total, 0)
    padding = b"\0" * ((size or total) - total)
    return torch.frombuffer(bytearray(header + bytes(records) + bytes(data) + padding), dtype=torch.uint8)


def blob_bytes(modules: Sequence[SignModule | None]) -> int:
    """Bytes that `make_blob` needs for these modules."""
    return make_blob(modules).numel()


class Record(NamedTuple):
    """What a blob says of one module; r = 0 is a layer without adapter."""

    r: int
    d_in: int
    d_out: int
    code: ScaleCode
    offsets: tuple[int, ...]
    """Of A, B, s_in, s_mid and s_out."""


def module_count(blob: Tensor) -> int:
    """How many modules a blob holds; raises LordbaError unless it is one."""
    return _header(blob.contiguous().numpy())[0]


def read_record(blob: Tensor, index: int) -> Record:
    """What a blob says of its module `index`."""
    raw = blob.contiguous().numpy()
    count, _ = _header(raw)
    if not 0 <= index < count:
        raise LordbaError(f"adapter blob holds {count} modules, module {index} was asked for")
    r, d_in, d_out, number, *offsets, _ = RECORD.unpack_from(raw.data, HEADER.size + RECORD.size * index)
    code = _CODES.get(number)
    if code is None:
        raise LordbaError(f"adapter blob: module {index} has the unknown scale code {number}; export the bundle again")
    return Record(r, d_in, d_out, code, tuple(offsets))


def _header(raw: np.ndarray) -> tuple[int, int]:
    """The number of modules and of bytes."""
    if raw.size < HEADER.size:
        raise LordbaError(f"adapter blob of {raw.size} bytes is shorter than its header")
    magic, version, count, total, _ = HEADER.unpack_from(raw.data, 0)
    if magic != MAGIC or version != VERSION or total > raw.size or HEADER.size + RECORD.size * count > total:
        raise LordbaError(f"not an adapter blob of version {VERSION}, or truncated: {raw.size} bytes of {total}")
    return count, total


def read_module(blob: Tensor, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None:
    """Read one module back: a_signs, b_signs and the three float32 scale vectors; None where r = 0."""
    raw = blob.contiguous().numpy()
    _, total = _header(raw)
    r, d_in, d_out, code, offsets = read_record(blob, index)
    if r == 0:
        return None

    def array(offset: int, dtype: type, *shape: int) -> Tensor:
        if offset + int(np.prod(shape)) * np.dtype(dtype).itemsize > total:
            raise LordbaError(f"adapter blob: module {index} reaches beyond the end; copy or export the bundle again")
        return torch.from_numpy(np.frombuffer(raw, dtype, int(np.prod(shape)), offset).reshape(shape).copy())

    a = array(offsets[0], np.uint8, r, packed_width(d_in))
    b = array(offsets[1], np.uint8, d_out, packed_width(r))
    scales = [_read_scales(array, o, code, n) for o, n in zip(offsets[2:], (d_in, r, d_out), strict=True)]
    return a, b, scales[0], scales[1], scales[2]


def _scale_section(scales: EncodedScales) -> bytes:
    if not scales.code.is_coded:
        return _bytes(scales.values)
    assert scales.range is not None
    if scales.code is ScaleCode.LOG4:
        return _bytes(levels(scales.code, scales.range)) + _bytes(scales.values)
    lo, hi = scales.range.double().tolist()
    return struct.pack("<2f", lo, (hi - lo) / 254) + _bytes(scales.values)


def _read_scales(array, offset: int, code: ScaleCode, n: int) -> Tensor:
    if code is ScaleCode.FP32:
        return array(offset, np.float32, n)
    if code is ScaleCode.FP16:
        return array(offset, np.float16, n).float()
    if code is ScaleCode.LOG4:
        table, codes = array(offset, np.float32, 16), array(offset + 64, np.uint8, (n + 1) // 2)
        return table[torch.stack([codes & 15, codes >> 4], dim=-1).flatten()[:n].long()]
    (lo, step), codes = array(offset, np.float32, 2), array(offset + 8, np.uint8, n).float()
    return torch.where(codes > 0, lo + step * (codes - 1), torch.zeros(()))


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().numpy().tobytes()
