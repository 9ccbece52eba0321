"""The plot of the kernel benchmark: decode hot and cold, speed-up over the number of tokens, and the roof."""

from pathlib import Path
from typing import Any

import matplotlib

from lordba.files import new_file

from .report import LABELS, Rows

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

COLORS = {8: "#9ecae1", 16: "#4292c6", 32: "#08519c", 64: "#08264d"}  # darker: higher rank
DENSE_COLOR = "#bbbbbb"
STYLE: Any = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "lordba",  # the same figures give the same file
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.constrained_layout.h_pad": 0.12,
    "figure.constrained_layout.w_pad": 0.1,
}


def plot(report: dict[str, Any], path: Path) -> None:
    """Draw the width nearest to 4096 that was measured, one thread."""
    rows = Rows(report)
    widths = {row["d_in"] for row in rows.all}
    if not widths:
        return
    d = min(widths, key=lambda width: abs(width - 4096))
    with matplotlib.rc_context(STYLE):
        figure, ((hot, cold), (many, roof)) = pyplot.subplots(2, 2, figsize=(11, 7.6), layout="constrained")
        figure.suptitle(
            f"Packed sign kernels against dense LoRA: d = {d}, fp32, one thread, {rows.isa}", fontsize=12, weight="bold"
        )
        draw_decode(hot, rows, d, "hot")
        draw_decode(cold, rows, d, "cold")
        draw_tokens(many, rows, d)
        draw_roof(roof, rows, d)
        with new_file(path) as temporary:
            figure.savefig(temporary, format=path.suffix.removeprefix(".") or "svg", dpi=110, metadata=undated(path))
        pyplot.close(figure)


def undated(path: Path) -> dict[str, None] | None:
    """No date in the file, where the format would have one."""
    return {"Date": None} if path.suffix == ".svg" else None


def draw_decode(axes: Axes, rows: Rows, d: int, cache: str) -> None:
    """Bars: how many times faster one token is, by baseline and rank."""
    found = {
        (row["baseline"], row["r"]): row["ratio"]
        for row in rows.where(T=1, d_in=d, dtype="fp32", threads=1, cache=cache)
    }
    names = [name for name in LABELS if any(name == baseline for baseline, _ in found)]
    ranks = sorted({r for _, r in found})
    width = 0.82 / max(1, len(ranks))
    for i, r in enumerate(ranks):
        heights = [found.get((name, r), 0.0) for name in names]
        places = [k + (i - (len(ranks) - 1) / 2) * width for k in range(len(names))]
        bars = axes.bar(places, heights, 0.92 * width, color=COLORS.get(r), label=f"r = {r}")
        axes.bar_label(bars, [f"{h:.1f}" for h in heights], fontsize=6.5, padding=1)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(names)), [LABELS[name] for name in names])
    where = "weights in the caches" if cache == "hot" else "weights in memory"
    axes.set_title(f"Decode (T = 1), {cache}: {where}", loc="left")
    axes.set_ylabel("times faster than")
    axes.legend(ncols=len(ranks) or 1, fontsize=8, loc="upper right")
    axes.margins(y=0.18)


def draw_tokens(axes: Axes, rows: Rows, d: int) -> None:
    """Lines: how many times faster than torch and ONNX Runtime, by tokens and rank."""
    tokens = sorted({row["T"] for row in rows.all})
    for baseline, style in (("torch_fp32", "-"), ("ort_fp32", "--")):
        found = rows.where(d_in=d, dtype="fp32", threads=1, cache="hot", baseline=baseline)
        for r in sorted({row["r"] for row in found}):
            points = sorted((row["T"], row["ratio"]) for row in found if row["r"] == r)
            axes.plot(*zip(*points, strict=True), style, marker="o", markersize=3.5, color=COLORS.get(r))
        axes.plot([], [], style, color="#555555", label=LABELS[baseline])
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xticks(tokens, [str(t) for t in tokens])
    axes.minorticks_off()
    axes.set_title("By tokens, hot", loc="left")
    axes.set_xlabel("tokens T")
    axes.set_ylabel("times faster than")
    axes.legend(fontsize=8, loc="upper right")


def draw_roof(axes: Axes, rows: Rows, d: int) -> None:
    """Lines: signed additions, or the dense LoRA's multiply-adds, per second over what FMA units can do."""
    tokens = sorted({row["T"] for row in rows.all})
    found = rows.where(d_in=d, dtype="fp32", threads=1, cache="hot", baseline="c_fp32")
    for r in sorted({row["r"] for row in found}):
        points = sorted((row["T"], row["ours_of_fma_roof"]) for row in found if row["r"] == r)
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3.5, color=COLORS.get(r), label=f"ours, r = {r}")
        dense = sorted((row["T"], row["baseline_of_fma_roof"]) for row in found if row["r"] == r)
        axes.plot(*zip(*dense, strict=True), color=DENSE_COLOR, marker=".", markersize=4)
    axes.plot([], [], color=DENSE_COLOR, marker=".", markersize=4, label="C fp32, each r")
    axes.axhline(1, color="black", linewidth=0.8, label="all FMA units busy")
    axes.set_xscale("log", base=2)
    axes.set_xticks(tokens, [str(t) for t in tokens])
    axes.minorticks_off()
    axes.set_ylim(0, 1.35 * axes.get_ylim()[1])  # room for the legend
    axes.set_title("Signed additions, or multiply-adds of the dense LoRA, hot", loc="left")
    axes.set_xlabel("tokens T")
    axes.set_ylabel("work per second over the FMA roof")
    axes.legend(fontsize=8, ncols=3, loc="upper left")
