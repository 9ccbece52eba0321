"""Reading a saved package: its manifest, the program's description, and what goes in and out of each function."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lordba.backends.coreml.protobuf import proto
from lordba.backends.coreml.values import immediate, tensor_type
from lordba.backends.coreml.weights import WeightFile
from lordba.errors import LordbaError

FEATURE_DTYPES = {"FLOAT16": np.float16, "FLOAT32": np.float32, "INT32": np.int32, "INT8": np.int8}


@dataclass(frozen=True)
class Feature:
    """An input, output or state of a function, as the package describes it to the system that runs it."""

    name: str
    dtype: np.dtype
    shape: tuple[int | None, ...]
    """None where several sizes are allowed."""
    shapes: tuple[tuple[int, ...], ...] = ()
    """The shapes of an input that has a list of them."""
    ranges: tuple[tuple[int, int], ...] = ()
    """Smallest and largest size of each dimension (-1: no limit) of an input that has ranges."""

    def admits(self, shape: tuple[int, ...]) -> bool:
        """Whether an array of this shape may be given."""
        if self.shapes:
            return shape in self.shapes
        if self.ranges:
            return len(shape) == len(self.ranges) and all(
                low <= size and (high < 0 or size <= high) for size, (low, high) in zip(shape, self.ranges, strict=True)
            )
        return shape == self.shape

    @property
    def fixed_shape(self) -> tuple[int, ...]:
        """The shape of a feature that has but one."""
        return tuple(size for size in self.shape if size is not None)

    def check(self, what: str, given: np.ndarray) -> None:
        """Raise unless the array is one that may be given; nothing is converted."""
        if not isinstance(given, np.ndarray):
            raise LordbaError(f"{what} {self.name} takes an array, {self.describe()}, not a {type(given).__name__}")
        if given.dtype != self.dtype or not self.admits(given.shape):
            raise LordbaError(
                f"{what} {self.name} takes {self.describe()}, but was given {given.dtype} {list(given.shape)}"
            )

    def describe(self) -> str:
        """The dtype and the shapes that are allowed, for messages."""
        if self.shapes:
            sizes = "one of " + ", ".join(map(str, self.shapes))
        elif self.ranges:
            sizes = "[" + ", ".join(f"{a}" if a == b else f"{a}..{b if b >= 0 else ''}" for a, b in self.ranges) + "]"
        else:
            sizes = str(list(self.shape))
        return f"{self.dtype} {sizes}"


class PackageFile:
    """The model file of a package and its weights, without any meaning given to the operations."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.model_file = _model_file(path)
        self.spec = proto().Model_pb2.Model()
        from google.protobuf.message import DecodeError  # protobuf comes with coremltools

        try:
            self.spec.ParseFromString(self.model_file.read_bytes())
        except (DecodeError, OSError) as error:
            raise LordbaError(f"{self.model_file}: cannot be read as a model ({error}); export anew") from error
        if self.spec.WhichOneof("Type") != "mlProgram":
            raise LordbaError(f"{path}: is no ML program, but {self.spec.WhichOneof('Type')}; export it for iOS 16 up")
        self._weights: dict[str, WeightFile] = {}

    @cached_property
    def descriptions(self) -> dict[str, Any]:
        """What describes the features of each function: a FunctionDescription, or the model's if it has but one."""
        description = self.spec.description
        if description.functions:
            found = {function.name: function for function in description.functions}
        else:
            found = {name: description for name in self.spec.mlProgram.functions}
        if set(found) != set(self.spec.mlProgram.functions):
            raise LordbaError(
                f"{self.path}: describes the functions {', '.join(found)}, but its program has "
                f"{', '.join(self.spec.mlProgram.functions)}; export anew"
            )
        return found

    def value(self, value: Any) -> np.ndarray | str:
        """A MIL_pb2.Value in its stored dtype, from the program or the weight file; a ValueError if it is none."""
        if value.WhichOneof("value") != "blobFileValue":
            return immediate(value)
        name = value.blobFileValue.fileName
        if name not in self._weights:
            folder = self.model_file.parent.resolve()
            path = Path(name.replace("@model_path", str(folder)))
            if not path.resolve().is_relative_to(folder):
                raise LordbaError(f"{self.path}: names a weight file outside of the package ({name}); it is refused")
            self._weights[name] = WeightFile(path)
        return self._weights[name].read(value.blobFileValue.offset, tensor_type(value.type))


def features(where: str, described: Any, program: Mapping[str, Any]) -> dict[str, Feature]:
    """The features of a list of FeatureDescription, in their order; `program` has the MIL types of its values."""
    found = {}
    for one in described:
        feature = _feature(f"{where}: {one.name}", one)
        if one.name not in program:
            raise LordbaError(f"{where}: describes {one.name}, which the program has not; export anew")
        try:
            declared = tensor_type(program[one.name])
        except ValueError as error:
            raise LordbaError(f"{where}: {one.name}: {error}; export anew") from error
        if declared.dtype != feature.dtype:
            raise LordbaError(
                f"{where}: describes {one.name} as {feature.dtype}, the program as {declared.element}; export anew"
            )
        # Outputs of flexible size are described without any shape; the program knows at least the rank.
        found[one.name] = feature if feature.shape else replace(feature, shape=declared.shape)
    return found


def _feature(where: str, feature: Any) -> Feature:
    kind = feature.type.WhichOneof("Type")
    if kind not in ("multiArrayType", "stateType"):
        raise LordbaError(f"{where}: is of type {kind}; only arrays and states are understood")
    array = feature.type.multiArrayType if kind == "multiArrayType" else feature.type.stateType.arrayType
    element = proto().FeatureTypes_pb2.ArrayFeatureType.ArrayDataType.Name(array.dataType)
    if element not in FEATURE_DTYPES:
        raise LordbaError(f"{where}: elements of {element} are not understood; use one of {', '.join(FEATURE_DTYPES)}")
    dtype = np.dtype(FEATURE_DTYPES[element])
    flexible = array.WhichOneof("ShapeFlexibility")
    if flexible == "enumeratedShapes":
        shapes = tuple(tuple(one.shape) for one in array.enumeratedShapes.shapes)
        shape = tuple(sizes[0] if len(set(sizes)) == 1 else None for sizes in zip(*shapes, strict=True))
        return Feature(feature.name, dtype, shape, shapes=shapes)
    if flexible == "shapeRange":
        ranges = tuple((one.lowerBound, one.upperBound) for one in array.shapeRange.sizeRanges)
        return Feature(feature.name, dtype, tuple(a if a == b else None for a, b in ranges), ranges=ranges)
    return Feature(feature.name, dtype, tuple(array.shape))


def _model_file(path: Path) -> Path:
    manifest = path / "Manifest.json"
    try:
        entries = json.loads(manifest.read_text())
        inside = entries["itemInfoEntries"][entries["rootModelIdentifier"]]["path"]
        found = path / "Data" / inside
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LordbaError(f"{path}: is no Core ML package, its Manifest.json cannot be read ({error!r})") from error
    if not found.resolve().is_relative_to(path.resolve()) or not found.is_file():
        raise LordbaError(f"{path}: its manifest names the model {inside}, which is not in the package; export anew")
    return found
