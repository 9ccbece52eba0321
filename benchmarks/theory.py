"""Error against the residual-to-magnitude ratio rho, on LoRAs and on synthetic factors: docs/method.md, measured.

    python benchmarks/theory.py LORA_FOLDER... [--json FILE] [--plot FILE]

For every module: rho of both factors; the error of rounding the factors as they stand to signs and scales; what
docs/method.md expects it to be (2), and the bound that it cannot pass (3); and the error that ADMM reaches.
Synthetic factors have log-normal magnitudes exp(sigma z) of random sign, on random scales of rows and columns, so that
rho^2 = 1 - exp(-sigma^2) in the limit of many entries.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from lordba.console import console, progress_bar, run_command, table
from lordba.conversion.admm import LowRank, relative_error, round_factors, to_signs
from lordba.files import new_file
from lordba.lora import find_adapter, read_lora
from lordba.threads import one_torch_thread

SYNTHETIC = "synthetic"
SIGMAS = [0.1 * i for i in range(16)]
RANK, WIDTHS, SEEDS = 16, ((576, 576), (576, 1536)), 3


@dataclass(frozen=True)
class Row:
    """One module; rho and errors are ratios of Frobenius norms."""

    source: str
    module: str
    rho_a: float
    rho_b: float
    expected: float
    bound: float
    rounded: float
    admm: float


def synthetic() -> Iterator[tuple[str, LowRank]]:
    """Factors whose rho is known."""
    for seed in range(SEEDS):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, generator: torch.Generator = generator) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        for sigma in SIGMAS:
            for d_out, d_in in WIDTHS:
                left, right = (
                    normal(1, d, RANK).sign()
                    * (sigma * normal(1, d, RANK)).exp()
                    * (0.3 * normal(1, d, 1)).exp()
                    * (0.3 * normal(1, 1, RANK)).exp()
                    for d in (d_out, d_in)
                )
                yield f"sigma {sigma:.1f}, {d_out} x {d_in}, seed {seed}", LowRank(left, right)


def modules(folder: Path) -> Iterator[tuple[str, LowRank]]:
    """The modules of a PEFT LoRA."""
    for path, module in read_lora(find_adapter(folder)).modules.items():
        b, a = module.factors()
        yield path, LowRank(b[None], a.T[None])


def measure(source: str, name: str, target: LowRank) -> Row:
    """All figures of one module, with the scales in float64: no scale code."""
    rank = target.left.shape[-1]
    rounded = round_factors(target, rank)
    found, rho = to_signs(target, rank)
    rho_b, rho_a = rho[0].tolist()
    b, a = target.left[0], target.right[0].T
    size = ((b.T @ b) * (a @ a.T)).sum().sqrt()  # of B A
    spectral_b, spectral_a = (torch.linalg.matrix_norm(factor, 2) for factor in (b, a))
    error_b, error_a = rho_b * b.norm(), rho_a * a.norm()
    return Row(
        source=source,
        module=name,
        rho_a=rho_a,
        rho_b=rho_b,
        expected=(1 - (1 - rho_a**2) * (1 - rho_b**2)) ** 0.5,
        bound=((error_b * spectral_a + error_a * (spectral_b + error_b)) / size).item(),
        rounded=relative_error(target, rounded).item(),
        admm=relative_error(target, found).item(),
    )


def shortened(row: Row) -> dict[str, str | float]:
    """A row with four digits."""
    return {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in asdict(row).items()}


def report(rows: list[Row]) -> None:
    """A line per source."""
    cells = []
    for source in dict.fromkeys(row.source for row in rows):
        group = [row for row in rows if row.source == source]

        def span(name: str, group: list[Row] = group) -> str:
            values = sorted(getattr(row, name) for row in group)
            return f"{values[0]:.3f} / {values[len(values) // 2]:.3f} / {values[-1]:.3f}"

        off = max(abs(row.rounded / row.expected - 1) for row in group if row.expected > 1e-6)
        names = ("rho_a", "rho_b", "expected", "rounded", "bound", "admm")
        cells.append([source, str(len(group)), *(span(name) for name in names), f"{100 * off:.1f} %"])
    columns = ["source", "modules", "rho A", "rho B", "expected", "rounded", "bound", "ADMM", "expected is off by"]
    console().print(table("least / median / largest", columns, cells))


def draw(rows: list[Row], path: Path) -> None:
    """Rounded, bound and ADMM over the error that rho lets expect."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style = {"svg.fonttype": "none", "svg.hashsalt": "lordba", "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(style):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
        figure.suptitle("What rho says of the error, module by module", weight="bold")
        sources = list(dict.fromkeys(row.source for row in rows))
        for index, source in enumerate(sources):
            group = [row for row in rows if row.source == source]
            color = "#bbbbbb" if source == SYNTHETIC else f"C{index}"
            x = [row.expected for row in group]
            left.scatter(x, [row.bound for row in group], s=9, facecolors="none", edgecolors=color, linewidths=0.6)
            left.scatter(x, [row.rounded for row in group], s=9, color=color, label=source)
            right.scatter(x, [row.admm for row in group], s=9, color=color, label=source)
        left.scatter([], [], s=9, facecolors="none", edgecolors="#666666", label="the bound (3)")
        left.set(title="Factors rounded as they stand", ylim=(0, 2.5), ylabel="relative error of the update")
        right.set(title="After ADMM", ylim=(0, 1), ylabel="relative error of the update")
        for axes in (left, right):
            axes.plot([0, 1], [0, 1], color="#333333", linewidth=0.8, label="as expected (2)")
            axes.set(xlim=(0, 1), xlabel="expected from rho of both factors (2)")
            axes.legend(frameon=False, loc="upper left")
        with new_file(path) as temporary:
            date = {"Date": None} if path.suffix == ".svg" else None
            figure.savefig(temporary, format=path.suffix.removeprefix("."), dpi=110, metadata=date)
        pyplot.close(figure)


@one_torch_thread()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("loras", nargs="*", type=Path, metavar="LORA_FOLDER", help="PEFT LoRAs")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help=".svg or .png")
    arguments = parser.parse_args()
    todo = [(SYNTHETIC, name, target) for name, target in synthetic()]
    for folder in arguments.loras:
        todo += [(folder.resolve().name, name, target) for name, target in modules(folder)]
    rows = []
    with progress_bar() as progress:
        for source, name, target in progress.track(todo, description="modules"):
            rows.append(measure(source, name, target))
    report(rows)
    if arguments.json:
        with new_file(arguments.json) as temporary:
            lines = ",\n".join(json.dumps(shortened(row)) for row in rows)
            temporary.write_text(f"[\n{lines}\n]\n")
    if arguments.plot:
        draw(rows, arguments.plot)


if __name__ == "__main__":
    run_command(main)
