"""Packages of several functions: put together, base weights once, and measured."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .coreml import quiet

SPEC_NAME = "Data/com.apple.CoreML/model.mlmodel"
WEIGHTS_NAME = "Data/com.apple.CoreML/weights/weight.bin"


def merge(functions: Mapping[str, Path], path: Path) -> None:
    """One package of several packages' `main`, by function name, the first as default; equal weights are kept once."""
    with quiet():
        import coremltools as ct

        descriptor = ct.utils.MultiFunctionDescriptor()
        for name, source in functions.items():
            descriptor.add_function(str(source), src_function_name="main", target_function_name=name)
        descriptor.default_function_name = next(iter(functions))
        ct.utils.save_multifunction(descriptor, str(path))


def added_bytes(package: Path, order: list[str]) -> dict[str, tuple[int, int]]:
    """What each function adds to those before it: bytes of weights, and bytes of its program in the model file."""
    from coremltools.proto import Model_pb2

    model = Model_pb2.Model()
    model.ParseFromString((package / SPEC_NAME).read_bytes())
    functions = {name: model.mlProgram.functions[name] for name in order}
    offsets = {name: set(blob_offsets(function)) for name, function in functions.items()}
    # A blob reaches to where the next one begins.
    starts = sorted({offset for found in offsets.values() for offset in found})
    ends = [*starts[1:], (package / WEIGHTS_NAME).stat().st_size]
    sizes = dict(zip(starts, (end - start for start, end in zip(starts, ends, strict=True)), strict=True))
    result: dict[str, tuple[int, int]] = {}
    known: set[int] = set()
    for name, function in functions.items():
        result[name] = sum(sizes[offset] for offset in offsets[name] - known), function.ByteSize()
        known |= offsets[name]
    return result


def blob_offsets(function: Any) -> Iterator[int]:
    """Where the weight file holds the constants of a function (a MIL protobuf message)."""
    for block in function.block_specializations.values():
        for operation in block.operations:
            values = list(operation.attributes.values())
            values += [one.value for argument in operation.inputs.values() for one in argument.arguments]
            yield from (value.blobFileValue.offset for value in values if value.HasField("blobFileValue"))
