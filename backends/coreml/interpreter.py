"""Runs a saved Core ML package with numpy, on any system: reads the file as a device would, and computes what it says.

It verifies exports where Core ML's own predictions do not exist. What it computes is the file's meaning by MIL's
documentation; the speed, the memory and the rounding of a real device it does not know.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from lordba.backends.coreml.constants import DECODERS
from lordba.backends.coreml.ops import OPERATIONS
from lordba.backends.coreml.package import PackageFile, features
from lordba.backends.coreml.state import OPERATIONS as STATE_OPERATIONS
from lordba.backends.coreml.state import Cell, State
from lordba.backends.coreml.values import TensorType, computed, tensor_type
from lordba.errors import LordbaError

KNOWN = {**OPERATIONS, **STATE_OPERATIONS}

VARIADIC = ("values",)
"""Parameters that are lists of tensors, be there but one."""


def load(path: Path, *, exact: bool = False) -> "Package":
    """Open a .mlpackage. With `exact`, fp16 results are not rounded: defects without their noise."""
    return Package(PackageFile(Path(path)), exact)


@dataclass(frozen=True)
class Constant:
    """A constant of a function as the file stores it."""

    name: str
    op: str
    """"const" or the constexpr operation that decodes it."""
    codes: Mapping[str, np.ndarray]
    """The stored arrays by MIL's parameter names; indices and quantized numbers one to an element, fp16 as float16."""
    value: np.ndarray
    """What the operations get: floats as float32."""


class Package:
    """An open package. Constants are decoded once, and shared by all of the functions that refer to the same ones."""

    def __init__(self, file: PackageFile, exact: bool) -> None:
        self._file = file
        self._exact = exact
        self._decoded: dict[tuple[Any, ...], np.ndarray | str] = {}
        self._functions: dict[str, Function] = {}

    @property
    def path(self) -> Path:
        """The package's folder."""
        return self._file.path

    @property
    def functions(self) -> tuple[str, ...]:
        """The functions' names in the file's order."""
        return tuple(self._file.descriptions)

    @property
    def default_function(self) -> str:
        """The function that runs where none is named."""
        return self._file.spec.description.defaultFunctionName or self.functions[0]

    def function(self, name: str | None = None) -> "Function":
        """A function by its name, or the default one."""
        name = name or self.default_function
        if name not in self.functions:
            raise LordbaError(f"{self._file.path}: has no function {name}, but {', '.join(self.functions)}")
        if name not in self._functions:
            self._functions[name] = Function(self._file, name, self._exact, self._decoded)
        return self._functions[name]


@dataclass(frozen=True)
class _Argument:
    name: str
    """Of an earlier result, or empty if it is a value."""
    value: Any = None


@dataclass(frozen=True)
class _Step:
    operation: Any
    """The MIL_pb2.Operation."""
    compute: Callable[..., Any]
    arguments: Mapping[str, list[_Argument]]
    outputs: tuple[tuple[str, TensorType], ...]
    last_use_of: tuple[str, ...]


