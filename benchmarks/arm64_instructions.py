"""Executed instructions of one call on 64-bit ARM, ours against a dense NEON LoRA: a count, the same on every machine.

    scripts/arm64_toolchain.sh && python benchmarks/arm64_instructions.py --json FILE

A count is no time: it says nothing of caches, of memory, or of instructions that take longer than others. It is the
difference between two calls and one, of what runs inside the kernels and the baseline.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lordba.console import console, progress_bar, table
from lordba.files import new_file

PROJECT = Path(__file__).parents[1]
KERNELS, BENCHMARKS = PROJECT / "backends" / "kernels", PROJECT / "benchmarks" / "native"
COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64-static"
WIDTHS, RANKS, TOKENS = (576, 2048), (8, 16, 32, 64), (1, 32)
BASELINES = ("dense-fp32", "dense-fp16")
OURS = {"neon": "neon", "neon:stored": "neon, A packed in every call", "scalar": "scalar"}
CLAIMED_FROM_RANK = 16


def build(folder: Path) -> tuple[Path, range]:
    """The program, and the addresses of the code that counts: the kernels' and the baseline's."""
    strict = ["-std=c11", "-O3", "-Wall", "-Wextra", "-Werror", f"-I{KERNELS}", f"-I{BENCHMARKS}"]
    ours = ["-fno-builtin", "-ffp-contract=off"]
    sources = {path: ours for path in sorted(KERNELS.glob("*.c")) if not path.stem.startswith("avx")}
    sources[BENCHMARKS / "dense_lora_neon.c"] = ["-fno-schedule-insns"]  # the fewest of GCC's ways: no spills
    objects, names = [], set()
    for source, flags in sources.items():
        objects.append(folder / f"{source.stem}.o")
        subprocess.run([COMPILER, *strict, *flags, "-c", source, "-o", objects[-1]], check=True)
        names |= {fields[2] for fields in symbols(objects[-1]) if fields[1] in "tT"}
    program = folder / "arm64_calls"
    caller: list[str | Path] = [*strict, BENCHMARKS / "arm64_calls.c", *objects, "-static", "-lm", "-o", program]
    subprocess.run([COMPILER, *caller], check=True)
    defined = [(int(address, 16), name) for address, kind, name in symbols(program) if kind in "tT"]
    inside = [address for address, name in defined if name in names]
    return program, range(min(inside), min(address for address, _ in defined if address > max(inside)))


def symbols(path: Path) -> Iterator[tuple[str, str, str]]:
    listed = subprocess.run(["aarch64-linux-gnu-nm", "-n", path], capture_output=True, text=True, check=True)
    for line in listed.stdout.splitlines():
        fields = line.split()
        if len(fields) == 3:
            yield fields[0], fields[1], fields[2]


def executed(program: Path, code: range, contestant: str, size: tuple[int, int, int], calls: int) -> tuple[int, str]:
    """Instructions that `calls` calls execute in `code`, and what the program printed."""
    command = [EMULATOR, "-singlestep", "-d", "nochain,exec", "-dfilter", f"{code.start:#x}..{code.stop - 1:#x}"]
    command += ["-D", "/dev/stderr", str(program), contestant, *map(str, size), str(calls)]
    count = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        while block := process.stderr.read(1 << 20):
            count += block.count(b"\n")
        printed = process.stdout.read().decode()
    if process.returncode != 0:
        raise SystemExit(f"error: {' '.join(command)} failed with {process.returncode}: {printed}")
    return count, printed


@dataclass(frozen=True)
class Count:
    """What one call of a contestant executes, and the relative error of ours against float64."""

    contestant: str
    d: int
    r: int
    tokens: int
    instructions: int
    error: float | None


def measure(program: Path, code: range, contestant: str, size: tuple[int, int, int]) -> Count:
    once, printed = executed(program, code, contestant, size, 1)
    twice, _ = executed(program, code, contestant, size, 2)
    return Count(contestant, *size, twice - once, float(printed.split()[-1]) if contestant in OURS else None)


def by_call(counts: Sequence[Count]) -> dict[tuple[str, int, int, int], int]:
    return {(count.contestant, count.d, count.r, count.tokens): count.instructions for count in counts}


def show(counts: Sequence[Count]) -> None:
    executed_by, rows = by_call(counts), []
    for d, r, tokens in sizes():
        dense = executed_by["dense-fp32", d, r, tokens]
        cells = [f"d={d} r={r} T={tokens}", *(f"{executed_by[name, d, r, tokens]:,}" for name in BASELINES)]
        for name in OURS:
            ours = executed_by.get((name, d, r, tokens))
            cells.append("" if ours is None else f"{ours:,} ({dense / ours:.2f}x)")
        rows.append(cells)
    title = "Executed instructions of one call (in brackets: dense fp32 / ours)"
    console().print(table(title, ["call", *BASELINES, *OURS.values()], rows))


def sizes() -> list[tuple[int, int, int]]:
    return [(d, r, tokens) for tokens in TOKENS for d in WIDTHS for r in RANKS]


def contestants(size: tuple[int, int, int]) -> list[str]:
    """Many tokens read A as it is stored; the scalar twin is for small sizes."""
    d, _, tokens = size
    return [*BASELINES, "neon"] + (["neon:stored"] if tokens == 1 else []) + (["scalar"] if d == WIDTHS[0] else [])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the counts to this file")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        program, code = build(Path(folder))
        work = [(contestant, size) for size in sizes() for contestant in contestants(size)]
        with progress_bar() as progress:
            task = progress.add_task("counting", total=len(work))
            counts = []
            for contestant, size in work:
                counts.append(measure(program, code, contestant, size))
                progress.advance(task)
    show(counts)
    if options.json:
        with new_file(options.json) as path:
            content = {"compiler": compiler_version(), "calls": [asdict(count) for count in counts]}
            path.write_text(json.dumps(content, indent=1) + "\n")
    executed_by = by_call(counts)
    more = [
        f"d={d} r={r} T={tokens}"
        for d, r, tokens in sizes()
        if r >= CLAIMED_FROM_RANK and executed_by["neon", d, r, tokens] >= executed_by["dense-fp32", d, r, tokens]
    ]
    if more:
        print(f"not fewer instructions than dense fp32: {', '.join(more)}", file=sys.stderr)
    return 1 if more else 0


def compiler_version() -> str:
    listed = subprocess.run([COMPILER, "--version"], capture_output=True, text=True, check=True)
    return listed.stdout.splitlines()[0]


if __name__ == "__main__":
    sys.exit(main())
