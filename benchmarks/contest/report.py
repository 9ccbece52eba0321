"""What a report of the kernel benchmark says: tables on the screen and in docs/kernels.md, and the targets met."""

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lordba.console import console, table
from lordba.errors import LordbaError
from lordba.files import new_file

Row = dict[str, Any]
LABELS = {
    "c_fp32": "C fp32",
    "c_fp16w": "C fp16 weights",
    "torch_fp32": "torch fp32",
    "ort_fp32": "ONNX Runtime",
    "xnnpack_fp32": "XNNPACK",
    "torch_bf16": "torch bf16",
}
MARKERS = ("<!-- results of benchmarks/kernels.py -->", "<!-- end of results -->")


@dataclass(frozen=True)
class Sheet:
    """A table: the first columns are labels, the others numbers."""

    title: str
    columns: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """As GitHub reads it."""
        lines = [self.columns, ["---", *["---:"] * (len(self.columns) - 1)], *self.rows]
        return f"**{self.title}**\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines)


@dataclass(frozen=True)
class Target:
    """A promise of a least ratio, and the comparisons that it speaks of."""

    text: str
    least: float
    found: list[tuple[float, str]]  # ratio, where

    @property
    def verdict(self) -> str:
        if not self.found:
            return "not measured"
        return "met" if min(self.found)[0] >= self.least else "missed"


class Rows:
    """The rows of a report, asked by what they compare."""

    def __init__(self, report: dict[str, Any]) -> None:
        self.all: list[Row] = report["rows"]
        self.isa = self.all[0]["isa"] if self.all else ""  # the first is the best

    def where(self, **wanted: object) -> list[Row]:
        """Rows with these values; `isa` is the best one if not given."""
        wanted = {"isa": self.isa, **wanted}
        return [row for row in self.all if all(row[key] == value for key, value in wanted.items())]

    def ratios(self, baseline: str, ranks: Callable[[int], bool], **wanted: object) -> list[tuple[float, str]]:
        """Ratios with where they were found."""
        found = [row for row in self.where(baseline=baseline, **wanted) if ranks(row["r"])]
        return [(row["ratio"], f"d={row['d_in']} r={row['r']} T={row['T']}") for row in found]


def sheets(report: dict[str, Any]) -> list[Sheet]:
    """All tables of a report."""
    rows = Rows(report)
    parts = [decode_sheet(rows, "hot"), decode_sheet(rows, "cold"), prefill_sheet(rows), thread_sheet(rows)]
    return [sheet for sheet in [*parts, roof_sheet(report)] if sheet.rows]


def decode_sheet(rows: Rows, cache: str) -> Sheet:
    """T = 1, one thread: our time, and how many times longer each other takes."""
    others = [name for name in LABELS if name != "torch_bf16"]
    lines = []
    for d, r in shapes(rows.all):
        cell = {"d_in": d, "r": r, "T": 1, "threads": 1, "cache": cache}
        found = {row["baseline"]: row for row in rows.where(dtype="fp32", **cell)}
        if not found:
            continue
        ours = next(iter(found.values()))
        dense = found.get("c_fp32")
        avx2 = rows.where(**{**cell, "isa": "avx2", "dtype": "fp32", "baseline": "c_fp32"})
        size = f"{ours['ours_weight_bytes'] / 1024:.1f} / {dense['baseline_weight_bytes'] / 1024:.0f}" if dense else "-"
        line = [f"{d}", f"{r}", size, f"{ours['ours_us']:.2f}"]
        line += [times(found.get(name)) for name in others]
        lines.append([*line, times(avx2[0]) if avx2 else "-"])
    columns = ["d", "r", "KiB, ours / fp32", f"ours, {rows.isa}, us"]
    columns += [LABELS[name] for name in others] + ["our AVX2 against C fp32"]
    return Sheet(f"Decode (T=1), {cache}, one thread: times faster than", columns, lines)


def prefill_sheet(rows: Rows) -> Sheet:
    """T > 1, hot, one thread."""
    others = [name for name in LABELS if name != "torch_bf16"]
    lines = []
    for d, r in shapes(rows.all):
        for tokens in sorted({row["T"] for row in rows.all if row["T"] > 1}):
            cell = {"d_in": d, "r": r, "T": tokens, "threads": 1, "cache": "hot"}
            found = {row["baseline"]: row for row in rows.where(dtype="fp32", **cell)}
            if not found:
                continue
            ours = next(iter(found.values()))
            half = rows.where(dtype="bf16", baseline="torch_bf16", **cell)
            line = [f"{d}", f"{r}", f"{tokens}", f"{ours['ours_us']:.1f}", f"{100 * ours['ours_of_fma_roof']:.0f} %"]
            line += [times(found.get(name)) for name in others]
            lines.append([*line, *([f"{half[0]['ours_us']:.1f}", times(half[0])] if half else ["-", "-"])])
    columns = ["d", "r", "T", f"ours, {rows.isa}, us", "of FMA roof", *(LABELS[name] for name in others)]
    return Sheet("Many tokens, hot, one thread: times faster than", [*columns, "ours bf16, us", "torch bf16"], lines)


