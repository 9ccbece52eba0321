"""Two profiles side by side: before and after a change, or one phone and another."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from lordba.console import table
from lordba.errors import LordbaError
from lordba.profiling.plan import title_of
from lordba.profiling.report import milliseconds_text, phase_name, runtime_name

KEY = ("target", "model", "adapter", "adapter_name", "scale_code", "phase", "T", "threads")
NORMAL_P90 = 1.2816
MEDIAN_ERROR = 1.2533
"""A median's standard error over a mean's, of a normal distribution."""


@dataclass(frozen=True)
class Change:
    """One row in both files: `change_pct` from a's median to b's, None where it is below the noise."""

    a: Mapping[str, Any]
    b: Mapping[str, Any]
    change_pct: float | None
    noise_pct: float


def changes(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Change]:
    """What both files measured, in the order of the second; raises LordbaError where that is nothing."""
    before = {_key(row): row for row in a["rows"]}
    found = [_change(before[_key(row)], row) for row in b["rows"] if _key(row) in before]
    if not found:
        raise LordbaError("the two profiles have no row in common: compare the same target, model, phases and threads")
    return found


def changes_table(found: Sequence[Change]) -> Table:
    """The changes as a table."""
    cells = []
    for change in found:
        a, b = change.a, change.b
        quoted = f"{change.change_pct:+.1f} %" if change.change_pct is not None else f"within ±{change.noise_pct:.1f} %"
        what = f"{runtime_name(b['target'])}, {b['threads']}t, {phase_name(b)}"
        over = " → ".join(_overhead(row) for row in (a, b)) if b["noise_pct"] is not None else ""
        cells.append([what, title_of(b), *(milliseconds_text(row["ms_p50"]) for row in (a, b)), quoted, over])
    return table("from A to B", ["", "", "A, ms", "B, ms", "change", "over the base"], cells)


def _overhead(row: Mapping[str, Any]) -> str:
    if row["noise_pct"] is None:
        return "-"
    return f"{row['overhead_pct']:+.1f} %" if row["overhead_pct"] is not None else f"±{row['noise_pct']:.1f} %"


def _change(a: Mapping[str, Any], b: Mapping[str, Any]) -> Change:
    difference = 100 * (b["ms_p50"] / a["ms_p50"] - 1)
    noise = max(2 * (_error_pct(a) + _error_pct(b)), a["noise_pct"] or 0.0, b["noise_pct"] or 0.0)
    return Change(a, b, difference if abs(difference) >= noise else None, noise)


def _error_pct(row: Mapping[str, Any]) -> float:
    """The median's standard error in % of it, from what a file holds of its samples: the upper decile."""
    deviation = (row["ms_p90"] - row["ms_p50"]) / NORMAL_P90
    return 100 * MEDIAN_ERROR * deviation / math.sqrt(row["samples"]) / row["ms_p50"]


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return (*(row[name] for name in KEY), row["benchmarkModel"]["quantization"])
