"""Two figures: the frontier (what is lost over the bytes), and KL over the error of the update and over rho."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from lordba.files import new_file

from .methods import METHODS
from .report import LABELS, Row, group, groups, tasks

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

STYLE: Any = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "lordba",  # the same figures give the same file
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#eeeeee",
    "axes.axisbelow": True,
    "legend.frameon": False,
}
OURS, OTHERS = "#08519c", "#999999"
LOOKS = {  # marker and colour; filled: converted, open: trained
    "lora": ("s", OTHERS),
    "lora_longer": ("D", OTHERS),
    "lora_whole": ("p", OTHERS),
    "rtn1": ("v", "#d95f0e"),
    "rtn2": ("^", "#d95f0e"),
    "loraquant": ("P", "#7a0177"),
    "svid": ("x", "#41ab5d"),
    "svid_svd": ("+", "#41ab5d"),
    "svid_mixed": ("*", "#41ab5d"),
    "admm": ("o", OURS),
    "admm_ls": ("h", "#6baed6"),
    "admm_qat": ("d", "#e31a1c"),
    "direct": ("X", "#e31a1c"),
    "direct_lowmem": ("*", "#e31a1c"),
}
METRICS = {"loss": "loss, nats per token", "accuracy": "accuracy", "exact_match": "exact match"}
CONVERSIONS = {method.name for method in METHODS if method.how == "converted"}
FRONTIER = [name for name in LOOKS if name not in ("svid_svd", "svid_mixed")]


def draw(rows: Sequence[Row], path: Path) -> None:
    """Write the frontier to `path`, and the other figure beside it as <name>-rho."""
    _frontier(rows, path)
    _over_error(rows, path.with_stem(f"{path.stem}-rho"))


def _frontier(rows: Sequence[Row], path: Path) -> None:
    """Above: conversions' KL to the LoRA over bytes; below: the task's metric over bytes, with the base as a line."""
    columns = tasks(rows)
    with matplotlib.rc_context(STYLE):
        figure, axes = pyplot.subplots(
            2, len(columns), figsize=(3.6 * len(columns) + 1.2, 6.6), layout="constrained", squeeze=False, sharex="col"
        )
        figure.suptitle(
            "What is kept of a LoRA (r=16), over the adapter's bytes; bars: one standard deviation of seeds"
        )
        for (model, task), (above, below) in zip(columns, axes.T, strict=True):
            for method, _, found in groups(rows, model, task):
                if method not in FRONTIER:
                    continue
                if method in CONVERSIONS:
                    _point(above, method, found.mean("bytes"), found, "kl_to_lora", LABELS[method])
                _point(below, method, found.mean("bytes"), found, "value", LABELS[method])
            _base(below, group(rows, model, task, "base", 0).mean("value"))
            for part, metric in ((above, "kl_to_lora"), (below, "value")):
                _line(part, [found for method, _, found in groups(rows, model, task) if method == "admm"], metric)
            below.set_xscale("log")
            _ticks(below.xaxis, size_of)
            above.set_yscale("log")
            _ticks(above.yaxis, "{:g}".format)
            above.set(title=f"{model}\n{task}", ylabel="KL(fp16 LoRA || method), nats")
            metric = next(row["metric"] for row in rows if (row["model"], row["task"]) == (model, task))
            below.set(xlabel="bytes", ylabel=METRICS[metric])
        _legend(figure, axes)
        _save(figure, path)


def _over_error(rows: Sequence[Row], path: Path) -> None:
    """KL over the error of the update, a panel per task; last, over rho, all tasks and the gauges that were rounded."""
    columns = tasks(rows)
    with matplotlib.rc_context(STYLE):
        figure, (axes,) = pyplot.subplots(
            1, len(columns) + 1, figsize=(3.3 * len(columns) + 4.5, 4), layout="constrained", squeeze=False
        )
        figure.suptitle("KL to the fp16 LoRA over the error of the update, and over rho where factors are rounded")
        last = axes[-1]
        for number, ((model, task), part) in enumerate(zip(columns, axes[:-1], strict=True)):
            for method, _, found in groups(rows, model, task):
                if method not in LOOKS or found.mean("error") is None:
                    continue
                marker, color = LOOKS[method]
                kl = [row["kl_to_lora"] for row in found.rows]
                _dots(part, [row["error"] for row in found.rows], kl, marker, color, LABELS[method])
                if method.startswith("svid"):
                    _dots(last, [row["rho"] for row in found.rows], kl, marker, f"C{number}", f"{model}, {task}")
            part.set(title=f"{model}\n{task}", xlabel="relative error of the update", yscale="log")
            _ticks(part.yaxis, "{:g}".format)
        axes[0].set_ylabel("KL(fp16 LoRA || method), nats")
        last.set(title="SVID in up to three gauges", xlabel="rho of the rounded factors, mean", yscale="log")
        _ticks(last.yaxis, "{:g}".format)
        handles, labels = last.get_legend_handles_labels()
        by_task = dict(zip(labels, handles, strict=True))
        last.legend(by_task.values(), by_task.keys(), fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.16))
        _legend(figure, axes[:-1])
        _save(figure, path)


def _dots(axes: Axes, x: Sequence[float], y: Sequence[float], marker: str, color: str, label: str) -> None:
    axes.scatter(x, y, marker=marker, color=color, s=26, linewidths=1, label=label)


def size_of(nbytes: float) -> str:
    """Bytes as a tick says them."""
    return f"{nbytes / 1e6:g} MB" if nbytes >= 1e6 else f"{nbytes / 1e3:g} kB"


def _ticks(axis: Axis, text: Callable[[float], str]) -> None:
    """Ticks at 1, 2 and 5 of every decade, as plain numbers."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))


def _point(axes: Axes, method: str, x: Any, found: Any, key: str, label: str) -> None:
    marker, color = LOOKS[method]
    axes.errorbar(
        [x], [found.mean(key)], yerr=_bars(found, key), fmt=marker, color=color, markersize=5.5, capsize=2,
        elinewidth=0.8, label=label,
    )  # fmt: skip


def _bars(found: Any, key: str) -> list[list[float]]:
    """One standard deviation down and up; on a logarithmic axis not below a tenth of the mean."""
    spread, mean = found.spread(key), found.mean(key)
    return [[min(spread, 0.9 * mean) if key == "kl_to_lora" else spread], [spread]]


def _base(axes: Axes, value: float | None) -> None:
    """The base as a line, or in words where it is so far off that the line would press the methods together."""
    if value is None:
        return
    low, high = axes.get_ylim()
    if low - (high - low) <= value <= high + (high - low):
        axes.axhline(value, color="#555555", linestyle=":", linewidth=1, label=LABELS["base"])
    else:
        at, side = (0.97, "top") if value > high else (0.03, "bottom")
        axes.text(0.97, at, f"base: {value:.3f}", transform=axes.transAxes, ha="right", va=side, color="#555555")


def _line(axes: Axes, found: Sequence[Any], key: str) -> None:
    points = sorted((group.mean("bytes"), group.mean(key)) for group in found)
    if points:
        axes.plot(*zip(*points, strict=True), color=OURS, linewidth=0.8, zorder=1)


def _legend(figure: Any, axes: Any) -> None:
    handles: dict[str, Any] = {}
    for part in axes.flat:
        for handle, label in zip(*part.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles.keys(), loc="outside right center", fontsize=8)


def _save(figure: Any, path: Path) -> None:
    with new_file(path) as temporary:
        date = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(temporary, format=path.suffix.removeprefix("."), dpi=100, metadata=date)
    pyplot.close(figure)
