"""Core ML bundles: in Core ML itself on Apple systems, in our interpreter of the package elsewhere."""

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from lordba.adapter import Adapter
from lordba.blob import read_module
from lordba.errors import LordbaError
from lordba.runtime.bundle import Bundle
from lordba.runtime.coreml_adapter import AdapterInputs, Parts
from lordba.runtime.install import write_blob
from lordba.signs import unpack_signs

BASE_FUNCTION = "base"
FUNCTIONS, PACKAGES, INPUTS, METHODS = "functions", "packages", "inputs", "methods"
"""How a bundle holds its adapters: functions of its program, packages of their own, inputs of every call, or methods of
an ExecuTorch program, whose package has them as functions."""


Inputs = Mapping[str, tuple[tuple[int | None, ...], Any]]
"""Shape and dtype of every input by its name."""


class Function(Protocol):
    """A loaded function of a package."""

    stateful: bool
    inputs: Inputs

    def new_state(self) -> Any: ...

    def run(self, inputs: dict[str, np.ndarray], state: Any) -> dict[str, np.ndarray]: ...


class CoremlRunner:
    """See session.Runner. `reference` runs the package in our interpreter, `exact` without rounding to fp16.

    `program` is the package where it is not a file of the bundle.
    """

    def __init__(
        self, bundle: Bundle, *, reference: bool = False, exact: bool = False, program: Path | None = None
    ) -> None:
        if not reference and platform.system() != "Darwin":
            raise LordbaError(
                f"{bundle.folder}: Core ML runs on Apple systems alone; --reference runs the package here with an "
                "interpreter, slowly"
            )
        self.bundle = bundle
        self._program = program or bundle.program
        self._native = not reference
        self._exact = exact
        self.longest = bundle.manifest.max_seq_len
        self._packages: dict[Path, Any] = {}
        self._inputs: dict[str, np.ndarray] = {}
        self._text: list[int] = []
        self._state: Any = None
        self._function: Function

    def load(self, adapter: str | None) -> str | None:
        if adapter is not None:
            self.bundle.adapter(adapter)
        return adapter

    def use(self, loaded: str | None) -> None:
        self._function = self._load(*self._place(loaded))
        if self.bundle.manifest.adapter_mode == INPUTS:
            declared = self._function.inputs
            inputs = AdapterInputs.of_program(self._modules, {name: shape for name, (shape, _) in declared.items()})
            filled = inputs.fill(self.adapter_parts(loaded))
            self._inputs = {name: array.astype(declared[name][1]) for name, array in filled.items()}

    def write(self, adapter: Adapter, path: Path) -> None:
        write_blob(self.bundle, adapter, path)

    def run(self, tokens: Sequence[int], start: int) -> np.ndarray:
        inputs = dict(self._inputs)
        if self._function.stateful:
            if start == 0:
                self._state = self._function.new_state()
            inputs["tokens"] = np.array([list(tokens)], np.int32)
            inputs["start"] = np.array([start], np.int32)
        else:
            self._text = [*self._text[:start], *tokens]
            inputs["tokens"] = np.array([self._text], np.int32)
        (logits,) = self._function.run(inputs, self._state).values()
        return logits[0].astype(np.float32)

    def _load(self, program: Path, name: str | None) -> Function:
        if self._native:
            return NativeFunction(program, name)
        if program not in self._packages:
            from lordba.backends.coreml.interpreter import load

            self._packages[program] = load(program, exact=self._exact)
        return ReferenceFunction(self._packages[program].function(name))

    def adapter_parts(self, adapter: str | None) -> dict[str, Parts]:
        """What the file of an adapter holds that is an input of the program."""
        if adapter is None:
            return {}  # scales of zero everywhere
        blob = torch.from_numpy(np.fromfile(self.bundle.folder / self.bundle.adapter(adapter).file, np.uint8))
        parts: dict[str, Parts] = {}
        for i, path in enumerate(self._modules):
            if (module := read_module(blob, i)) is not None:
                a, b, *scales = module
                # Rounded as the inputs are: fp16 holds them.
                s_in, s_mid, s_out = (s.half().float() for s in scales)
                parts[path] = (unpack_signs(a, len(s_in)), unpack_signs(b, len(s_mid)), s_in, s_mid, s_out)
        return parts

    def constants(self, adapter: str) -> dict[str, np.ndarray]:
        """Decoded constants of the function that holds an adapter, in the reference interpreter."""
        package, name = self._place(adapter)
        return {constant.name: constant.value for constant in self._packages[package].function(name).constants()}

    @property
    def _modules(self) -> list[str]:
        return [path for path in self.bundle.manifest.modules if path]

    def _place(self, adapter: str | None) -> tuple[Path, str | None]:
        """The package and the function that hold an adapter; None stands for the package's only function."""
        mode = self.bundle.manifest.adapter_mode
        entry = None if adapter is None else self.bundle.adapter(adapter)
        if mode in (FUNCTIONS, METHODS):
            return self._program, BASE_FUNCTION if entry is None else entry.function
        if mode == PACKAGES and entry is not None:
            return self.bundle.folder / entry.file, None
        return self._program, None


class ReferenceFunction:
    """See Function: in our interpreter."""

    def __init__(self, function: Any) -> None:
        self._function = function
        self.stateful = bool(function.states)
        self.inputs: Inputs = {name: (feature.shape, feature.dtype) for name, feature in function.inputs.items()}

    def new_state(self) -> Any:
        return self._function.new_state()

    def run(self, inputs: dict[str, np.ndarray], state: Any) -> dict[str, np.ndarray]:
        return self._function.run(inputs, state)


class NativeFunction:
    """See Function: in Core ML, on an Apple system."""

    def __init__(self, program: Path, name: str | None) -> None:
        import coremltools as ct

        self._model = ct.models.MLModel(str(program), function_name=name)
        description = self._model.get_spec().description
        functions = {function.name: function for function in description.functions}
        described = functions[name] if name else description
        self.stateful = bool(described.state)
        dtypes = {65552: np.float16, 65568: np.float32, 131104: np.int32}  # of ArrayFeatureType.ArrayDataType
        self.inputs: Inputs = {
            feature.name: (
                tuple(feature.type.multiArrayType.shape),
                np.dtype(dtypes[feature.type.multiArrayType.dataType]),
            )
            for feature in described.input
        }

    def new_state(self) -> Any:
        return self._model.make_state()

    def run(self, inputs: dict[str, np.ndarray], state: Any) -> dict[str, np.ndarray]:
        return self._model.predict(inputs, state) if self.stateful else self._model.predict(inputs)
