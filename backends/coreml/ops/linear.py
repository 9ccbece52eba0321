"""Products of matrices, and attention."""

from collections.abc import Callable
from typing import Any

import numpy as np

from lordba.backends.coreml.ops.reduction import softmax


def linear(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    """x [..., d_in] by weight [d_out, d_in], and a bias [d_out]."""
    y = x @ weight.T
    return y if bias is None else y + bias


def matmul(x: np.ndarray, y: np.ndarray, transpose_x: bool = False, transpose_y: bool = False) -> np.ndarray:
    """The product of matrices in the last two axes; what is transposed are those."""
    return (np.swapaxes(x, -1, -2) if transpose_x else x) @ (np.swapaxes(y, -1, -2) if transpose_y else y)


def einsum(values: list[np.ndarray], equation: str) -> np.ndarray:
    """Einstein's sum of two arrays."""
    return np.einsum(equation, *values)


def scaled_dot_product_attention(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, attn_mask: np.ndarray | None = None
) -> np.ndarray:
    """softmax(query key^T / sqrt(E) + mask) value; False in a boolean mask leaves an element out."""
    scores = query @ np.swapaxes(key, -1, -2) / np.float32(query.shape[-1] ** 0.5)
    if attn_mask is not None and attn_mask.dtype == np.bool_:
        scores = np.where(attn_mask, scores, np.float32(-np.inf))
    elif attn_mask is not None:
        scores = scores + attn_mask
    return softmax(scores) @ value


OPERATIONS: dict[str, Callable[..., Any]] = {
    "einsum": einsum,
    "linear": linear,
    "matmul": matmul,
    "scaled_dot_product_attention": scaled_dot_product_attention,
}
