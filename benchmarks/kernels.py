"""Measure the packed sign kernels against dense LoRA: C, torch, ONNX Runtime, XNNPACK, interleaved in one run.

    python benchmarks/kernels.py --json FILE --plot FILE.svg --docs docs/kernels.md   all of it: about 10 minutes
    python benchmarks/kernels.py --quick                                              a few shapes: half a minute
    python benchmarks/kernels.py --only d=4096 r=16,32 T=1 cache=hot --baselines c_fp32 --isa avx512
    python benchmarks/kernels.py --from FILE --check-targets                          report on what was measured

Needs cmake, a C compiler and the packages of `pip install 'lordba[bench]'`. Ctrl-C keeps what was measured so far.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lordba.console import console, progress_bar, quiet_libraries, run_command
from lordba.errors import LordbaError
from lordba.files import new_file

quiet_libraries()

import numpy as np  # noqa: E402
from contest.baselines import CHAIN, MOST_CHAINED  # noqa: E402
from contest.measure import BASELINES, STATISTICS, Plan, Shape, Weights, measure  # noqa: E402
from contest.native import build, cache_sizes, describe_machine, measure_roofs  # noqa: E402
from contest.report import around_results, print_summary, print_targets, write_docs  # noqa: E402

from lordba.scales import ScaleCode  # noqa: E402

AXES: dict[str, tuple[Any, ...]] = {
    "d": (576, 2048, 4096, 11008),
    "r": (8, 16, 32, 64),
    "T": (1, 8, 32, 128, 512),
    "cache": ("hot", "cold"),
    "threads": (1, 2),
}
QUICK = {"d": (576, 4096), "r": (16, 32), "T": (1, 32), "cache": ("hot", "cold"), "threads": (1,)}
POOL_CACHES = 4  # a pool of modules is so many times as large as the last-level cache
PACKAGES = ("torch", "onnxruntime", "onnx", "executorch", "numpy", "lordba")


def main() -> None:
    options = parse()
    check(options)
    report = read_report(options.source) if options.source else run(options)
    if options.json and not options.source:
        write_report(report, options.json)
    print_summary(report)
    if options.check_targets:
        print_targets(report)
    if not report["conditions"]["complete"]:
        console(stderr=True).print("interrupted: these are the cells measured so far; no plot, no docs")
        raise KeyboardInterrupt
    if options.plot:
        from contest.plot import plot

        plot(report, options.plot)
    if options.docs:
        write_docs(report, options.docs, options.plot)


def parse() -> argparse.Namespace:
    """The command line."""
    description, _, examples = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--json", type=Path, metavar="FILE", help="write machine, conditions, roofs and rows")
    add("--plot", type=Path, metavar="FILE", help="write the plot (.svg, .png)")
    add("--docs", type=Path, metavar="FILE", help="put the tables between the results markers of this markdown file")
    add("--check-targets", action="store_true", help="compare with the targets: met or missed")
    add("--from", dest="source", type=Path, metavar="FILE", help="measure nothing: report on this --json file")
    add("--quick", action="store_true", help="a few shapes, few repeats")
    add("--only", nargs="+", default=[], metavar="AXIS=VALUES", help=f"restrict an axis: {', '.join(AXES)}")
    add("--isa", default="", help="our kernels, by instruction set, with commas (default: all but scalar)")
    add("--dtypes", default="fp32,bf16", help="of x and y for our kernels (default: %(default)s)")
    add("--baselines", default=",".join(BASELINES), help="default: %(default)s")
    add("--scales", type=ScaleCode, choices=list(ScaleCode), default=ScaleCode.LOG4, help="default: %(default)s")
    add("--as-stored", action="store_true", help="call our kernels on the stored signs, not on prepared modules")
    add(
        "--repeats",
        type=int,
        default=0,
        help="samples of each, the median counts; fewer where calls are slow (default: 9, quick: 5)",
    )
    add("--statistic", choices=STATISTICS, default="median", help="best: for a busy machine (default: %(default)s)")
    add("--sample-ms", type=float, default=2.0, help="least length of a sample (default: %(default)s)")
    return parser.parse_args()


def check(options: argparse.Namespace) -> None:
    """Raise now for what would fail after minutes of measuring."""
    if options.docs:
        around_results(options.docs)
    needed = [] if options.source or "ort_fp32" not in options.baselines else ["onnx", "onnxruntime"]
    missing = [name for name in [*needed, *(["matplotlib"] if options.plot else [])] if not find_spec(name)]
    if missing:
        raise LordbaError(f"the benchmark needs {', '.join(missing)}: pip install 'lordba[bench]'")


def choose(given: str, known: tuple[Any, ...], what: str) -> tuple[Any, ...]:
    """Comma-separated values, each one of those known."""
    by_text = {str(value): value for value in known}
    texts = given.split(",")
    for text in texts:
        if text not in by_text:
            raise LordbaError(f"{what}: {text!r} is not one of {', '.join(by_text)}")
    return tuple(by_text[text] for text in texts)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Build, measure the roofs, measure every cell; the report, complete or not."""
    axes = dict(QUICK if options.quick else AXES)
    for filter_ in options.only:
        axis, _, values = filter_.partition("=")
        if axis not in AXES:
            raise LordbaError(f"--only {filter_}: the axes are {', '.join(AXES)}; write for example --only d=4096 T=1")
        axes[axis] = choose(values, AXES[axis], f"--only {axis}")
    dtypes = choose(options.dtypes, ("fp32", "bf16"), "--dtypes")
    baselines = choose(options.baselines, BASELINES, "--baselines")
    err = console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="lordba-benchmark-") as folder:
        err.print("building the kernels, the dense LoRA and the driver")
        library = build(Path(folder) / "build")
        known = tuple(isa for isa in ("avx512", "avx2", "i8mm", "dotprod", "neon") if library.has_isa(isa.encode()))
        cache = max(cache_sizes().values(), default=32 << 20)
        plan = Plan(
            shapes=tuple(Shape(d, r) for d in axes["d"] for r in axes["r"]),
            tokens=axes["T"],
            caches=axes["cache"],
            threads=axes["threads"],
            isas=choose(options.isa, (*known, "scalar"), "--isa") if options.isa else known or ("scalar",),
            dtypes=dtypes,
            baselines=baselines,
            scales=options.scales,
            prepared=not options.as_stored,
            repeats=options.repeats or (5 if options.quick else 9),
            sample_s=options.sample_ms / 1000,
            statistic=options.statistic,
            pool_bytes=POOL_CACHES * cache,
        )
        if "xnnpack_fp32" in plan.baselines:
            err.print("exporting to XNNPACK")
            export_xnnpack(Path(folder), plan)
        load_before = os.getloadavg()
        if load_before[0] > 0.5:
            err.print(f"load average {load_before[0]:.1f}: other work is running, and figures will be noisy")
        roofs = {threads: measure_roofs(library, threads, plan.pool_bytes) for threads in plan.threads}
        report: dict[str, Any] = {"machine": describe_machine(library), "conditions": {}, "roofs": [], "rows": []}
        complete = True
        try:
            with progress_bar() as progress:
                task = progress.add_task("cells", total=plan.cells)
                for rows in measure(library, plan, roofs, Path(folder)):
                    report["rows"] += rows
                    progress.advance(task)
        except KeyboardInterrupt:
            complete = False
        report["roofs"] = [asdict(roof) for roof in roofs.values()]
        report["conditions"] = {
            "complete": complete,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "versions": {name: version(name) for name in PACKAGES if find_spec(name)},
            "load_average": [load_before, os.getloadavg()],
            "repeats": plan.repeats,
            "sample_ms": options.sample_ms,
            "statistic": plan.statistic,
            "scales": plan.scales.value,
            "prepared": plan.prepared,
            "pool_bytes": plan.pool_bytes,
            "chain": CHAIN,
            "most_chained": MOST_CHAINED,
        }
    return report


