"""Profiles of other machines through the runner without Python: a phone on adb, or 64-bit ARM in emulation.

The runner notes how long each step took; this side gives it its tokens and makes the record. The phone's part was
written and tested against a stand-in for adb: it has never met a phone.
"""

import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Protocol

from lordba.errors import LordbaError
from lordba.profiling.plan import Plan, Variant
from lordba.profiling.record import BlockSeries, Device, profile_json
from lordba.profiling.worker import tokens
from lordba.runtime.bundle import Bundle, read_bundle

REMOTE = PurePosixPath("/data/local/tmp/lordba")
REPEATS = 4
"""Times that a process feeds its tokens; the first warms up."""
Times = list[tuple[str, int, float]]
"""Phase, tokens, milliseconds of each step."""


class Transport(Protocol):
    """A machine that runs the runner."""

    def push(self, local: Path, name: str) -> None:
        """Copy a file to the machine, under this name in its folder."""
        ...

    def shell(self, command: str) -> str:
        """Run a command in that folder; its stdout."""
        ...


class Adb:
    """A phone through adb, the one that ANDROID_SERIAL names where there are several."""

    def __init__(self) -> None:
        if shutil.which("adb") is None:
            raise LordbaError("adb is not on the PATH; install Android's platform tools and connect a phone")
        self._call("shell", f"mkdir -p {REMOTE}")

    def push(self, local: Path, name: str) -> None:
        remote = REMOTE / name
        self._call("shell", f"mkdir -p {remote.parent}")
        self._call("push", str(local), str(remote))

    def shell(self, command: str) -> str:
        return self._call("shell", f"cd {REMOTE} && {command}")

    def _call(self, *arguments: str) -> str:
        result = subprocess.run(["adb", *arguments], capture_output=True, text=True)
        if result.returncode:
            said = (result.stderr or result.stdout).strip().splitlines()
            raise LordbaError(
                f"adb {' '.join(arguments)[:120]} failed with {result.returncode}: {said[-1] if said else 'no message'}"
            )
        return result.stdout


def phone_profile(
    transport: Transport,
    runner: Path,
    plan: Plan,
    processes: int,
    notes: Sequence[str],
    report: Callable[[str, int, int], None],
) -> str:
    """Push the runner, libraries beside it and every variant, run them in turn, and return the profile file's text.

    Each variant, length and repetition is a process of its own, so that every one gives a load.
    """
    files = [_files(read_bundle(Path(variant.folder)), variant) for variant in plan.variants]
    _push(transport, runner, files)
    found: dict[tuple[int, str, int], list[list[float]]] = {}
    work = [(length, 0) for length in plan.lengths] + [(plan.context, plan.decode)]
    total, done = processes * len(work) * len(plan.variants), 0
    for repetition in range(processes):
        for length, decode in work:
            for turn in range(len(plan.variants)):
                i = (turn + repetition) % len(plan.variants)
                times = _run(transport, f"./{runner.name}", i, files[i], length, decode, plan.threads)
                found.setdefault((i, "load", 0), []).extend([ms] for phase, _, ms in times if phase == "load")
                for block in _blocks(times)[1:]:
                    wanted = ("decode", 1) if decode else ("prefill", length)
                    samples = [ms for *step, ms in block if tuple(step) == wanted]
                    found.setdefault((i, *wanted), []).append(samples)
                done += 1
                report("on the phone", total, done)
    from lordba.profiling.local import series_of

    device, machine = phone(transport)
    conditions = {
        "interleaved": True,
        "warm_up": 1,
        "rounds": REPEATS - 1,
        "processes": processes,
        "context": plan.context,
        "notes": list(notes),
    }
    series: list[BlockSeries] = series_of(plan, found)
    return profile_json(series, device, machine, conditions)


def phone(transport: Transport) -> tuple[Device, dict[str, object]]:
    """What the phone says of itself."""

    def said(name: str) -> str:
        return transport.shell(f"getprop {name}").strip()

    memory = dict(re.findall(r"^(\w+):\s+(\d+) kB", transport.shell("cat /proc/meminfo"), re.MULTILINE))
    total, available = (1024 * int(memory.get(name, 0)) for name in ("MemTotal", "MemAvailable"))
    system = f"Android {said('ro.build.version.release')}"
    device = Device(said("ro.product.model"), said("ro.product.cpu.abi"), system, total, available)
    return device, {"cpu": said("ro.soc.model") or said("ro.board.platform"), "cores": int(transport.shell("nproc"))}


def _push(transport: Transport, runner: Path, files: Sequence[dict[str, Path]]) -> None:
    if not runner.is_file():
        raise LordbaError(f"{runner}: no such runner; build backends/executorch/runner for the phone (Android's NDK)")
    for file in (runner, *sorted(runner.parent.glob("*.so"))):
        transport.push(file, file.name)
    transport.shell(f"chmod +x {runner.name}")
    for i, of_variant in enumerate(files):
        for name, file in of_variant.items():
            transport.push(file, f"{i}/{name}")


def _files(bundle: Bundle, variant: Variant) -> dict[str, Path]:
    """What a run of the variant needs, by the name that it gets on the machine."""
    adapter = bundle.adapter_file(variant.use)
    return {"model.pte": bundle.program} | ({"adapter" + adapter.suffix: adapter} if adapter else {})


def _run(
    transport: Transport, runner: str, i: int, names: Iterable[str], length: int, decode: int, threads: int
) -> Times:
    """One process: the length at once, then `decode` tokens, REPEATS times."""
    adapter = next((f" --adapter {i}/{name}" for name in names if name.startswith("adapter")), "")
    text = ",".join(map(str, tokens(length + decode)))
    transport.shell(
        f"LD_LIBRARY_PATH=. {runner} {i}/model.pte{adapter} --tokens {text} --prefill {length} "
        f"--threads {threads} --repeat {REPEATS} --times times.txt"
    )
    return read_times(transport.shell("cat times.txt"))


def read_times(text: str) -> Times:
    """The runner's lines."""
    times = []
    for line in text.splitlines():
        phase, count, ms = line.split()
        times.append((phase, int(count), float(ms)))
    return times


def _blocks(times: Times) -> list[Times]:
    """The steps of each repetition, without the load."""
    blocks: list[Times] = []
    for step in times:
        if step[0] == "prefill":
            blocks.append([])
        if blocks:
            blocks[-1].append(step)
    return blocks