def thread_sheet(rows: Rows) -> Sheet:
    """How much faster two threads are than one."""
    tokens = sorted({row["T"] for row in rows.all})
    gains = thread_gains(rows)
    lines = [
        [f"{d}", f"{r}", *(f"{gains[d, r, t]:.2f}x" if gains.get((d, r, t)) else "one thread" for t in tokens)]
        for d, r in shapes(rows.all)
        if any((d, r, t) in gains for t in tokens)
    ]
    return Sheet(
        f"Ours, {rows.isa}, fp32, hot: two threads against one", ["d", "r", *(f"T={t}" for t in tokens)], lines
    )


def thread_gains(rows: Rows) -> dict[tuple[int, int, int], float | None]:
    """By d, r, T: time of one thread over time of two; None where the plan keeps to one."""
    one, two = (
        {(row["d_in"], row["r"], row["T"]): row for row in rows.where(threads=n, cache="hot", dtype="fp32")}
        for n in (1, 2)
    )
    return {
        key: one[key]["ours_us"] / two[key]["ours_us"] if two[key]["threads_used"] > 1 else None
        for key in one
        if key in two
    }


def roof_sheet(report: dict[str, Any]) -> Sheet:
    """What the machine can do at best, and how near our own dense LoRA and the sign kernels come."""
    lines, rows = [], Rows(report)
    for roof in report["roofs"]:
        dense = rows.where(baseline="c_fp32", dtype="fp32", threads=roof["threads"])
        hot, cold = ([row for row in dense if row["cache"] == cache] for cache in ("hot", "cold"))
        best = [
            f"{100 * max((row[key] for row in part), default=0):.0f} %"
            for key, part in (
                ("baseline_of_fma_roof", hot),
                ("ours_of_fma_roof", hot),
                ("baseline_of_read_roof", cold),
                ("ours_of_read_roof", cold),
            )
        ]
        read = " / ".join(f"{rate / 1e9:.0f}" for rate in roof["read_bytes_per_s"].values())
        lines.append([f"{roof['threads']}", f"{roof['multiply_adds_per_s'] / 1e9:.0f}", *best[:2], read, *best[2:]])
    columns = ["threads", "multiply-adds, G/s", "C fp32 at best", "ours at best (signed additions)"]
    names = " / ".join(report["roofs"][0]["read_bytes_per_s"]) if report["roofs"] else ""
    return Sheet("Roofs", [*columns, f"read, GB/s: {names}", "C fp32 cold at best", "ours cold at best"], lines)


def targets(report: dict[str, Any]) -> list[Target]:
    """The targets of the sign kernels and what was measured for each."""
    rows = Rows(report)
    decode = {"T": 1, "threads": 1, "dtype": "fp32"}
    result = []

    def promise(text: str, least: float, found: Iterable[tuple[float, str]]) -> None:
        result.append(Target(text, least, list(found)))

    for cache, baseline, at_16, above in (
        ("cold", "c_fp32", 5.0, 9.0),
        ("cold", "c_fp16w", 2.5, 4.0),
        ("hot", "c_fp32", 2.4, 3.5),
        ("hot", "ort_fp32", 4.0, 4.0),
        ("hot", "torch_fp32", 5.0, 5.0),
    ):
        wanted = decode | {"cache": cache}
        for least, ranks, text in ((at_16, is_16, "r=16"), (above, is_32_up, "r>=32")):
            promise(f"decode {cache}, {text}, {LABELS[baseline]}", least, rows.ratios(baseline, ranks, **wanted))
    promise(
        "decode hot, r>=16, our AVX2 against C fp32 on the widest vectors",
        1.5,
        rows.ratios("c_fp32", is_16_up, **(decode | {"cache": "hot", "isa": "avx2"})),
    )
    for dtype, baseline, at_16, above, upper in (
        ("fp32", "torch_fp32", 1.6, 2.0, is_32_up),
        ("fp32", "ort_fp32", 1.6, 2.0, is_32_up),
        ("bf16", "torch_bf16", 1.4, 1.0, is_32),
    ):
        wanted = {"phase": "prefill", "threads": 1, "dtype": dtype, "cache": "hot"}
        for least, ranks in ((at_16, is_16), (above, upper)):
            text = "r=16" if ranks is is_16 else "r>=32" if ranks is is_32_up else "r=32"
            promise(f"prefill, {text}, {LABELS[baseline]}", least, rows.ratios(baseline, ranks, **wanted))
    gains = [(gain, f"d={d} r={r} T={t}", t) for (d, r, t), gain in thread_gains(rows).items() if gain is not None]
    promise("two threads against one, prefill", 1.6, [(g, w) for g, w, t in gains if t >= 32])
    promise("two threads against one, decode where the plan takes two", 1.6, [(g, w) for g, w, t in gains if t == 1])
    for dtype, limit in (("fp32", 1e-6), ("bf16", 2.0**-8)):
        worst = [
            (limit / max(row["max_rel_err"], 1e-30), f"d={row['d_in']} r={row['r']} T={row['T']}")
            for row in rows.all
            if row["dtype"] == dtype
        ]
        promise(f"{dtype}: error limit {limit:.2g} over the error found", 1.0, worst)
    return result