def export_xnnpack(folder: Path, plan: Plan) -> None:
    """Programs for all shapes, exported by a process of its own."""
    for shape in plan.shapes:
        weights = Weights.random(shape, plan.scales)
        np.savez(folder / f"{shape}.npz", a=weights.a, b=weights.b)
    script = Path(__file__).parent / "contest" / "xnnpack.py"
    arguments = [str(folder), str(CHAIN), str(max(2, *AXES["T"])), *map(str, plan.shapes)]
    result = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True)
    if result.returncode != 0:
        raise LordbaError(f"the export to XNNPACK failed; leave it out with --baselines\n{result.stderr[-2000:]}")


def write_report(report: dict[str, Any], path: Path) -> None:
    """As JSON, one row per line."""
    head = json.dumps({key: value for key, value in report.items() if key != "rows"}, indent=1)
    rows = ",\n".join("  " + json.dumps(row) for row in report["rows"])
    with new_file(path) as temporary:
        temporary.write_text(head.removesuffix("\n}") + f',\n "rows": [\n{rows}\n ]\n}}\n')


def read_report(path: Path) -> dict[str, Any]:
    """What `write_report` wrote."""
    try:
        report = json.loads(path.read_text())
        missing = {"machine", "conditions", "roofs", "rows"} - report.keys()
    except (OSError, ValueError, AttributeError) as error:
        raise LordbaError(f"{path}: not a report of benchmarks/kernels.py --json ({error})") from error
    if missing:
        raise LordbaError(f"{path}: a report of benchmarks/kernels.py --json also holds {', '.join(sorted(missing))}")
    return report


if __name__ == "__main__":
    run_command(main)