class Function:
    """One function of a package. Its constants are decoded and its operations looked up when that is first needed."""

    def __init__(self, file: PackageFile, name: str, exact: bool, decoded: dict[tuple[Any, ...], Any]) -> None:
        self.name = name
        self._file = file
        self._exact = exact
        self._decoded = decoded
        self._where = f"{file.path}: function {name}"
        described = file.descriptions[name]
        program = file.spec.mlProgram.functions[name]
        if program.opset not in program.block_specializations:
            raise LordbaError(f"{self._where}: has no program for its own opset {program.opset}; export anew")
        self._block = program.block_specializations[program.opset]
        declared = {one.name: one.type for one in program.inputs}
        made = {one.name: one.type for operation in self._block.operations for one in operation.outputs}
        self.inputs = features(self._where, described.input, declared)
        self.states = features(self._where, described.state, declared)
        self.outputs = features(self._where, described.output, declared | made)

    @property
    def op_counts(self) -> Counter[str]:
        """How often each MIL operation occurs."""
        return Counter(operation.type for operation in self._block.operations)

    def new_state(self) -> State | None:
        """States of zeros, or None if the function has none."""
        return State(self.states) if self.states else None

    def run(self, inputs: Mapping[str, np.ndarray], state: State | None = None) -> dict[str, np.ndarray]:
        """Outputs by name, in their declared dtypes; what the states hold is changed in place."""
        values: dict[str, Any] = dict(self._constants)
        values.update(self._checked_inputs(inputs))
        values.update(self._checked_states(state))
        for step in self._steps:
            self._run_step(step, values)
        return {name: np.asarray(values[name]).astype(one.dtype) for name, one in self.outputs.items()}

    def constants(self) -> list[Constant]:
        """Every constant of the function but scalars and texts, as stored and as decoded, in the program's order."""
        found = []
        for operation in self._block.operations:
            name = operation.outputs[0].name if operation.outputs else ""
            value = self._constants.get(name)
            if operation.type in DECODERS and isinstance(value, np.ndarray) and value.size > 1:
                codes = {
                    parameter: stored
                    for parameter, one in self._parameters(operation).items()
                    if not one.name and isinstance(stored := self._file.value(one.value), np.ndarray)
                }
                found.append(Constant(name, operation.type, codes, value))
        return found

    @cached_property
    def _constants(self) -> dict[str, Any]:
        """By name, what `const` and constexpr operations hold, decoded; floats are float32."""
        found: dict[str, Any] = {}
        keys: dict[str, tuple[Any, ...]] = {}
        for operation in self._block.operations:
            if operation.type not in DECODERS:
                continue
            with self._explained(operation):
                (output,) = operation.outputs
                parameters = self._parameters(operation)
                key = keys[output.name] = (
                    operation.type,
                    *(
                        (parameter, keys[one.name] if one.name else one.value.SerializeToString(deterministic=True))
                        for parameter, one in sorted(parameters.items())
                    ),
                )
                if key not in self._decoded:
                    stored = {
                        parameter: found[one.name] if one.name else self._file.value(one.value)
                        for parameter, one in parameters.items()
                    }
                    value = DECODERS[operation.type](**stored)
                    if isinstance(value, np.ndarray):
                        value = self._declared(tensor_type(output.type), value)
                    self._decoded[key] = value
                found[output.name] = self._decoded[key]
        return found

    @cached_property
    def _steps(self) -> list[_Step]:
        """The operations that a run computes, in order."""
        todo = [operation for operation in self._block.operations if operation.type not in DECODERS]
        missing = [one for one in todo if one.type not in KNOWN]
        if missing:
            names = "; ".join(f"{one.type} (output {', '.join(o.name for o in one.outputs)})" for one in missing[:8])
            raise LordbaError(
                f"{self._where}: uses operations that the interpreter does not know: {names}; "
                "export without them, or add them to lordba.backends.coreml.ops"
            )
        self._check_names(todo)
        steps, seen = [], set(self.outputs) | set(self._constants)
        for operation in reversed(todo):
            with self._explained(operation):
                arguments = {
                    parameter: [
                        _Argument(one.name, None if one.name else computed(self._file.value(one.value)))
                        for one in argument.arguments
                    ]
                    for parameter, argument in operation.inputs.items()
                }
                outputs = tuple((one.name, tensor_type(one.type)) for one in operation.outputs)
            used = {one.name for several in arguments.values() for one in several if one.name}
            steps.append(_Step(operation, KNOWN[operation.type], arguments, outputs, tuple(used - seen)))
            seen |= used
        return steps[::-1]

    def _check_names(self, operations: list[Any]) -> None:
        """Raise if an operation needs a value that nothing before it makes."""
        known = set(self._constants) | set(self.inputs) | set(self.states)
        for operation in operations:
            for argument in operation.inputs.values():
                for one in argument.arguments:
                    if one.name and one.name not in known:
                        raise LordbaError(f"{self._where}: {operation.type} needs {one.name}, which nothing makes")
            known |= {one.name for one in operation.outputs}

    def _parameters(self, operation: Any) -> dict[str, _Argument]:
        """The one binding of each parameter of a constant: iOS 16 keeps them as attributes, iOS 18 as inputs."""
        found = {name: _Argument("", value) for name, value in operation.attributes.items() if name != "name"}
        for name, argument in operation.inputs.items():
            (one,) = argument.arguments
            found[name] = _Argument(one.name, one.value)
        return found

    def _run_step(self, step: _Step, values: dict[str, Any]) -> None:
        given = {
            parameter: [values[one.name] if one.name else one.value for one in several]
            for parameter, several in step.arguments.items()
        }
        with self._explained(step.operation, given):
            result = step.compute(**{name: all_ if name in VARIADIC else all_[0] for name, all_ in given.items()})
            results = result if isinstance(result, tuple) else (result,)
            for (output, declared), one in zip(step.outputs, results, strict=True):
                values[output] = self._declared(declared, np.asarray(one))
        for used in step.last_use_of:
            values.pop(used, None)

    def _declared(self, declared: TensorType, value: np.ndarray) -> np.ndarray:
        """The value as the declared type holds it; a ValueError if it is of another kind or shape."""
        kinds = {"f": "f", "b": "b", "i": "iu", "u": "iu"}[declared.dtype.kind]
        if value.dtype.kind not in kinds or not declared.admits(value.shape):
            raise ValueError(
                f"gives {value.dtype} {list(value.shape)}, but is declared {declared.element} {list(declared.shape)}"
            )
        if declared.dtype.kind != "f":
            return value.astype(declared.dtype, copy=False)
        if declared.element == "FLOAT16" and not self._exact:
            value = value.astype(np.float16)
        return value.astype(np.float32, copy=False)

    @contextlib.contextmanager
    def _explained(self, operation: Any, given: Mapping[str, list[Any]] = MappingProxyType({})) -> Iterator[None]:
        """Turn whatever an operation meets into an error that names it."""
        try:
            with np.errstate(all="ignore"):
                yield
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            outputs = ", ".join(one.name for one in operation.outputs)
            arrays = ", ".join(
                f"{name} {one.dtype}{list(one.shape)}"
                for name, several in given.items()
                for one in several
                if isinstance(one, np.ndarray)
            )
            of = f" of {arrays}" if arrays else ""
            raise LordbaError(
                f"{self._where}: {operation.type} (output {outputs}){of}: {error}; export anew"
            ) from error

    def _checked_inputs(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        if set(inputs) != set(self.inputs):
            raise LordbaError(
                f"{self._where}: takes the inputs {', '.join(self.inputs) or 'none'}, "
                f"but was given {', '.join(inputs) or 'none'}"
            )
        for name, given in inputs.items():
            self.inputs[name].check(f"{self._where}: the input", given)
        return {name: computed(given) for name, given in inputs.items()}

    def _checked_states(self, state: State | None) -> dict[str, Cell]:
        if (state.declared if state else {}) != self.states:
            given = f"one with {', '.join(state.declared)}" if state else "none"
            raise LordbaError(
                f"{self._where}: needs a state with {', '.join(self.states) or 'nothing'}, but was given {given}; "
                "make it with the function's new_state()"
            )
        return dict(state.cells) if state else {}
