"""The profile file: the shape of ExecuTorch's benchmark records, plus rank, bits, scale code and phase of the adapter.

Kotlin and Swift write the same file, byte for byte; tests/golden/demo/profile holds it.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lordba.errors import LordbaError

FORMAT_VERSION = 1
NORMAL_MAD = 1.4826
"""A normal distribution's standard deviation over its median absolute deviation."""

ROW_KEYS = (
    "target", "model", "benchmarkModel", "deviceInfo", "adapter", "adapter_name", "scale_code", "rank", "bits",
    "phase", "T", "threads", "samples", "ms_p50", "ms_p90", "ms_p99", "overhead_pct", "noise_pct",
)  # fmt: skip
"""What the readers of this package take from a row."""


@dataclass(frozen=True)
class Device:
    """Where it was measured; memory in bytes."""

    device: str
    arch: str
    os: str
    totalMem: int
    availMem: int


@dataclass(frozen=True)
class Series:
    """The samples of one thing that was measured, in milliseconds, warm-up left out.

    `adapter` is "none", "dense_lora" or "lordba"; `T` the tokens of one run; `bits` those of one adapter weight.
    """

    target: str
    model: str
    base_quant: str
    adapter: str
    phase: str
    T: int
    threads: int
    samples: Sequence[float]
    adapter_name: str | None = None
    rank: int | None = None
    bits: float | None = None
    scale_code: str | None = None

    @property
    def conditions(self) -> tuple[str, str, str, str, int, int]:
        """What two series share that may be compared."""
        return self.target, self.model, self.base_quant, self.phase, self.T, self.threads

    @property
    def independent(self) -> Sequence[float]:
        """What the noise is estimated from."""
        return self.samples


@dataclass(frozen=True)
class BlockSeries(Series):
    """Samples that were taken in blocks, one per round; those of a block share its luck: the noise is the blocks'."""

    blocks: Sequence[Sequence[float]] = ()

    @property
    def independent(self) -> Sequence[float]:
        return [float(np.median(block)) for block in self.blocks]


def overhead(series: Series, base: Series) -> tuple[float | None, float]:
    """How much longer than the base alone, and the noise of that difference, both in % of the base's median.

    The noise is twice the standard error of the medians' difference, from the median absolute deviations; a
    difference below it is not quoted (None).
    """
    median = float(np.median(base.samples))
    noise = 100 * 2 * (_standard_error(series.independent) + _standard_error(base.independent)) / median
    difference = 100 * (float(np.median(series.samples)) / median - 1)
    return (difference if abs(difference) >= noise else None), noise


def rows_of(all_series: Sequence[Series], device: Device) -> list[dict[str, Any]]:
    """One row per series, in their order; overheads are over the series of the same conditions without an adapter."""
    bases = {series.conditions: series for series in all_series if series.adapter == "none"}
    return [_row(series, bases.get(series.conditions), device) for series in all_series]


def profile_json(
    all_series: Sequence[Series],
    device: Device,
    machine: Mapping[str, Any],
    conditions: Mapping[str, Any],
    further: Mapping[str, Any] | None = None,
) -> str:
    """The text of the profile file; `further` are keys beside the rows, such as "memory" and "operators"."""
    record = {
        **(further or {}),
        "format_version": FORMAT_VERSION,
        "machine": dict(machine),
        "conditions": dict(conditions),
        "rows": rows_of(all_series, device),
    }
    return json.dumps(_rounded(record), indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def _row(series: Series, base: Series | None, device: Device) -> dict[str, Any]:
    p50, p90, p99 = (float(p) for p in np.percentile(series.samples, (50, 90, 99)))
    over, noise = (None, None) if base is None or base is series else overhead(series, base)
    return {
        "benchmarkModel": {"name": series.model, "backend": series.target, "quantization": series.base_quant},
        "deviceInfo": vars(device),
        "metric": f"{series.phase}_ms",
        "actualValue": p50,
        "targetValue": 0.0,
        "target": series.target,
        "model": series.model,
        "adapter": series.adapter,
        "adapter_name": series.adapter_name,
        "phase": series.phase,
        "T": series.T,
        "threads": series.threads,
        "samples": len(series.samples),
        "ms_p50": p50,
        "ms_p90": p90,
        "ms_p99": p99,
        "overhead_pct": over,
        "noise_pct": noise,
        "rank": series.rank,
        "bits": series.bits,
        "scale_code": series.scale_code,
    }


def read_profile(path: Path) -> dict[str, Any]:
    """A profile file of this version; raises LordbaError if it is none."""
    try:
        record = json.loads(path.read_text())
        version, rows = record["format_version"], record["rows"]
        missing = {key for row in rows for key in ROW_KEYS if key not in row}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LordbaError(
            f"{path}: is no profile ({error!r}); make one by: python -m lordba.profile ... --json"
        ) from error
    if version != FORMAT_VERSION:
        raise LordbaError(f"{path}: format_version {version!r}, this lordba reads {FORMAT_VERSION}; measure again")
    if missing:
        raise LordbaError(f"{path}: its rows lack {min(missing)}; measure again")
    return record


def _standard_error(samples: Sequence[float]) -> float:
    deviation = float(np.median(np.abs(np.asarray(samples) - np.median(samples))))
    return NORMAL_MAD * deviation / math.sqrt(len(samples))


def _rounded(value: Any) -> Any:
    """Every float with three decimals, as all languages write it alike."""
    if isinstance(value, float):
        return round(value, 3)
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value
