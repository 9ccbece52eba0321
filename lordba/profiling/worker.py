"""One process that measures: `python -m lordba.profiling.worker MODE`, a plan as JSON on stdin, a result on stdout.

A fresh one per thread count (a runtime's threads are set before it loads anything) and per repetition (where a
program comes to lie in memory is drawn once per process). Modes: `time`, `load`, `memory`, `operators`.
"""

import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lordba.console import quiet_libraries
from lordba.profiling.plan import Plan, Variant
from lordba.runtime.bank import AdapterBank
from lordba.runtime.bundle import Bundle, read_bundle
from lordba.runtime.session import Runner

TOKENS = range(3, 259)
"""Tokens that are fed, over and over: what a program computes does not change how long it takes."""
TRACED_RUNS, TRACED_WARM_UP = 12, 2


def tokens(n: int) -> list[int]:
    return [TOKENS[7 * i % len(TOKENS)] for i in range(n)]


def open_runner(bundle: Bundle, threads: int, trace: Path | None = None) -> Runner:
    """The bundle's runner with that many threads; the process-wide part was set by `set_threads`."""
    if bundle.manifest.target == "executorch":
        from lordba.runtime.executorch_runner import ExecuTorchRunner

        return ExecuTorchRunner(bundle, trace=trace is not None)
    from lordba.runtime.onnx_runner import OnnxRunner

    return OnnxRunner(bundle, threads=threads, spin=False, trace=trace)


def import_runtime(plan: Plan) -> None:
    """Import what the variants need, without starting a thread."""
    if plan.variants[0].target == "executorch":
        from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401
    else:
        from lordba.runtime.onnx_adapter import onnxruntime

        onnxruntime()


def set_threads(plan: Plan) -> None:
    """Give the runtime its threads, where that is a matter of the process."""
    if plan.variants[0].target == "executorch":
        from lordba.runtime.executorch_runner import set_threads

        set_threads(plan.threads)


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def milliseconds(call: Callable[[], object], clock: str = "wall") -> float:
    now = CLOCKS[clock]
    started = now()
    call()
    return 1e3 * (now() - started)


class Program:
    """A variant, loaded; `load_ms` is how long that took, the bundle's own check left out."""

    def __init__(self, variant: Variant, bundle: Bundle, plan: Plan, trace: Path | None = None) -> None:
        self.variant = variant
        self.clock = plan.clock

        def load() -> None:
            self.runner = open_runner(bundle, plan.threads, trace)
            self.bank = AdapterBank(bundle, runner=self.runner)
            self.use(variant.use)

        self.load_ms = milliseconds(load, plan.clock)

    def use(self, adapter: str | None) -> None:
        """Swap to an adapter."""
        with self.bank.use(adapter):
            pass

    def prefill(self, length: int) -> float:
        """Milliseconds of one prefill."""
        with self.bank.use(self.variant.use) as session:
            text = tokens(length)
            return milliseconds(lambda: session.feed(text), self.clock)

    def decode(self, context: int, n: int) -> list[float]:
        """Milliseconds of each of n tokens after a context; one more before them is not counted (caches are cold)."""
        with self.bank.use(self.variant.use) as session:
            session.feed(tokens(context))
            return [milliseconds(lambda: session.feed(tokens(1)), self.clock) for _ in range(n + 1)][1:]


def measure(plan: Plan, report: Callable[[], None]) -> list[dict[str, Any]]:
    """The samples of every variant, phase and length, interleaved: in each round every variant has its turn."""
    set_threads(plan)
    bundles = {variant.folder: read_bundle(Path(variant.folder)) for variant in plan.variants}
    samples: dict[tuple[int, str, int], list[float]] = {}
    order = [(i + plan.first) % len(plan.variants) for i in range(len(plan.variants))]
    loaded = {i: Program(plan.variants[i], bundles[plan.variants[i].folder], plan) for i in order}
    programs = dict(sorted(loaded.items()))
    for i, program in programs.items():
        if program.variant.use and plan.swaps:
            samples[i, "swap", 0] = swap(program, plan.swaps)
    for round_ in range(plan.rounds + 1):
        for turn in range(len(programs)):
            i = (turn + round_) % len(programs)  # nobody always follows the same other
            found = [("decode", 1, programs[i].decode(plan.context, plan.decode))]
            found += [("prefill", length, [programs[i].prefill(length)]) for length in plan.lengths]
            if round_:  # the first round warms up
                for phase, length, times in found:
                    samples.setdefault((i, phase, length), []).extend(times)
        report()
    return [
        {"variant": i, "phase": phase, "T": length, "samples": times} for (i, phase, length), times in samples.items()
    ]


