"""Scale codes: how a vector of non-negative channel scales is stored (fp32, fp16, int8 or log4)."""

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from lordba.errors import LordbaError

SMALLEST_FP16 = 2.0**-24
LARGEST_FP16 = 65504.0


class ScaleCode(StrEnum):
    """fp32 and fp16 are plain floats; int8 is linear and log4 logarithmic between a vector's own lo and hi."""

    FP32 = "fp32"
    FP16 = "fp16"
    INT8 = "int8"
    LOG4 = "log4"

    @property
    def is_coded(self) -> bool:
        """True if the stored values are codes that need a range."""
        return self in (ScaleCode.INT8, ScaleCode.LOG4)

    @property
    def dtype(self) -> torch.dtype:
        """Storage dtype of the values."""
        return {ScaleCode.FP32: torch.float32, ScaleCode.FP16: torch.float16}.get(self, torch.uint8)

    def stored_length(self, n: int) -> int:
        """Elements that store n scales: two log4 codes share a byte."""
        return (n + 1) // 2 if self is ScaleCode.LOG4 else n


@dataclass(frozen=True)
class EncodedScales:
    """One scale vector of length n as stored: `values` (codes or floats) and, for codes, `range` = fp16 [lo, hi]."""

    code: ScaleCode
    n: int
    values: Tensor
    range: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Stored bytes, range included."""
        return self.values.nbytes + (0 if self.range is None else self.range.nbytes)


def levels(code: ScaleCode, scale_range: Tensor) -> Tensor:
    """What each code means, in float64 for exactness then float32: [16] for log4, [256] for int8; code 0 is 0."""
    lo, hi = scale_range.to(torch.float64).tolist()
    top = 15 if code is ScaleCode.LOG4 else 255
    step = torch.arange(top, dtype=torch.float64) / (top - 1)
    positive = lo * (hi / lo) ** step if code is ScaleCode.LOG4 else lo + (hi - lo) * step
    return torch.cat([torch.zeros(1, dtype=torch.float64), positive]).to(torch.float32)


def encode_scales(scales: Tensor, code: ScaleCode) -> EncodedScales:
    """Store float scales [n], all finite and >= 0, in the given code; positive scales never become zero."""
    code = ScaleCode(code)
    scales = scales.detach().to("cpu", torch.float64).flatten()
    if not bool(torch.isfinite(scales).all()) or bool((scales < 0).any()):
        raise LordbaError(
            "scales must be finite and not negative (a negative scale belongs into the signs of its row or column)"
        )
    if scales.numel() and code is not ScaleCode.FP32 and scales.max() > LARGEST_FP16:
        raise LordbaError(
            f"scale {scales.max():.3g} is beyond fp16 ({LARGEST_FP16:.0f}), which {code.value} needs; use --scales fp32"
        )
    n = scales.numel()
    if not code.is_coded:
        stored = scales.to(code.dtype)
        if code is ScaleCode.FP16:
            stored = torch.where((stored == 0) & (scales > 0), torch.full_like(stored, SMALLEST_FP16), stored)
        return EncodedScales(code, n, stored)

    positive = scales[scales > 0]
    lo, hi = (positive.min(), positive.max()) if positive.numel() else (torch.tensor(1.0), torch.tensor(1.0))
    scale_range = torch.stack([lo, hi]).clamp_min(SMALLEST_FP16).to(torch.float16)
    meaning = levels(code, scale_range)[1:].to(torch.float64)
    # Nearest level: by ratio for log4 (its error is relative), by difference for int8.
    distance = (lambda t: t.log()) if code is ScaleCode.LOG4 else (lambda t: t)
    edges = (distance(meaning[1:]) + distance(meaning[:-1])) / 2
    floor = SMALLEST_FP16 * 2.0**-100
    codes = 1 + torch.searchsorted(edges, distance(scales.clamp_min(floor)))
    # However fp16 rounded the ends, they are in use: what was decoded encodes to the same codes and range again.
    codes = torch.where(scales == hi, len(meaning), torch.where(scales == lo, 1, codes))
    if meaning[0] == meaning[-1]:
        codes = torch.ones_like(codes)
    codes = torch.where(scales > 0, codes, torch.zeros_like(codes)).to(torch.uint8)
    if code is ScaleCode.LOG4:
        codes = torch.nn.functional.pad(codes, (0, n % 2))
        codes = codes[0::2] | (codes[1::2] << 4)
    return EncodedScales(code, n, codes, scale_range)


def decode_values(code: ScaleCode, values: Tensor, scale_range: Tensor | None, n: int) -> Tensor:
    """Turn stored values back into float32 scales [n]."""
    if not code.is_coded:
        return values.to(torch.float32)
    if scale_range is None:
        raise LordbaError(f"{code.value} scales need their range [lo, hi] to be decoded; none was given")
    if code is ScaleCode.LOG4:
        values = torch.stack([values & 15, values >> 4], dim=-1).flatten()[:n]
    return levels(code, scale_range).to(values.device)[values.long()]


def decode_scales(encoded: EncodedScales) -> Tensor:
    """Turn an encoded vector back into float32 scales [n]."""
    return decode_values(encoded.code, encoded.values, encoded.range, encoded.n)


def check_encoded(encoded: EncodedScales, where: str) -> None:
    """Raise if a vector that was read breaks the format; `where` names file and tensor for the message."""
    code, values = encoded.code, encoded.values
    expected = code.stored_length(encoded.n)
    if values.dtype != code.dtype or values.numel() != expected:
        raise LordbaError(
            f"{where}: {code.value} scales of {encoded.n} channels are {expected} elements of {code.dtype}, "
            f"found {values.numel()} of {values.dtype}; the file does not match its configuration"
        )
    if not code.is_coded:
        if not bool(torch.isfinite(values).all()) or bool((values < 0).any()):
            raise LordbaError(f"{where}: scales must be finite and not negative; write the adapter anew")
        return
    if encoded.range is None or encoded.range.shape != (2,) or encoded.range.dtype != torch.float16:
        raise LordbaError(f"{where}: {code.value} scales need a range tensor, fp16 [2] = (lo, hi), which is missing")
    lo, hi = encoded.range.tolist()
    if not 0 < lo <= hi < float("inf"):
        raise LordbaError(f"{where}: the range must be 0 < lo <= hi and finite, found lo={lo}, hi={hi}")
