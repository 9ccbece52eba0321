"""The comparison as tables: mean and spread over seeds of every task and method, and what the claims come to."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from rich.table import Table

from lordba.console import table

from .methods import METHODS, R

Row = dict[str, Any]
COLUMNS = ("method", "r", "bytes", "bits per weight", "value", "KL to LoRA", "error of update", "seeds")
LABELS = {
    "base": "base",
    "lora": "LoRA, fp16",
    "lora_longer": "LoRA, fp16, then further steps",
    "lora_whole": "LoRA, fp16, all steps at once",
    "rtn1": "RTN 1 bit",
    "rtn2": "RTN 2 bit",
    "loraquant": "LoRAQuant",
    "svid": "SVID",
    "svid_svd": "SVID of the SVD",
    "svid_mixed": "SVID of the SVD, mixed",
    "admm": "LoRDBA, ADMM",
    "admm_ls": "LoRDBA, ADMM, least error",
    "admm_qat": "LoRDBA, ADMM + QAT",
    "direct": "LoRDBA, trained directly",
    "direct_lowmem": "LoRDBA, directly, low-memory",
}
ORDER = list(LABELS)
LOWER_IS_BETTER = ("loss",)


@dataclass(frozen=True)
class Group:
    """The rows of one method at one rank in one task, a row a seed."""

    rows: Sequence[Row]

    def mean(self, key: str) -> float | None:
        """The mean over seeds; None where the method has no such figure."""
        values = [row[key] for row in self.rows if row.get(key) is not None]
        return fmean(values) if values else None

    def spread(self, key: str) -> float:
        """The standard deviation over seeds, 0 of one seed."""
        values = [row[key] for row in self.rows]
        return stdev(values) if len(values) > 1 else 0.0

    def both(self, key: str, digits: int, factor: float = 1.0) -> str:
        """Mean and spread as text."""
        mean = self.mean(key)
        if mean is None:
            return ""
        spread = f" ± {factor * self.spread(key):.{digits}f}" if len(self.rows) > 1 else ""
        return f"{factor * mean:.{digits}f}{spread}"


def tasks(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """(model, task) in order of appearance."""
    return list(dict.fromkeys((row["model"], row["task"]) for row in rows))


def group(rows: Sequence[Row], model: str, task: str, method: str, r: int = R) -> Group:
    """The rows of one method; of none, if it was not run."""
    wanted = (model, task, method, r)
    return Group([row for row in rows if (row["model"], row["task"], row["method"], row["r"]) == wanted])


def groups(rows: Sequence[Row], model: str, task: str) -> Iterator[tuple[str, int, Group]]:
    """(method, r, rows) of a task in the order of the tables."""
    keys = sorted({(m.name, m.r) for m in METHODS}, key=lambda key: (ORDER.index(key[0]), key[1]))
    for method, r in keys:
        found = group(rows, model, task, method, r)
        if found.rows:
            yield method, r, found


def cells(rows: Sequence[Row], model: str, task: str) -> list[list[str]]:
    """A line of text per method."""
    lines = []
    for method, r, found in groups(rows, model, task):
        percent = found.rows[0]["metric"] in ("accuracy", "exact_match")
        nbytes, bits, error = (found.mean(key) for key in ("bytes", "bits_per_weight", "error"))
        lines.append(
            [
                LABELS[method],
                str(r or ""),
                f"{nbytes:,.0f}" if nbytes else "",
                f"{bits:.3f}" if bits else "",
                found.both("value", 1, 100) + " %" if percent else found.both("value", 3),
                found.both("kl_to_lora", 4),
                f"{error:.3f}" if error is not None else "",
                str(len(found.rows)),
            ]
        )
    return lines


def columns(rows: Sequence[Row], model: str, task: str) -> list[str]:
    """The headings, with the task's own metric."""
    metric = next(row["metric"] for row in rows if (row["model"], row["task"]) == (model, task))
    return [metric.replace("_", " ") if name == "value" else name for name in COLUMNS]


def summary(rows: Sequence[Row]) -> Iterator[Table | str]:
    """A table per task, then the claims."""
    for model, task in tasks(rows):
        yield table(f"{model}, {task}", columns(rows, model, task), cells(rows, model, task))
    yield from claims(rows)


def markdown(rows: Sequence[Row]) -> str:
    """The same tables for docs/quality.md."""
    text = []
    for model, task in tasks(rows):
        heads = columns(rows, model, task)
        lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *cells(rows, model, task)]
        text.append(f"### {model}, {task}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n")
    return "\n".join(text)


def claims(rows: Sequence[Row]) -> Iterator[str]:
    """What the claims come to: KL against RTN with twice the bits, the metric against fp16 after the same steps."""
    for model, task in tasks(rows):
        ours, theirs = (group(rows, model, task, name) for name in ("admm", "rtn2"))
        if ours.rows and theirs.rows:
            ratios = [
                a["kl_to_lora"] / b["kl_to_lora"]
                for a in ours.rows
                for b in theirs.rows
                if a["seed"] == b["seed"] and b["kl_to_lora"]
            ]
            size = ours.rows[0]["bytes"] / theirs.rows[0]["bytes"]
            yield (
                f"{model}, {task}: KL of ADMM over that of RTN 2 bit, with {size:.3f} of its bytes: "
                f"{min(ratios):.2f} to {max(ratios):.2f}"
            )
        for method, control in (("admm_qat", "lora_longer"), ("direct", "lora_whole"), ("direct_lowmem", "direct")):
            found, fp16 = (group(rows, model, task, name) for name in (method, control))
            if not (fp16.rows and found.rows):
                continue
            mine, reference = found.mean("value"), fp16.mean("value")
            assert mine is not None and reference is not None
            loss = (mine - reference) * (1 if found.rows[0]["metric"] in LOWER_IS_BETTER else -1)
            inside = "within" if loss <= fp16.spread("value") else "beyond"
            yield (
                f"{model}, {task}: {LABELS[method]}: {mine:.4g} where {LABELS[control]} has {reference:.4g} "
                f"({inside} its spread of {fp16.spread('value'):.2g})"
            )
