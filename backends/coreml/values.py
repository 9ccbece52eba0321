"""MIL's element types, and the values that a program holds. What is wrong with one is a ValueError here."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from lordba.backends.coreml.protobuf import proto

STORED = {
    "BOOL": np.bool_,
    "FLOAT16": np.float16,
    "FLOAT32": np.float32,
    "INT4": np.int8,
    "INT8": np.int8,
    "INT16": np.int16,
    "INT32": np.int32,
    "UINT1": np.uint8,
    "UINT2": np.uint8,
    "UINT3": np.uint8,
    "UINT4": np.uint8,
    "UINT6": np.uint8,
    "UINT8": np.uint8,
    "UINT16": np.uint16,
    "UINT32": np.uint32,
}
"""What an element of each MIL type becomes in an array; those of less than a byte take one each."""

SUB_BYTE = {"INT4": 4, "UINT1": 1, "UINT2": 2, "UINT3": 3, "UINT4": 4, "UINT6": 6}
"""Bits of the types that are packed, several to a byte."""


@dataclass(frozen=True)
class TensorType:
    """A declared type: MIL's element type and the shape, None for a dimension that only a run decides."""

    element: str
    shape: tuple[int | None, ...]

    @property
    def dtype(self) -> np.dtype:
        """What an array of it is stored in."""
        return np.dtype(STORED[self.element])

    def admits(self, shape: tuple[int, ...]) -> bool:
        """Whether an array of this shape may have this type."""
        return len(shape) == len(self.shape) and all(
            want in (None, have) for want, have in zip(self.shape, shape, strict=True)
        )


def tensor_type(declared: Any) -> TensorType:
    """The type of a MIL_pb2.ValueType that is a tensor of numbers, or the tensor that a state wraps."""
    if declared.WhichOneof("type") == "stateType":
        declared = declared.stateType.wrappedType
    if declared.WhichOneof("type") != "tensorType":
        raise ValueError(f"a {declared.WhichOneof('type')} is no tensor; only tensors and states are understood")
    tensor = declared.tensorType
    element = proto().MIL_pb2.DataType.Name(tensor.dataType)
    if element not in STORED:
        raise ValueError(f"elements of type {element} are not understood")
    shape = tuple(d.constant.size if d.WhichOneof("dimension") == "constant" else None for d in tensor.dimensions)
    return TensorType(element, shape)


def unpack(data: np.ndarray, element: str, count: int) -> np.ndarray:
    """The first `count` elements of packed bytes, least significant bit first, each in a byte of its own."""
    bits = SUB_BYTE[element]
    if 8 % bits == 0:  # no code straddles two bytes
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        codes = ((data[:, None] >> shifts) & np.uint8((1 << bits) - 1)).reshape(-1)[:count]
    else:
        flat = np.unpackbits(data, bitorder="little")[: count * bits].reshape(count, bits)
        codes = (flat << np.arange(bits, dtype=np.uint8)).sum(1, dtype=np.uint8)
    if element == "INT4":
        return ((codes ^ 8).astype(np.int8) - 8).astype(np.int8)
    return codes


def immediate(value: Any) -> np.ndarray | str:
    """What a MIL_pb2.Value holds in the program itself: an array in its stored dtype, or one text."""
    tensor = value.immediateValue.tensor
    kind = tensor.WhichOneof("value")
    if kind == "strings":
        return tensor.strings.values[0] if tensor.strings.values else ""
    declared = tensor_type(value.type)
    count = math.prod(known_shape(declared))
    if kind == "bytes":
        data = np.frombuffer(tensor.bytes.values, np.uint8)
        if element_bytes(declared.element, count) != len(data):
            raise ValueError(f"an immediate value of {count} {declared.element} has {len(data)} bytes")
        return decode(data, declared)
    numbers = getattr(tensor, kind).values if kind else []
    if len(numbers) != count:
        raise ValueError(f"an immediate value should have {count} elements and has {len(numbers)}")
    return np.array(numbers, declared.dtype).reshape(known_shape(declared))


def decode(data: np.ndarray, declared: TensorType) -> np.ndarray:
    """Bytes [n], exactly as many as the type takes, to an array of the type."""
    shape = known_shape(declared)
    if declared.element in SUB_BYTE:
        return unpack(data, declared.element, math.prod(shape)).reshape(shape)
    return data.view(declared.dtype).reshape(shape)


def element_bytes(element: str, count: int) -> int:
    """How many bytes `count` elements take, packed where the type is."""
    return -(-count * SUB_BYTE[element] // 8) if element in SUB_BYTE else count * np.dtype(STORED[element]).itemsize


def known_shape(declared: TensorType) -> tuple[int, ...]:
    """The shape of a constant, which no run decides."""
    shape = tuple(size for size in declared.shape if size is not None)
    if len(shape) != len(declared.shape):
        raise ValueError("a constant has a dimension of unknown size")
    return shape


def computed(value: Any) -> Any:
    """A stored value as the operations take it: floats as float32; integers, booleans and texts as they are."""
    return value.astype(np.float32) if isinstance(value, np.ndarray) and value.dtype.kind == "f" else value