def load(plan: Plan, report: Callable[[], None]) -> list[dict[str, Any]]:
    """The samples of loading each variant, alone in the process and in turn: each finds memory that another left."""
    set_threads(plan)
    bundles = [read_bundle(Path(variant.folder)) for variant in plan.variants]
    times: list[list[float]] = [[] for _ in bundles]
    for turn in range(plan.loads + 1):
        for k in range(len(bundles)):
            i = (k + turn) % len(bundles)
            taken = Program(plan.variants[i], bundles[i], plan).load_ms
            gc.collect()
            if turn:  # the first one warms up
                times[i].append(taken)
        report()
    return [{"variant": i, "phase": "load", "T": 0, "samples": samples} for i, samples in enumerate(times)]


def swap(program: Program, swaps: int) -> list[float]:
    """Milliseconds from an adapter's file to a session that uses it, coming from another adapter or from none."""
    bundle, name = program.bank.bundle, program.variant.use
    other = next((entry.name for entry in bundle.manifest.adapters if entry.name != name), None)
    program.bank = AdapterBank(bundle, budget=0, runner=program.runner)  # keeps none: every use reads the file
    times = []
    for _ in range(swaps + 1):
        program.use(other)
        times.append(milliseconds(lambda: program.use(name), program.clock))
    program.bank = AdapterBank(bundle, runner=program.runner)
    return times[1:]


def peak_memory(plan: Plan, report: Callable[[], None]) -> list[int]:
    """Bytes that loading, prefilling and decoding add, at their peak, to a process that has imported the runtime.

    Each variant has a process of its own, forked before there are any threads.
    """
    import_runtime(plan)
    peaks = []
    for variant in plan.variants:
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            os.write(writing, str(_peak_memory(plan, variant)).encode())
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as pipe:
            text = pipe.read()
        os.waitpid(child, 0)
        if not text:
            raise RuntimeError(f"the process that measured the memory of {variant.title} died")
        peaks.append(int(text))
        report()
    return peaks


def _peak_memory(plan: Plan, variant: Variant) -> int:
    bundle = read_bundle(Path(variant.folder))
    set_threads(plan)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status_bytes("VmRSS")
    program = Program(variant, bundle, plan)
    program.prefill(max(plan.lengths))
    program.decode(plan.context, plan.decode)
    return status_bytes("VmHWM") - before


def status_bytes(field: str) -> int:
    """A field of this process's status, such as VmRSS."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise AssertionError(field)


def operators(plan: Plan, report: Callable[[], None]) -> list[dict[str, Any]]:
    """Milliseconds per run of each group of operators, for every variant, prefill of a middle length and decode."""
    from lordba.profiling import operators as traces

    set_threads(plan)
    rows = []
    length = plan.lengths[len(plan.lengths) // 2]
    for i, variant in enumerate(plan.variants):
        bundle = read_bundle(Path(variant.folder))
        with tempfile.TemporaryDirectory() as folder:
            program = Program(variant, bundle, plan, Path(folder) / "trace")
            for _ in range(TRACED_WARM_UP + TRACED_RUNS):
                program.prefill(length)
            program.decode(plan.context, plan.decode)
            runs = traces.read_runs(program.runner, Path(folder))
        loads = TRACED_WARM_UP + TRACED_RUNS
        for phase, T, part in (
            ("prefill", length, runs[TRACED_WARM_UP:loads]),
            ("decode", 1, runs[-plan.decode :]),
        ):
            rows.append({"variant": i, "phase": phase, "T": T, "ms": traces.medians(part)})
        del program
        report()
    return rows


def main() -> None:
    (mode,) = sys.argv[1:]
    quiet_libraries()
    plan = Plan.read(sys.stdin.read())

    def report() -> None:
        print("done", file=sys.stderr, flush=True)

    if mode == "time":
        result: Any = measure(plan, report)
    elif mode == "load":
        result = load(plan, report)
    elif mode == "memory":
        result = peak_memory(plan, report)
    else:
        result = operators(plan, report)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
