"""The constants of saved Core ML packages: the weight file, and what constexpr operations decode from codes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mil_programs import mb, save_functions, tensor, types

from lordba.backends.coreml.interpreter import Function, load
from lordba.backends.coreml.values import TensorType
from lordba.backends.coreml.weights import WeightFile

RNG = np.random.default_rng(0)
SUB_BYTE = {
    "uint1": types.np_uint1_dtype,
    "uint2": types.np_uint2_dtype,
    "uint3": types.np_uint3_dtype,
    "uint4": types.np_uint4_dtype,
    "uint6": types.np_uint6_dtype,
    "int4": types.np_int4_dtype,
}


def constant_of(folder: Path, build: Callable[[], Any], ios: int = 18) -> tuple[Function, np.ndarray]:
    """A function that returns one constant, and what it returns."""
    inputs = {"x": tensor(1)}
    path = save_functions(folder / "m.mlpackage", {"main": (inputs, lambda x: mb.mul(x=build(), y=np.float32(1)))}, ios)
    function = load(path).function()
    return function, next(iter(function.run({"x": np.zeros(1, np.float32)}).values()))


@pytest.mark.parametrize("groups", [(1, 1), (6, 1), (1, 2), (3, 2)])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
def test_tables_of_ios_18_decode_to_what_was_stored(tmp_path: Path, bits: int, groups: tuple[int, int]) -> None:
    codes = RNG.integers(0, 1 << bits, (6, 22)).astype(np.uint8)
    lut = RNG.standard_normal((*groups, 1 << bits, 1)).astype(np.float32)
    stored = codes.astype(SUB_BYTE.get(f"uint{bits}", np.uint8))
    function, found = constant_of(tmp_path, lambda: mb.constexpr_lut_to_dense(indices=stored, lut=lut))
    expected = [[lut[i * groups[0] // 6, j * groups[1] // 22, codes[i, j], 0] for j in range(22)] for i in range(6)]
    np.testing.assert_array_equal(found, np.float32(expected))
    (table,) = [one for one in function.constants() if one.op == "constexpr_lut_to_dense"]
    np.testing.assert_array_equal(table.codes["indices"], codes)
    np.testing.assert_array_equal(table.codes["lut"], lut)
    np.testing.assert_array_equal(table.value, found)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_tables_of_vectors_fill_their_axis(tmp_path: Path, axis: int) -> None:
    codes = RNG.integers(0, 4, (2, 3)).astype(np.uint8)
    lut = RNG.standard_normal((1, 1, 4, 3)).astype(np.float32)
    stored = codes.astype(SUB_BYTE["uint2"])
    _, found = constant_of(
        tmp_path, lambda: mb.constexpr_lut_to_dense(indices=stored, lut=lut, vector_axis=np.int32(axis))
    )
    rows = [[lut[0, 0, c] for c in row] for row in codes]
    expected = np.concatenate([np.stack(row, 1) for row in rows], 0) if axis == 0 else np.block(rows)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("ios", [16, 17])
@pytest.mark.parametrize("bits", [1, 2, 4, 6, 8])
def test_packed_tables_of_ios_16_decode_to_what_was_stored(tmp_path: Path, bits: int, ios: int) -> None:
    shape = (3, 5, 7)
    codes = RNG.integers(0, 1 << bits, shape)
    lut = RNG.standard_normal(1 << bits).astype(np.float32)
    packed = 0
    for i, code in enumerate(codes.reshape(-1).tolist()):
        packed |= code << (i * bits)
    data = np.frombuffer(packed.to_bytes(-(-codes.size * bits // 8), "little"), np.uint8)
    function, found = constant_of(
        tmp_path, lambda: mb.constexpr_lut_to_dense(indices=data, lut=lut, shape=np.uint32(shape)), ios
    )
    np.testing.assert_array_equal(found, lut[codes])
    (table,) = [one for one in function.constants() if one.op == "constexpr_lut_to_dense"]
    np.testing.assert_array_equal(table.codes["indices"], data)


@pytest.mark.parametrize("with_offset", [False, True])
@pytest.mark.parametrize("kind", ["int4", "uint4", "int8", "uint8"])
def test_blocks_are_shifted_and_scaled(tmp_path: Path, kind: str, with_offset: bool) -> None:
    low, high = {"int4": (-8, 8), "uint4": (0, 16), "int8": (-128, 128), "uint8": (0, 256)}[kind]
    stored = SUB_BYTE.get(kind) or np.dtype(kind)
    data = RNG.integers(low, high, (6, 64))
    offset = RNG.integers(low, high, (3, 2))
    scale = RNG.uniform(0.1, 1, (3, 2)).astype(np.float32)
    more = {"offset": offset.astype(stored)} if with_offset else {}
    function, found = constant_of(
        tmp_path, lambda: mb.constexpr_blockwise_shift_scale(data=data.astype(stored), scale=scale, **more)
    )
    expected = np.empty((6, 64), np.float32)
    for i, j in np.ndindex(6, 64):
        block = (i // 2, j // 32)
        expected[i, j] = scale[block] * np.float32(data[i, j] - (offset[block] if with_offset else 0))
    np.testing.assert_array_equal(found, expected)
    (one,) = [one for one in function.constants() if one.op == "constexpr_blockwise_shift_scale"]
    np.testing.assert_array_equal(one.codes["data"], data)


def test_signs_scaled_by_rows_are_a_chain_of_constants(tmp_path: Path) -> None:
    bits = RNG.integers(0, 2, (5, 9)).astype(np.uint8)
    scale = RNG.uniform(1, 2, (5, 1)).astype(np.float32)
    lut = np.float32([-1, 1]).reshape(1, 1, 2, 1)

    def build() -> Any:
        signs = mb.constexpr_lut_to_dense(indices=bits.astype(SUB_BYTE["uint1"]), lut=lut)
        return mb.constexpr_blockwise_shift_scale(data=signs, scale=scale)

    _, found = constant_of(tmp_path, build)
    np.testing.assert_array_equal(found, (bits * 2.0 - 1) * scale)


def test_affine_and_cast_constants(tmp_path: Path) -> None:
    data = RNG.integers(-128, 128, (3, 4)).astype(np.int8)
    zero = RNG.integers(-128, 128, 4).astype(np.int8)
    scale = RNG.uniform(0.1, 1, 4).astype(np.float32)
    _, found = constant_of(
        tmp_path,
        lambda: mb.constexpr_affine_dequantize(quantized_data=data, zero_point=zero, scale=scale, axis=np.int32(1)),
        ios=16,
    )
    np.testing.assert_allclose(found, scale * (data.astype(np.float32) - zero), rtol=1e-6)
    half = RNG.standard_normal(20).astype(np.float16)
    _, found = constant_of(tmp_path, lambda: mb.constexpr_cast(source_val=half, output_dtype="fp32"), ios=16)
    np.testing.assert_array_equal(found, half.astype(np.float32))


def test_weights_are_read_as_coremltools_wrote_them(tmp_path: Path) -> None:
    from coremltools.libmilstoragepython import _BlobStorageWriter

    def numbers(low: int, high: int, dtype: Any) -> np.ndarray:
        return RNG.integers(low, high, (3, 37)).astype(dtype)

    written = {
        "FLOAT32": RNG.standard_normal((3, 37)).astype(np.float32),
        "FLOAT16": RNG.standard_normal((3, 37)).astype(np.float16),
        "INT8": numbers(-128, 128, np.int8),
        "UINT8": numbers(0, 256, np.uint8),
        "INT16": numbers(-(1 << 15), 1 << 15, np.int16),
        "UINT16": numbers(0, 1 << 16, np.uint16),
        "INT32": numbers(-(1 << 31), 1 << 31, np.int32),
        "UINT32": numbers(0, 1 << 32, np.uint32),
    }
    packed = {f"UINT{bits}": numbers(0, 1 << bits, np.uint8) for bits in (1, 2, 3, 4, 6)}
    packed["INT4"] = numbers(-8, 8, np.int8)
    writer, offsets = _BlobStorageWriter(str(tmp_path / "weight.bin")), {}
    for element, values in (written | packed).items():
        name = {"FLOAT32": "float", "FLOAT16": "fp16"}.get(element, element.lower())
        data = values.reshape(-1).view(np.uint16) if element == "FLOAT16" else values.reshape(-1)
        offsets[element] = getattr(writer, f"write_{name}_data")(data.astype(SUB_BYTE.get(element.lower(), data.dtype)))
    del writer
    file = WeightFile(tmp_path / "weight.bin")
    for element, values in (written | packed).items():
        read = file.read(offsets[element], TensorType(element, (3, 37)))
        assert read.dtype == values.dtype
        np.testing.assert_array_equal(read, values)
