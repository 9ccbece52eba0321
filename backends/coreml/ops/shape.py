"""Operations that move elements by position: shapes, slices, and tensors that are put together."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np


def reshape(x: np.ndarray, shape: np.ndarray) -> np.ndarray:
    """-1 is what is left; 0 is the size of the same axis of x, if the rank stays."""
    if 0 in shape and len(shape) != x.ndim:
        raise ValueError(f"0 in the shape {shape.tolist()} stands for an axis of x, which has rank {x.ndim}")
    return x.reshape([x.shape[i] if size == 0 else int(size) for i, size in enumerate(shape)])


def expand_dims(x: np.ndarray, axes: np.ndarray) -> np.ndarray:
    """New axes of size 1, numbered in the result."""
    return np.expand_dims(x, tuple(int(axis) for axis in axes))


def squeeze(x: np.ndarray, axes: np.ndarray | None = None) -> np.ndarray:
    """Without the axes of size 1 (those among `axes`); others stay, as in PyTorch."""
    over = range(x.ndim) if axes is None else [int(axis) % x.ndim for axis in axes]
    return np.squeeze(x, tuple(axis for axis in over if x.shape[axis] == 1))


def concat(values: list[np.ndarray], axis: int, interleave: bool = False) -> np.ndarray:
    """One after the other along an axis, or taking turns element by element."""
    axis = int(axis)
    if not interleave:
        return np.concatenate([np.atleast_1d(value) for value in values], axis)
    stacked = np.stack(values, axis % values[0].ndim + 1)
    sizes = list(values[0].shape)
    sizes[axis] *= len(values)
    return stacked.reshape(sizes)


def split(
    x: np.ndarray, axis: int, num_splits: int | None = None, split_sizes: np.ndarray | None = None
) -> tuple[np.ndarray, ...]:
    """Parts of given sizes, or so many equal ones."""
    if split_sizes is None:
        if num_splits is None:
            raise ValueError("neither num_splits nor split_sizes is given")
        return tuple(np.split(x, int(num_splits), int(axis)))
    if int(np.sum(split_sizes)) != x.shape[int(axis)]:
        raise ValueError(f"the sizes {split_sizes.tolist()} do not make up {x.shape[int(axis)]}")
    return tuple(np.split(x, np.cumsum(split_sizes)[:-1], int(axis)))


def slices(
    begin: np.ndarray,
    end: np.ndarray,
    stride: np.ndarray | None = None,
    begin_mask: np.ndarray | None = None,
    end_mask: np.ndarray | None = None,
    squeeze_mask: np.ndarray | None = None,
) -> tuple[slice | int, ...]:
    """What slice_by_index and slice_update mean, as numpy's index."""
    index: list[slice | int] = []
    for i in range(len(begin)):
        first = None if begin_mask is not None and begin_mask[i] else int(begin[i])
        if squeeze_mask is not None and squeeze_mask[i]:
            index.append(first or 0)
            continue
        last = None if end_mask is not None and end_mask[i] else int(end[i])
        index.append(slice(first, last, 1 if stride is None else int(stride[i])))
    return tuple(index)


def slice_by_size(x: np.ndarray, begin: np.ndarray, size: np.ndarray) -> np.ndarray:
    """From `begin` so many elements of each axis; -1 is all that are left."""
    index = []
    for n, first, count in zip(x.shape, begin, size, strict=True):
        start = int(first) % n if first < 0 else int(first)
        stop = n if count == -1 else start + int(count)
        if stop > n:
            raise ValueError(f"the slice from {start} to {stop} leaves the axis, which has {n}")
        index.append(slice(start, stop))
    return x[tuple(index)]


def slice_update(x: np.ndarray, update: np.ndarray, **where: Any) -> np.ndarray:
    """x with a slice replaced; nothing is broadcast."""
    y, index = x.copy(), slices(**where)
    if y[index].shape != update.shape:
        raise ValueError(f"the slice has shape {y[index].shape}, its update {update.shape}")
    y[index] = update
    return y


def pad(x: np.ndarray, pad: np.ndarray, mode: str = "constant", constant_val: float = 0.0) -> np.ndarray:
    """Elements before and after the last len(pad) / 2 axes."""
    widths = [(0, 0)] * (x.ndim - len(pad) // 2) + [(int(a), int(b)) for a, b in pad.reshape(-1, 2)]
    if mode == "constant":
        return np.pad(x, widths, constant_values=x.dtype.type(constant_val))
    return np.pad(x, widths, mode={"reflect": "reflect", "replicate": "edge"}[mode])  # type: ignore[call-overload]


def fill(shape: np.ndarray, value: np.ndarray) -> np.ndarray:
    """One value everywhere."""
    return np.full([int(size) for size in shape], value)


def range_1d(start: np.ndarray, end: np.ndarray, step: np.ndarray) -> np.ndarray:
    """start, start + step, ... before end, in the dtype of start."""
    count = max(0, math.ceil((end.item() - start.item()) / step.item()))
    return (start + step * np.arange(count)).astype(start.dtype)


def band_part(x: np.ndarray, lower: int = -1, upper: int = -1) -> np.ndarray:
    """So many diagonals below and above the main one (-1: all); 0 elsewhere."""
    below = np.arange(x.shape[-2])[:, None] - np.arange(x.shape[-1])
    kept = ((lower < 0) | (below <= lower)) & ((upper < 0) | (-below <= upper))
    return np.where(kept, x, np.zeros((), x.dtype))


OPERATIONS: dict[str, Callable[..., Any]] = {
    "band_part": band_part,
    "concat": concat,
    "expand_dims": expand_dims,
    "fill": fill,
    "fill_like": lambda ref_tensor, value: np.full(ref_tensor.shape, value),
    "pad": pad,
    "range_1d": range_1d,
    "reshape": reshape,
    "reverse": lambda x, axes=None: np.flip(x, None if axes is None else tuple(int(axis) for axis in axes)),
    "shape": lambda x: np.array(x.shape, np.int32),
    "slice_by_index": lambda x, **where: x[slices(**where)],
    "slice_by_size": slice_by_size,
    "slice_update": slice_update,
    "split": split,
    "squeeze": squeeze,
    "stack": lambda values, axis: np.stack(values, int(axis)),
    "tile": lambda x, reps: np.tile(x, [int(n) for n in reps]),
    "transpose": lambda x, perm: np.transpose(x, [int(axis) for axis in perm]),
}