def is_16(r: int) -> bool:
    return r == 16


def is_32(r: int) -> bool:
    return r == 32


def is_16_up(r: int) -> bool:
    return r >= 16


def is_32_up(r: int) -> bool:
    return r >= 32


def target_sheet(report: dict[str, Any]) -> Sheet:
    """One line per target: the least ratio found counts."""
    lines = []
    for target in targets(report):
        if target.found:
            least, where = min(target.found)
            below = sum(ratio < target.least for ratio, _ in target.found)
            middle = statistics.median(ratio for ratio, _ in target.found)
            measured = [f"{least:.2f}", where, f"{middle:.2f}", f"{len(target.found) - below} of {len(target.found)}"]
        else:
            measured = ["-", "-", "-", "-"]
        lines.append([target.text, f"{target.least:g}", *measured, target.verdict])
    return Sheet("Targets", ["what", "at least", "lowest", "where", "median", "cells that reach it", ""], lines)


def shapes(rows: list[Row]) -> list[tuple[int, int]]:
    return sorted({(row["d_in"], row["r"]) for row in rows})


def times(row: Row | None) -> str:
    return f"{row['ratio']:.2f}x" if row else "-"


def print_summary(report: dict[str, Any]) -> None:
    """All tables but the targets."""
    for sheet in sheets(report):
        console().print(table(sheet.title, sheet.columns, sheet.rows))


def print_targets(report: dict[str, Any]) -> None:
    """Which targets are met."""
    sheet = target_sheet(report)
    console().print(table(sheet.title, sheet.columns, sheet.rows))


def conditions_text(report: dict[str, Any]) -> str:
    """Machine and conditions in words."""
    machine, conditions = report["machine"], report["conditions"]
    caches = ", ".join(f"{name} {size / 1024:.0f} KiB" for name, size in machine["cache_bytes"].items())
    versions = ", ".join(f"{name} {version}" for name, version in conditions["versions"].items())
    before, after = conditions["load_average"]
    spreads = sorted(row[f"{side}_spread"] for row in report["rows"] for side in ("ours", "baseline"))
    spread, wide = (100 * spreads[int(share * (len(spreads) - 1))] if spreads else 0.0 for share in (0.5, 0.95))
    kind, pool = "virtual" if machine["virtual_machine"] else "real", conditions["pool_bytes"] / 2**20
    prepared = "prepared at load" if conditions["prepared"] else "as stored"
    sentences = (
        f"{machine['cpu']} (family/model {machine['family_model']}), {machine['cores']} cores of a {kind} machine, "
        f"about {machine['ghz_estimate']} GHz, {caches}; {machine['system']}; {machine['compiler']}; {versions}",
        f"{conditions['date']}; load average {before[0]:.2f} before, {after[0]:.2f} after",
        f"The {conditions['statistic']} of up to {conditions['repeats']} samples of at least "
        f"{conditions['sample_ms']:g} ms, all contestants in turns, in random order",
        f"Interquartile range: {spread:.1f} % of the median in half of the cells, {wide:.1f} % or less in 95 of 100",
        f"Scales {conditions['scales']}, modules {prepared}",
        f"Cold: every pool of modules, ours too, takes {pool:.0f} MiB",
        f"ONNX Runtime and XNNPACK run {conditions['chain']} modules per call of the runtime",
    )
    return ". ".join(sentences) + "."


def write_docs(report: dict[str, Any], path: Path, plot: Path | None) -> None:
    """Put conditions, plot and tables between the markers of a markdown file."""
    before, after = around_results(path)
    parts = [conditions_text(report)]
    if plot:
        parts.append(f"![Speed-up over dense LoRA, by tokens and rank]({plot.name})")
    parts += [sheet.markdown() for sheet in [target_sheet(report), *sheets(report)]]
    with new_file(path) as temporary:
        temporary.write_text("\n".join([before + MARKERS[0], "\n\n".join(parts), MARKERS[1] + after]))


def around_results(path: Path) -> tuple[str, str]:
    """What stands before and after the results in a markdown file."""
    try:
        before, first, rest = path.read_text().partition(MARKERS[0])
    except OSError as error:
        raise LordbaError(f"{path}: cannot be read ({error.strerror}); --docs names a file that is there") from error
    _, last, after = rest.partition(MARKERS[1])
    if not (first and last):
        raise LordbaError(f"{path}: the lines {MARKERS[0]!r} and {MARKERS[1]!r} must stand in it: results go between")
    return before, after
