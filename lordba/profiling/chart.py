"""Bar charts in SVG; colours are classes of page.css, which knows a light and a dark form of each."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from lordba.profiling.operators import GROUPS

WIDTH, LABEL, VALUE, ROW, BAR = 760, 200, 130, 22, 13
PLOT = WIDTH - LABEL - VALUE
STYLES = {
    "base only": "base",
    "dense LoRA fp32": "dense32",
    "dense LoRA fp16": "dense16",
    "LoRDBA": "lordba",
    "LoRDBA program, no adapter": "idle",
}


@dataclass(frozen=True)
class Bar:
    """One bar: a value in %, or None where it is below the noise, and what to write beside it."""

    group: str
    label: str
    value: float | None
    noise: float
    text: str


def style_of(title: str) -> str:
    """The class of a variant."""
    return STYLES.get(title, "other")


def bars(entries: Sequence[Bar]) -> str:
    """Horizontal bars from zero, grouped, with the noise as a line around each end."""
    shown = [entry.value if entry.value is not None else 0.0 for entry in entries]
    ends = [*(value + entry.noise for value, entry in zip(shown, entries, strict=True)), 1.0]
    starts = [*(value - entry.noise for value, entry in zip(shown, entries, strict=True)), 0.0]
    step = _step(max(ends) - min(starts))
    low, high = step * math.floor(min(starts) / step), step * math.ceil(max(ends) / step)

    def x(value: float) -> float:
        return LABEL + PLOT * (value - low) / (high - low)

    parts, y, last = [], 8.0, ""
    for entry, value in zip(entries, shown, strict=True):
        if entry.group != last:
            y += 6 if last else 0
            parts.append(f'<text class="group" x="0" y="{y + 14:.0f}">{escape(entry.group)}</text>')
            y, last = y + ROW, entry.group
        left, right = sorted((x(0), x(value)))
        middle = y + BAR / 2
        name = style_of(entry.label)
        parts.append(f'<text class="label" x="{LABEL - 10}" y="{middle + 4:.1f}">{escape(entry.label)}</text>')
        if entry.value is None:
            left, right = x(-entry.noise), x(entry.noise)
        kind = "hollow" if entry.value is None else "bar"
        parts.append(
            f'<rect class="{kind} {name}" x="{left:.1f}" y="{y:.1f}" width="{max(right - left, 1):.1f}" '
            f'height="{BAR}" rx="2"/>'
        )
        if entry.value is not None:
            ends_at = x(value - entry.noise), x(value + entry.noise)
            parts.append(f'<path class="noise" d="M{ends_at[0]:.1f} {middle:.1f}H{ends_at[1]:.1f}"/>')
        parts.append(f'<text class="value" x="{WIDTH}" y="{middle + 4:.1f}">{escape(entry.text)}</text>')
        y += ROW
    grid = []
    for i in range(round((high - low) / step) + 1):
        at = low + i * step
        kind = "zero" if abs(at) < step / 2 else "grid"
        grid.append(f'<path class="{kind}" d="M{x(at):.1f} 6V{y:.0f}"/>')
        grid.append(f'<text class="tick" x="{x(at):.1f}" y="{y + 14:.0f}">{at:g} %</text>')
    return _svg(y + 20, [*grid, *parts])


def stacks(rows: Sequence[tuple[str, Mapping[str, float]]]) -> str:
    """One bar per row, made of the groups of operators, with the total beside it."""
    longest = max(values["total"] for _, values in rows) or 1.0
    parts = []
    for i, (label, values) in enumerate(rows):
        y, at = 4 + i * ROW, float(LABEL)
        parts.append(f'<text class="label" x="{LABEL - 10}" y="{y + 11}">{escape(label)}</text>')
        for group in GROUPS:
            size = PLOT * max(values[group], 0.0) / longest
            text = f"{group}: {values[group]:.3g} ms"
            parts.append(
                f'<rect class="group-{group}" x="{at:.1f}" y="{y}" width="{size:.1f}" height="{BAR + 1}">'
                f"<title>{escape(text)}</title></rect>"
            )
            at += size
        parts.append(f'<text class="value" x="{WIDTH}" y="{y + 11}">{values["total"]:.3g} ms</text>')
    return _svg(4 + len(rows) * ROW, parts)


def _svg(height: float, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img">{"".join(parts)}</svg>'


def _step(span: float) -> float:
    """A round distance between about six grid lines."""
    power = 10.0 ** math.floor(math.log10(span / 6))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= span / 6)
