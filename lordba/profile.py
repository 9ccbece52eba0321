"""`python -m lordba.profile BUNDLE`: how long a bundle takes to load, swap, prefill and decode, and why."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from rich.progress import TaskID

from lordba.console import console, progress_bar, quiet_libraries, run_command
from lordba.errors import LordbaError
from lordba.files import new_file
from lordba.runtime.bundle import Bundle, read_bundle

DESCRIPTION = """\
Measure a bundle on this machine: load, swap, prefill by length, decode per token, peak memory, and the time of each
group of operators. All programs take turns, in fresh processes per thread count; a difference below the noise is not
quoted. --against adds programs to compare with, which lordba.export --adapter-form makes.
"""
EXAMPLES = """\
examples:
  python -m lordba.profile bundle-executorch --adapter shakespeare
  python -m lordba.export --target executorch --adapter shakespeare=./shakespeare --adapter-form none
  python -m lordba.export --target executorch --adapter shakespeare=./shakespeare --adapter-form lora-fp32
  python -m lordba.profile bundle-executorch --adapter shakespeare --threads 1,2 --json after.json --html after.html \\
    --against bundle-executorch-none --against bundle-executorch-lora-fp32
  python -m lordba.profile --compare before.json after.json
  python -m lordba.profile --show phone.json --html phone.html
  python -m lordba.profile bundle-executorch --device adb --runner build-android/lordba_runner --json phone.json
"""

LOADS, SWAPS = 7, 10
LEAST = 3
"""Samples that a spread can be told from."""


def numbers(text: str) -> list[int]:
    """A list of positive numbers, as an argument."""
    values = [int(word) for word in text.split(",")]
    if min(values) < 1:
        raise ValueError
    return values


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    result = argparse.ArgumentParser(
        "python -m lordba.profile",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = result.add_argument
    add("bundle", type=Path, nargs="?", help="a folder made by lordba.export")
    add("--adapter", help="an adapter of the bundle by name, or none (default: the first)")
    add(
        "--against",
        type=Path,
        action="append",
        default=[],
        metavar="BUNDLE",
        help="a bundle of the same base made with --adapter-form; repeat for several. "
        "Without one of form none, overheads are over the bundle's own program with no adapter",
    )
    add("--prompt-lengths", type=numbers, default=[32, 128, 512], metavar="N,..", help="default: 32,128,512")
    add("--decode", type=int, default=32, metavar="N", help="tokens per round (default: 32)")
    add("--threads", type=numbers, default=[1], metavar="N,..", help="thread counts (default: 1)")
    add(
        "--clock",
        default="wall",
        choices=["wall", "cpu"],
        help="cpu: processor time, for a machine that does other work too, with one thread (default: wall)",
    )
    add("--rounds", type=int, default=3, metavar="N", help="rounds in each process (default: 3)")
    add("--processes", type=int, default=6, metavar="N", help="processes per thread count (default: 6)")
    add(
        "--device",
        default="here",
        choices=["here", "adb", "qemu-arm64", "ios"],
        help="adb: a phone, through a runner built for it; qemu-arm64: executed instructions of a small ExecuTorch "
        "bundle in emulation, no times; ios: the app measures and exports its file, see --show (default: here)",
    )
    add("--runner", type=Path, help="adb, qemu-arm64: the runner (scripts/arm64_runner.sh builds one for Linux)")
    add("--json", type=Path, help="write the profile file")
    add("--html", type=Path, help="write a page, complete in one file")
    add("--compare", type=Path, nargs=2, metavar="JSON", help="two profile files: what changed from one to the other")
    add("--show", type=Path, metavar="JSON", help="a profile file made elsewhere, such as by an app on a phone")
    return result


def main() -> None:
    arguments = parser().parse_args()
    if arguments.compare:
        compare(*arguments.compare)
        return
    if arguments.show:
        from lordba.profiling.record import read_profile

        read_profile(arguments.show)
        text = arguments.show.read_text()
    elif arguments.device == "ios":
        raise LordbaError(
            "iOS apps measure by themselves: export the profile from the app, copy it here, and name it with --show"
        )
    elif arguments.bundle:
        text = measure(arguments)
    else:
        raise LordbaError("name a bundle to measure, or two profiles with --compare, or one with --show")
    write(text, arguments.json, arguments.html)


def measure(arguments: argparse.Namespace) -> str:
    """Measure on this machine; returns the profile file's text."""
    from lordba.profiling import plan as plans
    from lordba.profiling.local import profile

    if min(arguments.decode, arguments.rounds, arguments.processes) < 1:
        raise LordbaError("--decode, --rounds and --processes must be at least 1")
    if arguments.rounds * arguments.processes < LEAST:
        raise LordbaError(f"--rounds times --processes must be at least {LEAST}: fewer say nothing of the noise")
    bundle, against = read_bundle(arguments.bundle), [read_bundle(folder) for folder in arguments.against]
    if arguments.clock == "cpu" and arguments.threads != [1]:
        raise LordbaError("--clock cpu adds the times of all threads up; measure one thread with it")
    if bundle.manifest.target not in ("executorch", "onnx") or bundle.manifest.adapter_mode == "methods":
        raise LordbaError(f"{bundle.folder}: Core ML programs run on Apple systems alone; measure them in an app")
    entries = bundle.manifest.adapters
    name = arguments.adapter or (entries[0].name if entries else "none")
    variants = plans.variants_of(bundle, None if name == "none" else name, against)
    lengths, dropped = plans.fitting_lengths(arguments.prompt_lengths, [bundle, *against], arguments.decode)
    for line in dropped:
        console(stderr=True).print("note:", line, soft_wrap=True)
    notes = [*dropped, *base_note(variants)]
    context = plans.context_of([bundle, *against], arguments.decode)
    threads = arguments.threads
    plan = plans.Plan(
        variants,
        lengths,
        arguments.decode,
        context,
        threads[0],
        arguments.rounds,
        LOADS,
        SWAPS,
        clock=arguments.clock,
    )
    quiet_libraries()
    with progress_bar() as progress:
        tasks: dict[str, TaskID] = {}

        def report(what: str, total: int, done: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total)
            progress.update(tasks[what], completed=done)

        if arguments.device == "here":
            return profile(bundle, plan, threads, arguments.processes, notes, report)
        runner = check_runner(arguments, bundle)
        if arguments.device == "qemu-arm64":
            from lordba.profiling.emulator import count_instructions

            return count_instructions(runner, plan, notes, report)
        from lordba.profiling.device import Adb, phone_profile

        return phone_profile(Adb(), runner, plan, arguments.processes, notes, report)


