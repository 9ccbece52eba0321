"""The machine that measures itself: processor, memory, versions, load."""

import os
import platform
from pathlib import Path
from typing import Any

from lordba.profiling.record import Device
from lordba.runtime.bundle import Bundle


def this_device() -> Device:
    """This machine, as the record describes devices."""
    memory = _meminfo()
    system = f"{platform.system()} {platform.release()}"
    return Device(processor(), platform.machine(), system, memory.get("MemTotal", 0), memory.get("MemAvailable", 0))


def machine_of(bundle: Bundle) -> dict[str, Any]:
    """Processor, cores and the versions that decide how fast a program runs."""
    return {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "isa": _vector_sets(),
        "python": platform.python_version(),
        "versions": dict(bundle.manifest.toolchain),
    }


def processor() -> str:
    """The processor's name."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def load_average() -> float:
    """Processes that ran or waited during the last minute."""
    return round(os.getloadavg()[0], 2)


def _vector_sets() -> list[str]:
    flags = set(_cpuinfo().get("flags", _cpuinfo().get("Features", "")).split())
    return [
        name for name in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "asimd", "asimddp", "i8mm") if name in flags
    ]


def _cpuinfo() -> dict[str, str]:
    return _fields(Path("/proc/cpuinfo"))


def _meminfo() -> dict[str, int]:
    return {key: int(value.split()[0]) * 1024 for key, value in _fields(Path("/proc/meminfo")).items()}


def _fields(path: Path) -> dict[str, str]:
    """The first value of each key in a file of `key: value` lines; nothing where there is no such file."""
    if not path.is_file():
        return {}
    pairs = [line.partition(":") for line in path.read_text().splitlines() if ":" in line]
    return {key.strip(): value.strip() for key, _, value in reversed(pairs)}
