"""A profile of bundles on this machine: worker processes, one after the other, and what they measured as one record."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from lordba.errors import LordbaError
from lordba.profiling.host import load_average, machine_of, this_device
from lordba.profiling.plan import Plan
from lordba.profiling.record import BlockSeries, profile_json
from lordba.runtime.bundle import Bundle

HUGE_PAGES = "glibc.malloc.hugetlb=1"
"""Weights in pages of 4 KiB lie where chance put them, which moves decode by a tenth and more."""
MANY_PROCESSES = 4
"""From so many on a process is one sample of the noise: what its memory is like, all its rounds share."""
BUSY = 0.5
"""Waiting processes per core from which on a machine counts as busy."""


def profile(
    bundle: Bundle,
    plan: Plan,
    threads: Sequence[int],
    processes: int,
    notes: Sequence[str],
    report: Callable[[str, int, int], None],
) -> str:
    """Measure a plan with each number of threads, in so many processes; returns the profile file's text.

    More than one process, because where its memory lies, a process keeps for good or ill.
    `report(what, total, done)` is called as work goes on; `notes` are said in the conditions.
    """
    before, busy = load_average(), busy_note()
    series: list[BlockSeries] = []
    further: dict[str, Any] = {"memory": [], "operators": []}
    for count in threads:
        with_threads = replace(plan, threads=count)
        found: dict[tuple[int, str, int], list[list[float]]] = {}
        for process in range(processes):
            what = f"{thread_count(count)}, process {process + 1} of {processes}"
            turn = replace(with_threads, first=process)
            for row in run_worker(turn, "time", partial(report, what, plan.rounds + 1)):
                samples = row["samples"]
                block = {"swap": len(samples), "decode": plan.decode}.get(row["phase"], 1)
                block = len(samples) if processes >= MANY_PROCESSES else block
                blocks = [samples[i : i + block] for i in range(0, len(samples), block)]
                found.setdefault((row["variant"], row["phase"], row["T"]), []).extend(blocks)
        if count == threads[0]:
            for row in run_worker(with_threads, "load", partial(report, "load", plan.loads + 1)):
                found[row["variant"], "load", 0] = [[sample] for sample in row["samples"]]
        series += series_of(with_threads, found)
    total = len(plan.variants)
    least = replace(plan, threads=threads[0])
    peaks = run_worker(least, "memory", partial(report, "memory", total))
    for variant, peak in zip(plan.variants, peaks, strict=True):
        further["memory"].append({**variant.about, "threads": threads[0], "peak_bytes": peak})
    for count in threads:
        what = f"operators, {thread_count(count)}"
        for row in run_worker(replace(plan, threads=count), "operators", partial(report, what, total)):
            about = plan.variants[row.pop("variant")].about
            further["operators"].append({**about, "threads": count, **row})
    conditions = {
        "interleaved": True,
        "clock": plan.clock,
        "warm_up": 1,
        "rounds": plan.rounds,
        "processes": processes,
        "context": plan.context,
        "load_average": [before, load_average()],
        "notes": [*busy, *notes],
    }
    return profile_json(series, this_device(), machine_of(bundle), conditions, further)


def busy_note() -> list[str]:
    """What to say of a machine that does other work while it is measured."""
    load = load_average()
    if load < BUSY * (os.cpu_count() or 1):
        return []
    return [f"the machine was busy (load average {load}): times and differences are larger than on an idle one"]


def series_of(plan: Plan, found: dict[tuple[int, str, int], list[list[float]]]) -> list[BlockSeries]:
    """The blocks of each variant, phase and length as series, ordered by phase and then as the variants are."""
    order = ("load", "swap", "prefill", "decode")
    result = []
    for i, phase, length in sorted(found, key=lambda key: (order.index(key[1]), key[2], key[0])):
        blocks = found[i, phase, length]
        samples = [sample for block in blocks for sample in block]
        about = plan.variants[i].about
        result.append(BlockSeries(**about, phase=phase, T=length, threads=plan.threads, samples=samples, blocks=blocks))
    return result


def thread_count(threads: int) -> str:
    return f"{threads} thread{'s' * (threads > 1)}"


def run_worker(plan: Plan, mode: str, report: Callable[[int], None]) -> Any:
    """Run a worker to its end and return its result; it says on stderr when a step is done."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(plan.threads)}
    if mode != "load":  # which the kernel's search for huge pages would make longer, and another time each time
        environment["GLIBC_TUNABLES"] = HUGE_PAGES
    command = [sys.executable, "-m", "lordba.profiling.worker", mode]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdin and process.stdout and process.stderr
        try:
            process.stdin.write(plan.json())
            process.stdin.close()
            said, done = [], 0
            for line in process.stderr:
                if line == "done\n":
                    done += 1
                    report(done)
                else:
                    said.append(line)
            result = process.stdout.read()
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        errors = [line for line in said if "Error" in line] or said or ["it said nothing"]
        raise LordbaError(f"the measuring process failed with {process.returncode}: {''.join(errors[-3:]).strip()}")
    return json.loads(result.splitlines()[-1])
