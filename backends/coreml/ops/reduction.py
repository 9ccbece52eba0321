"""Operations along axes: sums and their like, softmax, norms, cumulative sums."""

from collections.abc import Callable
from typing import Any

import numpy as np

from lordba.backends.coreml.ops.elementwise import cast


def reduced(function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """A reduction over `axes` (all, if there are none given) of numpy's function(x, axis=, keepdims=)."""

    def reduce(x: np.ndarray, axes: np.ndarray | None = None, keep_dims: bool = False) -> np.ndarray:
        axis = None if axes is None else tuple(int(a) for a in axes)
        return np.asarray(function(x, axis=axis, keepdims=bool(keep_dims))).astype(x.dtype)

    return reduce


def log_sum_exp(x: np.ndarray, axis: tuple[int, ...] | None, keepdims: bool) -> np.ndarray:
    """log(sum(exp(x))), without overflow."""
    largest = np.max(x, axis=axis, keepdims=True)
    total = np.log(np.sum(np.exp(x - largest), axis=axis, keepdims=keepdims))
    return total + largest.reshape(np.shape(total))


def argument(function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """The index of an extreme along one axis."""

    def reduce(x: np.ndarray, axis: int = -1, keep_dims: bool = False, output_dtype: str = "int32") -> np.ndarray:
        return cast(function(x, axis=int(axis), keepdims=bool(keep_dims)), output_dtype)

    return reduce


def softmax(x: np.ndarray, axis: int = -1) -> np.ndarray:
    """exp(x) / sum(exp(x)), without overflow."""
    e = np.exp(x - x.max(int(axis), keepdims=True))
    return e / e.sum(int(axis), keepdims=True)


def layer_norm(
    x: np.ndarray,
    axes: np.ndarray | None = None,
    gamma: np.ndarray | None = None,
    beta: np.ndarray | None = None,
    epsilon: float = 1e-5,
) -> np.ndarray:
    """(x - mean) / sqrt(variance + epsilon) * gamma + beta over `axes`, which gamma and beta have the sizes of."""
    over = tuple(range(x.ndim)) if axes is None else tuple(int(a) % x.ndim for a in axes)
    sizes = [n if i in over else 1 for i, n in enumerate(x.shape)]
    centred = x - x.mean(over, keepdims=True)
    y = centred / np.sqrt(np.square(centred).mean(over, keepdims=True) + np.float32(epsilon))
    if gamma is not None:
        y = y * gamma.reshape(sizes)
    return y if beta is None else y + beta.reshape(sizes)


def cumsum(x: np.ndarray, axis: int = 0, exclusive: bool = False, reverse: bool = False) -> np.ndarray:
    """Sums of what came before, the element itself included unless `exclusive`; from the end if `reverse`."""
    axis = int(axis)
    y = np.flip(x, axis) if reverse else x
    total = np.cumsum(y, axis, dtype=x.dtype)
    if exclusive:
        total = total - y
    return np.flip(total, axis) if reverse else total


OPERATIONS: dict[str, Callable[..., Any]] = {
    "cumsum": cumsum,
    "layer_norm": layer_norm,
    "reduce_argmax": argument(np.argmax),
    "reduce_argmin": argument(np.argmin),
    "reduce_l2_norm": reduced(lambda x, **over: np.sqrt(np.sum(np.square(x), **over))),
    "reduce_log_sum_exp": reduced(log_sum_exp),
    "reduce_max": reduced(np.max),
    "reduce_mean": reduced(np.mean),
    "reduce_min": reduced(np.min),
    "reduce_prod": reduced(np.prod),
    "reduce_sum": reduced(np.sum),
    "reduce_sum_square": reduced(lambda x, **over: np.sum(np.square(x), **over)),
    "softmax": softmax,
}
