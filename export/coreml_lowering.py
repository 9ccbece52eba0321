"""How our operators become MIL, Core ML's intermediate language, so that signs, scales and codes stay codes.

Importing this module registers them with coremltools, for its own converter and for ExecuTorch's Core ML partitioner.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil._deployment_compatibility import AvailableTarget
from coremltools.converters.mil.frontend.torch import register_torch_op
from coremltools.converters.mil.frontend.torch.ops import _get_inputs, _get_kwinputs
from coremltools.converters.mil.mil import types
from coremltools.converters.mil.mil.block import curr_opset_version

from lordba.errors import LordbaError
from lordba.scales import ScaleCode, levels

_sign_storage = "lut1"


@contextlib.contextmanager
def sign_storage(storage: str) -> Iterator[None]:
    """Within, how signs are stored: `lut1` one bit each, or one int8 or fp16 each."""
    global _sign_storage
    before, _sign_storage = _sign_storage, storage
    try:
        yield
    finally:
        _sign_storage = before


def register(name: str) -> Any:
    """Register a MIL translation of lordba::name under both spellings that coremltools looks up."""
    return register_torch_op(torch_alias=[f"lordba::{name}", f"lordba.{name}"], override=True)


def has_ios18() -> bool:
    return curr_opset_version() >= AvailableTarget.iOS18


def constant_name(variable: Any) -> str:
    """The name that a decoded constant has in the package: its buffer's, after exported programs' prefix "b_"."""
    name: str = variable.name
    return name.removeprefix("b_") + "_decoded"


def value(variable: Any, what: str) -> np.ndarray:
    """The array behind a constant."""
    if variable is None or variable.val is None:
        raise LordbaError(f"{what} must be a constant of the program; this is a fault of the export, please report it")
    return np.asarray(variable.val)


def sign_matrix(packed: np.ndarray, columns: int, name: str) -> Any:
    """Packed signs [n, ceil(columns/8)] as a MIL constant [n, columns] of +1 and -1; bit 1 is -1."""
    bits = np.unpackbits(packed, axis=1, bitorder="little")[:, :columns]
    signs = 1 - 2 * bits.astype(np.int8)
    if _sign_storage == "fp16":
        return mb.const(val=signs.astype(np.float32), name=name)
    if _sign_storage == "int8" and has_ios18():
        return mb.constexpr_blockwise_shift_scale(data=signs, scale=np.ones((1, 1), np.float32), name=name)
    if _sign_storage == "int8":
        return mb.constexpr_affine_dequantize(
            quantized_data=signs, zero_point=np.int8(0), scale=np.float32(1), axis=np.int32(0), name=name
        )
    plus_minus = np.array([1, -1], np.float32)
    if has_ios18():
        indices = bits.astype(types.np_uint1_dtype)
        return mb.constexpr_lut_to_dense(indices=indices, lut=plus_minus.reshape(1, 1, 2, 1), name=name)
    flat = np.packbits(bits.reshape(-1), bitorder="little")
    return mb.constexpr_lut_to_dense(indices=flat, lut=plus_minus, shape=np.array(bits.shape, np.uint32), name=name)


@register("sign_adapter")
def sign_adapter(context: Any, node: Any) -> None:
    """Scales are multiplied at run time: scaled palettes are reported to fail on some systems (docs/coreml.md)."""
    x, a_signs, b_signs, s_in, s_mid, s_out, *_ = _get_inputs(context, node, min_expected=6)
    a = sign_matrix(value(a_signs, "an adapter's signs"), s_in.shape[0], constant_name(a_signs))
    b = sign_matrix(value(b_signs, "an adapter's signs"), s_mid.shape[0], constant_name(b_signs))
    h = mb.linear(x=mb.mul(x=x, y=s_in), weight=a)
    y = mb.linear(x=mb.mul(x=h, y=s_mid), weight=b)
    context.add(mb.mul(x=y, y=s_out, name=node.name), torch_name=node.name)


@register("scale_table")
def scale_table(context: Any, node: Any) -> None:
    """Codes with a palette of 16 levels per vector, which needs iOS 18."""
    codes, ranges, _ = _get_inputs(context, node, expected=3)
    indices, bounds = value(codes, "scale codes"), value(ranges, "scale ranges")
    palettes = np.stack([levels(ScaleCode.LOG4, torch.from_numpy(np.array(row))).numpy() for row in bounds])
    table = mb.constexpr_lut_to_dense(
        indices=indices.astype(types.np_uint4_dtype), lut=palettes.reshape(-1, 16, 1), name=constant_name(codes)
    )
    context.add(table, torch_name=node.name)


def dequantized(codes: np.ndarray, scale: np.ndarray, offset: np.ndarray | None, name: str) -> Any:
    """Codes [n, k] with scales (and offsets) [n, blocks] as a MIL constant, scale * (code - offset)."""
    if not has_ios18():  # one scale per row, and codes of 8 bit: ExportOptions.ios sees to it
        return mb.constexpr_affine_dequantize(
            quantized_data=codes, zero_point=np.int8(0), scale=scale[:, 0], axis=np.int32(0), name=name
        )
    if codes.dtype == np.uint8:
        return mb.constexpr_blockwise_shift_scale(
            data=codes.astype(types.np_uint4_dtype), scale=scale, offset=offset, name=name
        )
    return mb.constexpr_blockwise_shift_scale(data=codes, scale=scale, name=name)


@register("block_linear")
def block_linear(context: Any, node: Any) -> None:
    x, codes, scale, offset, bias = _get_inputs(context, node, expected=5)
    shift = None if offset is None else value(offset, "a weight's offset")
    weight = dequantized(value(codes, "a weight"), value(scale, "a weight's scale"), shift, f"{node.name}_w")
    context.add(mb.linear(x=x, weight=weight, bias=bias, name=node.name))


@register("row_embedding")
def row_embedding(context: Any, node: Any) -> None:
    tokens, codes, scale = _get_inputs(context, node, expected=3)
    rows = dequantized(value(codes, "the embedding"), value(scale, "its scale"), None, f"{node.name}_w")
    context.add(mb.gather(x=rows, indices=tokens, axis=0, name=node.name))


@register("update_cache")
def update_cache(context: Any, node: Any) -> None:
    cache, new, start = _get_inputs(context, node, expected=3)
    new = mb.cast(x=new, dtype=types.builtin_to_string(cache.dtype))
    end = mb.add(x=start, y=mb.slice_by_index(x=mb.shape(x=new), begin=[2], end=[3]))
    zero = np.array([0], np.int32)
    whole = [True, True, False, True]
    updated = mb.slice_update(
        x=cache,
        update=new,
        begin=mb.concat(values=[zero, zero, start, zero], axis=0),
        end=mb.concat(values=[zero, zero, end, zero], axis=0),
        begin_mask=whole,
        end_mask=whole,
        name=node.name,
    )
    context.add(updated)


@register_torch_op(override=True)
def alias(context: Any, node: Any) -> None:
    """coremltools 9.0 lacks aten.alias, which torch 2.13 leaves in exported programs."""
    context.add(mb.identity(x=_get_inputs(context, node, min_expected=1)[0], name=node.name))


@register_torch_op(override=True)
def gelu(context: Any, node: Any) -> None:
    """coremltools 9.0 overlooks `approximate`, a keyword in exported programs, and takes the exact form for tanh's."""
    x, *positional = _get_inputs(context, node, min_expected=1)
    (approximate,) = _get_kwinputs(context, node, "approximate", default=positional or ["none"])
    form = getattr(approximate, "val", approximate)
    context.add(mb.gelu(x=x, mode="TANH_APPROXIMATION" if form == "tanh" else "EXACT", name=node.name))
