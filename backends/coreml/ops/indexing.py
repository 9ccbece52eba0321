"""Gathering and scattering by computed indices.

From iOS 17 on, MIL leaves an index outside of [0, size) undefined, a negative one too; `validate_indices` exists from
then on, so its presence tells. An undefined index is a mistake here, whatever it asks for.
"""

from collections.abc import Callable
from typing import Any

import numpy as np


def checked(indices: np.ndarray, size: int, validate_indices: bool | None) -> np.ndarray:
    """The indices of an axis of `size` elements, or a ValueError."""
    lowest = -size if validate_indices is None else 0
    if indices.size and (indices.min() < lowest or indices.max() >= size):
        raise ValueError(f"indices from {indices.min()} to {indices.max()}, outside of [{lowest}, {size})")
    return indices


def gather(
    x: np.ndarray, indices: np.ndarray, axis: int = 0, batch_dims: int = 0, validate_indices: bool | None = None
) -> np.ndarray:
    """Slices of x along an axis; the first `batch_dims` axes of x and of the indices go together."""
    axis, batch = int(axis) % x.ndim, int(batch_dims)
    checked(indices, x.shape[axis], validate_indices)
    if batch == 0:
        return np.take(x, indices, axis)
    pairs = zip(_flat(x, batch), _flat(indices, batch), strict=True)
    return np.stack([np.take(one, index, axis - batch) for one, index in pairs]).reshape(
        *x.shape[:axis], *indices.shape[batch:], *x.shape[axis + 1 :]
    )


def gather_along_axis(
    x: np.ndarray, indices: np.ndarray, axis: int = 0, validate_indices: bool | None = None
) -> np.ndarray:
    """Elements of x: each index stands where its element goes."""
    return x[_along(checked(indices, x.shape[int(axis)], validate_indices), int(axis))]


def gather_nd(
    x: np.ndarray, indices: np.ndarray, batch_dims: int = 0, validate_indices: bool | None = None
) -> np.ndarray:
    """Slices of x whose whole index is in the last axis of the indices."""
    batch = int(batch_dims)
    _check_nd(indices, x.shape[batch:], validate_indices)
    if batch == 0:
        return x[_nd(indices)]
    found = [one[_nd(index)] for one, index in zip(_flat(x, batch), _flat(indices, batch), strict=True)]
    return np.stack(found).reshape(*indices.shape[:-1], *x.shape[batch + indices.shape[-1] :])


def scatter(
    data: np.ndarray,
    indices: np.ndarray,
    updates: np.ndarray,
    axis: int = 0,
    mode: str = "add",
    validate_indices: bool | None = None,
) -> np.ndarray:
    """data with slices along an axis updated."""
    axis = int(axis) % data.ndim
    index = (*[slice(None)] * axis, checked(indices, data.shape[axis], validate_indices))
    return _updated(data, index, updates, mode)


def scatter_along_axis(
    data: np.ndarray,
    indices: np.ndarray,
    updates: np.ndarray,
    axis: int = 0,
    mode: str = "add",
    validate_indices: bool | None = None,
) -> np.ndarray:
    """data with elements updated; each index has its update in the same place."""
    index = _along(checked(indices, data.shape[int(axis)], validate_indices), int(axis))
    return _updated(data, index, updates, mode)


def scatter_nd(
    data: np.ndarray,
    indices: np.ndarray,
    updates: np.ndarray,
    mode: str = "add",
    validate_indices: bool | None = None,
) -> np.ndarray:
    """data with slices updated whose whole index is in the last axis of the indices."""
    _check_nd(indices, data.shape, validate_indices)
    return _updated(data, _nd(indices), updates, mode)


def one_hot(
    indices: np.ndarray,
    one_hot_vector_size: int,
    axis: int = -1,
    on_value: Any = 1,
    off_value: Any = 0,
) -> np.ndarray:
    """A new axis that has `on_value` where the index says."""
    hot = np.expand_dims(indices, int(axis))
    sizes = [1] * hot.ndim
    sizes[int(axis)] = -1
    return np.where(hot == np.arange(int(one_hot_vector_size)).reshape(sizes), on_value, off_value)


ACCUMULATE: dict[str, np.ufunc] = {
    "add": np.add,
    "div": np.true_divide,
    "max": np.maximum,
    "min": np.minimum,
    "mul": np.multiply,
    "sub": np.subtract,
}

OPERATIONS: dict[str, Callable[..., Any]] = {
    "gather": gather,
    "gather_along_axis": gather_along_axis,
    "gather_nd": gather_nd,
    "one_hot": one_hot,
    "scatter": scatter,
    "scatter_along_axis": scatter_along_axis,
    "scatter_nd": scatter_nd,
}


def _updated(data: np.ndarray, index: tuple[Any, ...], updates: np.ndarray, mode: str) -> np.ndarray:
    result = data.copy()
    if result[index].shape != updates.shape:
        raise ValueError(f"the indices name {result[index].shape} elements, the updates are {updates.shape}")
    if mode == "update":
        result[index] = updates
    else:
        ACCUMULATE[mode].at(result, index, updates)
    return result


def _flat(x: np.ndarray, batch: int) -> np.ndarray:
    """The first `batch` axes as one."""
    return x.reshape(-1, *x.shape[batch:])


def _along(indices: np.ndarray, axis: int) -> tuple[np.ndarray, ...]:
    """The index that takes every element from its own place on all of the axes but one."""
    grid: list[np.ndarray] = list(np.ogrid[tuple(slice(n) for n in indices.shape)])
    grid[axis] = indices
    return tuple(grid)


def _nd(indices: np.ndarray) -> tuple[np.ndarray, ...]:
    return tuple(np.moveaxis(indices, -1, 0))


def _check_nd(indices: np.ndarray, sizes: tuple[int, ...], validate_indices: bool | None) -> None:
    for i in range(indices.shape[-1]):
        checked(indices[..., i], sizes[i], validate_indices)
