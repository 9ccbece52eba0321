"""64-bit ARM in emulation: how many instructions a program executes. A count is no time, and none is given.

qemu notes every block of code that it runs, and the instructions of a block when it first meets it. What a step
executes is the difference between two runs of the runner, one of which takes that step once more.
"""

import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from lordba.errors import LordbaError
from lordba.profiling.host import machine_of
from lordba.profiling.plan import Plan, Variant
from lordba.profiling.record import Device, profile_json
from lordba.profiling.worker import tokens
from lordba.runtime.bundle import read_bundle

EMULATOR = "qemu-aarch64-static"
COMMAND = (EMULATOR, "-L", "/usr/aarch64-linux-gnu", "-cpu", "max,sme=off")
LARGEST = 20 << 20
"""Bytes of a program; emulation notes some million blocks per second of waiting."""


def instructions_of(log: Iterable[bytes]) -> int:
    """Executed instructions, from a log of `-d in_asm,exec,nochain`."""
    lengths: dict[bytes, int] = {}
    block, length, total = b"", 0, 0
    for line in log:
        if line.startswith(b"Trace"):
            total += lengths[line.split(b"/", 2)[1]]
        elif line.startswith(b"0x"):
            block = block or b"%016x" % int(line[: line.index(b":")], 16)
            length += 1
        elif block:  # the empty line after a block
            lengths[block], block, length = length, b"", 0
    return total


def executed(command: Sequence[str]) -> int:
    """Instructions that the runner executes, from its start to its end."""
    with tempfile.TemporaryDirectory() as folder:
        pipe = Path(folder) / "log"
        os.mkfifo(pipe)
        count: list[int] = []

        def read() -> None:
            with pipe.open("rb") as log:
                count.append(instructions_of(log))

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        emulator = [*COMMAND, "-d", "in_asm,exec,nochain", "-D", str(pipe)]
        result = subprocess.run([*emulator, *command], capture_output=True, text=True)
        if result.returncode:
            raise LordbaError(f"the emulated runner failed with {result.returncode}: {result.stderr.strip()[-300:]}")
        reader.join()
    return count[0]


def count_instructions(runner: Path, plan: Plan, notes: Sequence[str], report: Callable[[str, int, int], None]) -> str:
    """The profile file's text with `instructions` of every variant, for prefill by length and decode; no rows."""
    if shutil.which(EMULATOR) is None:
        raise LordbaError(f"{EMULATOR} is not installed; run: scripts/arm64_toolchain.sh")
    if not runner.is_file():
        raise LordbaError(f"{runner}: no such runner; build one by: scripts/arm64_runner.sh FOLDER")
    rows: list[dict[str, Any]] = []
    for i, variant in enumerate(plan.variants):
        command = [str(runner), *_program(variant), "--threads", "1"]
        for length in plan.lengths:
            twice, thrice = (executed([*command, "--tokens", _ids(length), "--repeat", str(times)]) for times in (2, 3))
            rows.append({**variant.about, "phase": "prefill", "T": length, "instructions": thrice - twice})
        fewer, more = (
            executed([*command, "--tokens", _ids(plan.context + n), "--prefill", str(plan.context)]) for n in (2, 3)
        )
        rows.append({**variant.about, "phase": "decode", "T": 1, "instructions": more - fewer})
        report("counting", len(plan.variants), i + 1)
    device = Device("emulated arm64", "aarch64", EMULATOR, 0, 0)
    bundle = read_bundle(Path(plan.variants[0].folder))
    machine = {"cpu": " ".join(COMMAND[-2:]), "versions": machine_of(bundle)["versions"]}
    conditions = {"context": plan.context, "notes": ["executed instructions, which are no times", *notes]}
    return profile_json([], device, machine, conditions, {"instructions": rows})


def _program(variant: Variant) -> list[str]:
    bundle = read_bundle(Path(variant.folder))
    if bundle.program.stat().st_size > LARGEST:
        raise LordbaError(
            f"{bundle.program}: is larger than {LARGEST >> 20} MB; count the instructions of a small model"
        )
    adapter = bundle.adapter_file(variant.use)
    return [str(bundle.program), *(["--adapter", str(adapter)] if adapter else [])]


def _ids(n: int) -> str:
    return ",".join(map(str, tokens(n)))
