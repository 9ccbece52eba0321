"""Sign bits and scale codes against formulas written out in numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lordba.errors import LordbaError
from lordba.scales import EncodedScales, ScaleCode, check_encoded, decode_scales, encode_scales
from lordba.signs import has_clean_padding, pack_signs, packed_width, unpack_signs

matrices = st.tuples(st.integers(1, 9), st.integers(1, 40), st.integers(0, 2**31))
# Positive scales over six decades with some zeros among them, as pruned channels leave them.
vectors = st.lists(st.one_of(st.just(0.0), st.floats(1e-3, 1e3)), min_size=1, max_size=70)


def random_matrix(rows: int, columns: int, seed: int) -> np.ndarray:
    matrix = np.random.default_rng(seed).standard_normal((rows, columns))
    matrix[np.abs(matrix) < 0.2] = 0.0
    return matrix


@given(matrices)
@settings(max_examples=60, deadline=None)
def test_signs_are_numpys_little_endian_bits_and_come_back(case):
    matrix = random_matrix(*case)
    packed = pack_signs(torch.from_numpy(matrix))
    assert np.array_equal(packed.numpy(), np.packbits(matrix < 0, axis=1, bitorder="little"))
    assert packed.shape[1] == packed_width(matrix.shape[1])
    assert np.array_equal(unpack_signs(packed, matrix.shape[1]).numpy(), np.where(matrix < 0, -1, 1))
    assert has_clean_padding(packed, matrix.shape[1])


def test_zero_is_positive_and_nan_has_no_sign():
    assert pack_signs(torch.tensor([[0.0, -0.0, -1e-38, 1.0]])).tolist() == [[0b0100]]
    with pytest.raises(LordbaError, match="NaN"):
        pack_signs(torch.tensor([[1.0, float("nan")]]))


def test_a_padding_bit_is_noticed():
    packed = pack_signs(torch.ones(3, 13))
    assert has_clean_padding(packed, 13)
    packed[1, 1] |= 1 << 5  # column 13, the first that is none
    assert not has_clean_padding(packed, 13)


@pytest.mark.parametrize("code", ScaleCode)
@given(vector=vectors)
@settings(max_examples=60, deadline=None)
def test_scales_come_back_within_half_a_step(code, vector):
    scales = np.array(vector)
    encoded = encode_scales(torch.tensor(vector, dtype=torch.float64), code)
    decoded = decode_scales(encoded).double().numpy()
    assert encoded.nbytes == {"fp32": 4, "fp16": 2, "int8": 1, "log4": 0.5}[code] * (
        len(vector) + (len(vector) % 2 if code is ScaleCode.LOG4 else 0)
    ) + (4 if code.is_coded else 0)
    assert np.array_equal(decoded == 0, scales == 0)
    positive = scales > 0
    if not positive.any():
        return
    scales, decoded = scales[positive], decoded[positive]
    lo, hi = scales.min(), scales.max()
    fp16 = 2.0**-11  # relative rounding of a range or value in fp16
    if code is ScaleCode.LOG4:
        assert np.all(np.abs(np.log(decoded / scales)) <= np.log(hi / lo) / 28 + 2.1 * fp16)
    elif code is ScaleCode.INT8:
        assert np.all(np.abs(decoded - scales) <= (hi - lo) / 508 + 1.1 * fp16 * hi)
    else:
        assert np.all(np.abs(decoded / scales - 1) <= (fp16 if code is ScaleCode.FP16 else 2.0**-24))


@pytest.mark.parametrize("code", ScaleCode)
@given(vector=vectors)
@settings(max_examples=60, deadline=None)
def test_what_a_code_holds_it_holds_again(code, vector):
    once = encode_scales(torch.tensor(vector, dtype=torch.float64), code)
    again = encode_scales(decode_scales(once), code)
    assert torch.equal(once.values, again.values)
    assert (once.range is None and again.range is None) or torch.equal(once.range, again.range)


@pytest.mark.parametrize("code", ScaleCode)
@pytest.mark.parametrize("vector", [[0.0, 0.0], [0.5], [0.25] * 5, [1e-9, 0.0, 1.0]], ids=str)
def test_degenerate_vectors(code, vector):
    decoded = decode_scales(encode_scales(torch.tensor(vector), code))
    assert torch.equal(decoded > 0, torch.tensor(vector) > 0)
    torch.testing.assert_close(decoded, torch.tensor(vector), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("bad", [-0.5, float("nan"), float("inf")])
@pytest.mark.parametrize("code", ScaleCode)
def test_scales_must_be_finite_and_not_negative(code, bad):
    with pytest.raises(LordbaError, match="finite and not negative"):
        encode_scales(torch.tensor([1.0, bad]), code)


@pytest.mark.parametrize("code", [ScaleCode.FP16, ScaleCode.INT8, ScaleCode.LOG4])
def test_a_scale_beyond_fp16_names_the_way_out(code):
    with pytest.raises(LordbaError, match="--scales fp32"):
        encode_scales(torch.tensor([1.0, 1e6]), code)


def test_encoded_scales_are_checked():
    good = encode_scales(torch.tensor([0.1, 0.2, 0.3]), ScaleCode.LOG4)
    check_encoded(good, "here")
    for values, scale_range, complaint in (
        (good.values[:1], good.range, "2 elements"),
        (good.values.int(), good.range, "torch.int32"),
        (good.values, None, "range"),
        (good.values, torch.tensor([0.0, 1.0], dtype=torch.float16), "lo=0"),
        (good.values, torch.tensor([2.0, 1.0], dtype=torch.float16), "lo=2"),
        (good.values, torch.tensor([1.0, float("inf")], dtype=torch.float16), "hi=inf"),
        (good.values, torch.tensor([float("nan"), 1.0], dtype=torch.float16), "lo=nan"),
    ):
        with pytest.raises(LordbaError, match=f"here.*{complaint}"):
            check_encoded(EncodedScales(ScaleCode.LOG4, 3, values, scale_range), "here")
