"""The weight file of a package (Core ML's blob storage, version 2).

A header of 64 bytes (count and version, uint32), then blobs, each with 64 bytes of metadata before it: a mark and the
element type (uint32), the bytes of the data and where it begins (uint64). Source: coremltools, MILBlob/StorageFormat.
"""

import math
from pathlib import Path

import numpy as np

from lordba.backends.coreml.values import TensorType, decode, element_bytes, known_shape
from lordba.errors import LordbaError

VERSION = 2
MARK = 0xDEADBEEF
METADATA_BYTES = 64
ELEMENTS = {
    1: "FLOAT16",
    2: "FLOAT32",
    3: "UINT8",
    4: "INT8",
    6: "INT16",
    7: "UINT16",
    8: "INT4",
    9: "UINT1",
    10: "UINT2",
    11: "UINT4",
    12: "UINT3",
    13: "UINT6",
    14: "INT32",
    15: "UINT32",
}


class WeightFile:
    """A weight file, mapped into memory; every read is checked against the file's own metadata."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._data = np.memmap(path, np.uint8, mode="r")
        except (OSError, ValueError) as error:
            raise LordbaError(f"{path}: cannot be read ({error}); export the package anew") from error
        version = int(self._data[4:8].view(np.uint32)[0]) if len(self._data) >= METADATA_BYTES else None
        if version != VERSION:
            raise LordbaError(f"{path}: is no weight file of version {VERSION}, but {version}; export the package anew")

    def read(self, offset: int, declared: TensorType) -> np.ndarray:
        """The array whose metadata begins at `offset`: of the declared type, read-only, a view where that can be."""
        where = f"{self.path}: the weight at byte {offset}"
        metadata = self._data[offset : offset + METADATA_BYTES]
        if len(metadata) < METADATA_BYTES or offset % 4 or int(metadata[:4].view(np.uint32)[0]) != MARK:
            raise LordbaError(f"{where} has no metadata; the file is truncated or not this program's, export anew")
        element = ELEMENTS.get(int(metadata[4:8].view(np.uint32)[0]), "of unknown type")
        size, begin = (int(number) for number in metadata[8:24].view(np.uint64))
        if begin + size > len(self._data):
            raise LordbaError(f"{where} ends at byte {begin + size}, the file at {len(self._data)}: it is truncated")
        # Bool is stored as uint8, and a program may declare either.
        if element != ("UINT8" if declared.element == "BOOL" else declared.element):
            raise LordbaError(f"{where} holds {element}, but the program declares {declared.element}; export anew")
        expected = element_bytes(element, math.prod(known_shape(declared)))
        if size != expected:
            raise LordbaError(f"{where} has {size} bytes, but its shape {declared.shape} takes {expected}; export anew")
        return decode(np.asarray(self._data[begin : begin + size]), declared)
