"""A profile in the terminal: tables of what was measured and bars of what it costs over the base."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from lordba.console import table
from lordba.profiling.operators import GROUPS
from lordba.profiling.plan import title_of

Row = Mapping[str, Any]
BAR_WIDTH = 40
COLOURS = {"lordba": "green", "dense_lora": "yellow"}


def sections(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    """Rows by what may be compared, with a title: one runtime, model and number of threads."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        quant = row.get("base_quant") or row["benchmarkModel"]["quantization"]
        groups.setdefault((row["target"], row["model"], quant, row["threads"]), []).append(row)
    for (target, model, quant, threads), members in groups.items():
        yield f"{model}, {quant}, {runtime_name(target)}, {threads} thread{'s' * (threads > 1)}", members


def runtime_name(target: str) -> str:
    return {"executorch": "ExecuTorch", "onnx": "ONNX Runtime", "coreml": "Core ML"}.get(target, target)


def phase_name(row: Row) -> str:
    """What was measured, in words."""
    if row["phase"] == "prefill":
        return f"prefill of {row['T']}"
    return "decode, per token" if row["phase"] == "decode" else str(row["phase"])


def variants(rows: Sequence[Row]) -> list[str]:
    """The variants' titles in the order of the rows; swaps come before a base that has none."""
    return list(dict.fromkeys(title_of(row) for row in rows if row["phase"] != "swap"))


def overhead_text(row: Row) -> str:
    """The overhead with its noise; below the noise only the noise is said."""
    if row["noise_pct"] is None:
        return ""
    if row["overhead_pct"] is None:
        return f"within ±{row['noise_pct']:.1f} %"
    return f"{row['overhead_pct']:+.1f} ±{row['noise_pct']:.1f} %"


def milliseconds_text(value: float) -> str:
    return f"{value:.{3 if value < 1 else 2 if value < 100 else 0}f}"


def profile_report(record: Mapping[str, Any]) -> RenderableType:
    """Everything that a terminal shows of a profile."""
    parts: list[RenderableType] = []
    for title, rows in sections(record["rows"]):
        columns = ["ms", "", "p50", "p90", "p99", "runs", "over the base"]
        cells = [
            [
                phase_name(row),
                title_of(row),
                *(milliseconds_text(row[key]) for key in ("ms_p50", "ms_p90", "ms_p99")),
                str(row["samples"]),
                overhead_text(row),
            ]
            for row in rows
        ]
        parts += [table(title, columns, cells), bars(rows)]
    for title, rows in sections(record.get("operators", [])):
        parts.append(table(f"where the time goes: {title}", ["ms per run", "", *GROUPS, "total"], operator_cells(rows)))
    counts = record.get("instructions", [])
    if counts:
        cells = [[phase_name(row), title_of(row), f"{row['instructions']:,}"] for row in counts]
        parts.append(table("executed instructions of one step, which is no time", ["", "", "instructions"], cells))
    parts += [Text(f"note: {note}", "yellow") for note in record["conditions"].get("notes", [])]
    memory = record.get("memory", [])
    if memory:
        cells = [[title_of(row), f"{row['peak_bytes'] / 1e6:,.0f} MB"] for row in memory]
        parts.append(table("peak memory beyond the loaded runtime", ["", "peak"], cells))
    return Group(*parts)


def operator_cells(rows: Sequence[Row]) -> list[list[str]]:
    return [
        [phase_name(row), title_of(row), *(milliseconds_text(row["ms"][group]) for group in (*GROUPS, "total"))]
        for row in rows
    ]


def bars(rows: Sequence[Row]) -> RenderableType:
    """A bar per overhead in %, over the same base; hollow where it is below the noise."""
    compared = [row for row in rows if row["noise_pct"] is not None and row["phase"] in ("prefill", "decode")]
    if not compared:
        return Text()
    width = max(max(abs(row["overhead_pct"] or 0), row["noise_pct"]) for row in compared) or 1
    label = max(len(title_of(row)) for row in compared)
    text = Text()
    last = ""
    for row in compared:
        if phase_name(row) != last:
            last = phase_name(row)
            text.append(f"{last}\n", "bold")
        size = round(
            BAR_WIDTH * abs(row["overhead_pct"] if row["overhead_pct"] is not None else row["noise_pct"]) / width
        )
        bar = "█" * size if row["overhead_pct"] is not None else "░" * size
        text.append(f"  {title_of(row):{label}} ")
        text.append(bar, COLOURS.get(row["adapter"], "") if row["overhead_pct"] is not None else "dim")
        text.append(f" {overhead_text(row)}\n")
    return text
