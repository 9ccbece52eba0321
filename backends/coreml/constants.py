"""Constants of a program: plain ones, and those that constexpr operations decode from codes."""

from collections.abc import Callable
from typing import Any

import numpy as np

from lordba.backends.coreml.values import unpack


def lut_to_dense(
    indices: np.ndarray, lut: np.ndarray, vector_axis: np.ndarray | None = None, shape: np.ndarray | None = None
) -> np.ndarray:
    """constexpr_lut_to_dense: iOS 16 (packed indices [bytes], lut [entries], shape) or iOS 18 (any rank, groups).

    In iOS 18 the table is lut [*groups, entries, vector]; index i along an axis is of group i // (indices // groups).
    """
    if shape is not None:
        sizes = [int(size) for size in shape]
        bits = (len(lut) - 1).bit_length()
        if len(lut) != 1 << bits:
            raise ValueError(f"a table has {len(lut)} entries, which is no power of two")
        codes = indices if bits == 8 else unpack(indices, f"UINT{bits}", int(np.prod(sizes)))
        return lut[codes].reshape(sizes)
    groups = _of_blocks(indices.shape, lut.shape[:-2])
    vectors = lut[(*np.ix_(*groups), indices)]
    if vectors.shape[-1] == 1:
        return vectors[..., 0]
    if vector_axis is None:
        raise ValueError("a table of vectors has no vector_axis")
    axis = int(vector_axis) % indices.ndim
    merged = list(indices.shape)
    merged[axis] *= lut.shape[-1]
    return np.moveaxis(vectors, -1, axis + 1).reshape(merged)


def blockwise_shift_scale(data: np.ndarray, scale: np.ndarray, offset: np.ndarray | None = None) -> np.ndarray:
    """constexpr_blockwise_shift_scale: scale * (data - offset), each [*groups] standing for a block of data."""
    _of_blocks(data.shape, scale.shape)
    blocks = [size for n, groups in zip(data.shape, scale.shape, strict=True) for size in (groups, n // groups)]
    each = [size for groups in scale.shape for size in (groups, 1)]
    values = data.astype(np.float32).reshape(blocks)
    if offset is not None:
        values = values - offset.astype(np.float32).reshape(each)
    return (values * scale.astype(np.float32).reshape(each)).reshape(data.shape)


def affine_dequantize(
    quantized_data: np.ndarray, zero_point: np.ndarray, scale: np.ndarray, axis: np.ndarray
) -> np.ndarray:
    """constexpr_affine_dequantize: scale * (data - zero_point), each a scalar or a vector along `axis`."""
    along = [1] * quantized_data.ndim
    along[int(axis)] = -1
    zero, step = (np.asarray(one, np.float32).reshape(along) for one in (zero_point, scale))
    return step * (quantized_data.astype(np.float32) - zero)


def cast(source_val: np.ndarray, output_dtype: str) -> np.ndarray:
    """constexpr_cast: fp16 to fp32."""
    if output_dtype != "fp32":
        raise ValueError(f"a constant is cast to {output_dtype}, where MIL has only fp32")
    return source_val.astype(np.float32)


DECODERS: dict[str, Callable[..., Any]] = {
    "const": lambda val: val,
    "constexpr_affine_dequantize": affine_dequantize,
    "constexpr_blockwise_shift_scale": blockwise_shift_scale,
    "constexpr_cast": cast,
    "constexpr_lut_to_dense": lut_to_dense,
}


def _of_blocks(shape: tuple[int, ...], groups: tuple[int, ...]) -> list[np.ndarray]:
    """For each axis, which group each index belongs to."""
    if len(shape) != len(groups) or any(g == 0 or n % g for n, g in zip(shape, groups, strict=True)):
        raise ValueError(f"shape {shape} does not divide into groups {groups}")
    return [np.arange(n) // (n // g) if n else np.arange(0) for n, g in zip(shape, groups, strict=True)]
