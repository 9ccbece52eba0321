"""A profile as one HTML page that needs nothing else: charts in SVG, tables, machine, versions, conditions."""

from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from lordba.profiling import chart
from lordba.profiling.operators import GROUPS
from lordba.profiling.plan import title_of
from lordba.profiling.report import (
    Row,
    milliseconds_text,
    overhead_text,
    phase_name,
    runtime_name,
    sections,
    variants,
)

STYLE = "page.css"
GROUP_MEANINGS = {
    "linears": "the base's matrix products; in ExecuTorch with those of a dense LoRA",
    "adapters": "adapter operators",
    "attention": "scores, cache, rotation",
    "rest": "norms, activations, sums",
    "runtime": "what no operator accounts for: dispatch, delegate calls",
}


def page(record: Mapping[str, Any], title: str = "What an adapter costs") -> str:
    """The page's text."""
    style = (files(__package__) / STYLE).read_text()
    operators = {name: rows for name, rows in sections(record.get("operators", []))}
    body = [f"<h1>{escape(title)}</h1>", _lead(record), _legend(variants(record["rows"]))]
    for name, rows in sections(record["rows"]):
        body += ["<section>", f"<h2>{escape(name)}</h2>", _overheads(rows)]
        if name in operators:
            body.append(_where(operators[name]))
        body += [_table(rows), "</section>"]
    if record.get("memory"):
        body.append(_memory(record["memory"]))
    body.append(_conditions(record))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head>\n<body><main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main></body></html>\n"
    )


def _lead(record: Mapping[str, Any]) -> str:
    models = {f"{row['model']} on {runtime_name(row['target'])}": None for row in record["rows"]}
    device = record["rows"][0]["deviceInfo"]
    return (
        f'<p class="lead">{escape(", ".join(models))}. Measured on {escape(device["device"])}, {escape(device["os"])}. '
        "Bars are medians over the base alone in the same run; the thin line is the noise of the difference. "
        "A hollow bar is a difference below the noise, which is not quoted.</p>"
        + "".join(f'<p class="warning">{escape(note)}</p>' for note in record["conditions"].get("notes", []))
    )


def _legend(names: Sequence[str]) -> str:
    items = [f'<li><i class="key {chart.style_of(name)}"></i>{escape(name)}</li>' for name in names]
    return f'<ul class="legend">{"".join(items)}</ul>'


def _overheads(rows: Sequence[Row]) -> str:
    bars = [
        chart.Bar(phase_name(row), title_of(row), row["overhead_pct"], row["noise_pct"], overhead_text(row))
        for row in rows
        if row["noise_pct"] is not None and row["phase"] in ("prefill", "decode")
    ]
    return _figure("Overhead over the base alone, %", chart.bars(bars)) if bars else ""


def _where(rows: Sequence[Row]) -> str:
    keys = "".join(
        f'<li><i class="key group-{group}"></i>{group} <small>{GROUP_MEANINGS[group]}</small></li>' for group in GROUPS
    )
    charts = []
    for phase in dict.fromkeys(phase_name(row) for row in rows):
        members = [row for row in rows if phase_name(row) == phase]
        charts.append(f"<h4>{escape(phase)}</h4>")
        charts.append(chart.stacks([(title_of(row), row["ms"]) for row in members]))
    head = ["ms per run", "", *GROUPS, "total"]
    cells = [
        [phase_name(row), title_of(row), *(milliseconds_text(row["ms"][group]) for group in (*GROUPS, "total"))]
        for row in rows
    ]
    legend = f'<ul class="legend groups">{keys}</ul>'
    figure = _figure("Where the time goes, ms per run (traced, which itself takes time)", legend + "".join(charts))
    return figure + _details("the same as a table", _html_table(head, cells))


def _table(rows: Sequence[Row]) -> str:
    head = ["", "", "p50, ms", "p90, ms", "p99, ms", "runs", "over the base"]
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
    return _html_table(head, cells)


def _memory(rows: Sequence[Row]) -> str:
    cells = [
        [f"{row['model']}, {runtime_name(row['target'])}", title_of(row), f"{row['peak_bytes'] / 1e6:,.0f} MB"]
        for row in rows
    ]
    note = "<p>The most that loading, prefilling and decoding add to a process which has loaded the runtime.</p>"
    return f"<section><h2>Peak memory</h2>{note}{_html_table(['', '', 'peak'], cells)}</section>"


def _conditions(record: Mapping[str, Any]) -> str:
    device = record["rows"][0]["deviceInfo"]
    entries = {**record["machine"], "memory": f"{device['totalMem'] / 1e9:.1f} GB", **record["conditions"]}
    items = "".join(f"<dt>{escape(str(key))}</dt><dd>{_value(value)}</dd>" for key, value in entries.items() if value)
    return f"<section><h2>Machine and conditions</h2><dl>{items}</dl></section>"


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return escape(", ".join(f"{key} {item}" for key, item in value.items()))
    if isinstance(value, list):
        return "<br>".join(_value(item) for item in value) if _is_prose(value) else escape(", ".join(map(str, value)))
    return escape("yes" if value is True else str(value))


def _is_prose(values: list) -> bool:
    return any(isinstance(value, dict) or " " in str(value) for value in values)


def _figure(caption: str, content: str) -> str:
    return f"<figure><figcaption>{escape(caption)}</figcaption>{content}</figure>"


def _details(summary: str, content: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def _html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows under a header; a first cell that repeats the one above is left empty."""
    lines, last = [], None
    for row in rows:
        first = "" if row[0] == last else escape(row[0])
        rule = ' class="first"' if row[0] != last else ""
        lines.append(f"<tr{rule}><th>{first}</th>" + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:]) + "</tr>")
        last = row[0]
    header = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    return f'<div class="wide"><table><thead><tr>{header}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
