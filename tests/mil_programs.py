"""Small Core ML packages for tests, written with coremltools' builder, without the passes that would change them."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lordba.backends.coreml.interpreter import Package, load

ct = pytest.importorskip("coremltools", reason="coremltools is not installed: pip install 'lordba[coreml]'")
from coremltools.converters.mil import Builder as mb  # noqa: E402
from coremltools.converters.mil.converter import mil_convert  # noqa: E402
from coremltools.converters.mil.mil import Function, Program, types  # noqa: E402

on_macos = pytest.mark.skipif(
    sys.platform != "darwin", reason="only macOS has Core ML's own predictions to compare with"
)

BUILTIN = {np.dtype(np.float16): types.fp16, np.dtype(np.float32): types.fp32, np.dtype(np.int32): types.int32}


def tensor(*shape: int, dtype: type = np.float32) -> Any:
    """The declaration of an input."""
    return mb.placeholder(shape=shape, dtype=BUILTIN[np.dtype(dtype)])


def state(*shape: int) -> Any:
    """The declaration of a state, fp16."""
    return mb.state_tensor_placeholder(shape=shape, dtype=types.fp16)


def save_functions(
    path: Path, functions: Mapping[str, tuple[Mapping[str, Any], Callable[..., Any]]], ios: int = 18
) -> Path:
    """Save functions, each of its declared inputs and what builds its output (or outputs), to a package.

    Several functions take iOS 18; one function gets the name "main".
    """
    target = getattr(ct.target, f"iOS{ios}")
    program = Program()
    for name, (inputs, build) in functions.items():
        with Function(dict(inputs), opset_version=target) as function:
            made = build(**function.inputs)
            outputs = list(made) if isinstance(made, list | tuple) else [made]
            # Core ML has no boolean outputs.
            function.set_outputs([mb.cast(x=o, dtype="int32") if o.dtype == types.bool else o for o in outputs])
        program.add_function(name if len(functions) > 1 else "main", function)
    program.default_function_name = next(iter(program.functions))
    program.export_as_multifunction = len(functions) > 1
    program.skip_all_passes = True
    version = {16: 7, 17: 8, 18: 9}[ios]
    model = mil_convert(
        program,
        convert_from="milinternal",
        convert_to="mlprogram",
        specification_version=version,
        compute_units=ct.ComputeUnit.CPU_ONLY,
        skip_model_load=True,
    )
    model.save(str(path))
    return path


@dataclass
class Case:
    """One program of one operation: what builds it, what it should compute (of tensors), and on what."""

    build: Callable[..., Any]
    expected: Callable[..., Any]
    inputs: tuple[np.ndarray, ...]
    tolerance: float


class Cases:
    """Cases by name, saved as the functions of one package, for that is quick."""

    def __init__(self) -> None:
        self.all: dict[str, Case] = {}

    def add(
        self,
        name: str,
        build: Callable[..., Any],
        expected: Callable[..., Any],
        *inputs: np.ndarray,
        tolerance: float = 2e-6,
    ) -> None:
        """Add a case; what is before the dot of its name is the operation that it is about."""
        assert name not in self.all
        self.all[name] = Case(build, expected, inputs, tolerance)

    def saved(self, folder: Path) -> Package:
        """Write all of them and open them again."""
        functions = {}
        for i, one in enumerate(self.all.values()):
            names = one.build.__code__.co_varnames[: len(one.inputs)]
            declared = {n: tensor(*x.shape, dtype=x.dtype.type) for n, x in zip(names, one.inputs, strict=True)}
            functions[f"case_{i}"] = (declared, one.build)
        return load(save_functions(folder / "cases.mlpackage", functions))

    def check(self, package: Package, name: str) -> None:
        """Run a case and compare it; the operation that it is named after must occur in the saved program."""
        one = self.all[name]
        function = package.function(f"case_{list(self.all).index(name)}")
        assert function.op_counts[name.split(".")[0]] > 0
        found = list(function.run(dict(zip(function.inputs, one.inputs, strict=True))).values())
        result = one.expected(*map(torch.from_numpy, one.inputs))
        expected = list(result) if isinstance(result, list | tuple) else [result]
        assert len(found) == len(expected)
        for have, want in zip(found, map(np.asarray, expected), strict=True):
            assert have.shape == want.shape and (have.dtype.kind == "f") == (want.dtype.kind == "f")
            np.testing.assert_allclose(have, want, rtol=one.tolerance, atol=one.tolerance)

    def check_on_macos(self, package: Package, name: str) -> None:
        """Compare the interpreter with Core ML itself, on the CPU."""
        one = self.all[name]
        function = package.function(f"case_{list(self.all).index(name)}")
        inputs = dict(zip(function.inputs, one.inputs, strict=True))
        model = ct.models.MLModel(str(package.path), function_name=function.name, compute_units=ct.ComputeUnit.CPU_ONLY)
        predicted = model.predict(inputs)
        for output, ours in function.run(inputs).items():
            np.testing.assert_allclose(ours, predicted[output], rtol=1e-4, atol=1e-5)