def check_runner(arguments: argparse.Namespace, bundle: Bundle) -> Path:
    """The runner that another machine needs."""
    if bundle.manifest.target != "executorch":
        raise LordbaError(
            f"--device {arguments.device} runs ExecuTorch bundles; {bundle.folder} is for another runtime"
        )
    if arguments.runner is None:
        raise LordbaError(f"--device {arguments.device} needs --runner: backends/executorch/runner, built for it")
    if len(arguments.threads) > 1:
        raise LordbaError(f"--device {arguments.device} takes one number of --threads")
    return arguments.runner


def base_note(variants: Sequence) -> list[str]:
    """What the overheads are over, where that is not a program without adapter nodes."""
    if any(variant.adapter == "lordba" and variant.adapter_name is None for variant in variants):
        return []
    return ["the base is the bundle's own program with no adapter, which still calls the adapter op"]


def write(text: str, json_file: Path | None, html_file: Path | None) -> None:
    """Show a profile and write it as a file and as a page."""
    from lordba.profiling.page import page
    from lordba.profiling.report import profile_report

    record = json.loads(text)
    if html_file and not record["rows"]:
        raise LordbaError("--html: there are no times to show, only counts; leave it out")
    console().print(profile_report(record))
    for path, content in ((json_file, text), (html_file, page(record) if html_file else "")):
        if path:
            with new_file(path) as temporary:
                temporary.write_text(content)


def compare(a: Path, b: Path) -> None:
    """Print what changed between two profile files."""
    from lordba.profiling.changes import changes, changes_table
    from lordba.profiling.record import read_profile

    first, second = read_profile(a), read_profile(b)
    console().print(changes_table(changes(first, second)))
    for name, path, record in (("A", a, first), ("B", b, second)):
        device = record["rows"][0]["deviceInfo"]
        console().print(f"{name}: {path}, {device['device']}, {device['os']}", soft_wrap=True)


if __name__ == "__main__":
    run_command(main)
