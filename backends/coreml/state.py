"""States: tensors that a function keeps between its runs, a KV cache say (Core ML's MLState)."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lordba.backends.coreml.package import Feature
from lordba.backends.coreml.values import computed


class Cell:
    """One state. Its array is replaced, never changed, so what was read from it stays as it was."""

    def __init__(self, content: np.ndarray) -> None:
        self.value = computed(content)


class State:
    """What the states of a function hold."""

    def __init__(self, declared: Mapping[str, Feature]) -> None:
        self.declared = dict(declared)
        self.cells = {name: Cell(np.zeros(one.fixed_shape, one.dtype)) for name, one in declared.items()}

    def read(self, name: str) -> np.ndarray:
        """The content of a state, in its dtype."""
        return self.cells[name].value.astype(self.declared[name].dtype)

    def write(self, name: str, content: np.ndarray) -> None:
        """Replace the content of a state."""
        self.declared[name].check("the state", content)
        self.cells[name].value = computed(content)


def read_state(input: Cell) -> np.ndarray:
    """The tensor that the state holds now."""
    return input.value


def write_state(input: Cell, data: np.ndarray) -> tuple[()]:
    """Replace what the state holds; a program has no other result of it."""
    if data.shape != input.value.shape:
        raise ValueError(f"the state has shape {input.value.shape}, what is written {data.shape}")
    input.value = data
    return ()


OPERATIONS: dict[str, Callable[..., Any]] = {"read_state": read_state, "write_state": write_state}
