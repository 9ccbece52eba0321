"""The C side of the kernel benchmark: build it, describe the machine, time pools of modules, measure the roofs."""

import ctypes
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lordba.errors import LordbaError

DTYPES = {"fp32": 0, "fp16": 1, "bf16": 2}
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def build(folder: Path) -> ctypes.CDLL:
    """Compile the kernels, the dense LoRA and the driver for this machine into `folder`, and load them."""
    cmake = shutil.which("cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if cmake is None:
        raise LordbaError("the benchmark compiles C and found no cmake: pip install cmake")
    source = Path(__file__).parents[1] / "native"
    for command in ([cmake, "-S", str(source), "-B", str(folder)], [cmake, "--build", str(folder)]):
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode != 0:
            errors = [line for line in (result.stdout + result.stderr).splitlines() if "rror" in line]
            raise LordbaError(f"the benchmark does not build: {' '.join(command)}: {' '.join(errors[:5])}")
    library = ctypes.CDLL(str(folder / "libkernels_driver.so"))
    size, pointer, double = ctypes.c_size_t, ctypes.c_void_p, ctypes.c_double
    for name, result_type, arguments in (
        ("pool_of_signs", pointer, [ctypes.c_char_p, pointer, size, ctypes.c_bool, size]),
        ("pool_of_dense", pointer, [ctypes.c_bool, pointer, pointer, size, size, size, size]),
        ("pool_set", ctypes.c_int, [pointer, size, ctypes.c_int, pointer, pointer]),
        ("pool_bytes", size, [pointer]),
        ("pool_threads", size, [pointer, size]),
        ("pool_run", double, [pointer, size, size, ctypes.c_bool]),
        ("pool_free", None, [pointer]),
        ("has_isa", ctypes.c_bool, [ctypes.c_char_p]),
        ("roof_multiply_adds", double, [size]),
        ("roof_read", double, [size, size]),
        ("roof_cycles", double, []),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result_type, arguments
    return library


def address(array: NDArray) -> int:
    """Where a contiguous array starts."""
    assert array.flags.c_contiguous
    return array.ctypes.data


class Pool:
    """Copies of one module in C, and the y += adapter(x) to run on them."""

    def __init__(self, library: ctypes.CDLL, handle: int | None, what: str) -> None:
        if handle is None:
            raise LordbaError(f"{what}: no such kernels on this CPU, or not enough memory; choose others with --isa")
        self._library = library
        self._handle: int | None = handle

    @classmethod
    def of_signs(cls, library: ctypes.CDLL, isa: str, blob: NDArray, prepared: bool, modules: int) -> "Pool":
        """Copies of module 0 of an adapter blob, for the kernels of one instruction set."""
        handle = library.pool_of_signs(isa.encode(), address(blob), blob.nbytes, prepared, modules)
        return cls(library, handle, isa)

    @classmethod
    def of_dense(cls, library: ctypes.CDLL, a_t: NDArray, b_t: NDArray, modules: int) -> "Pool":
        """Copies of a dense LoRA, a_t [d_in, r] and b_t [r, d_out], both fp32 or both fp16."""
        (d_in, r), d_out = a_t.shape, b_t.shape[1]
        half = a_t.dtype == np.float16
        handle = library.pool_of_dense(half, address(a_t), address(b_t), d_in, d_out, r, modules)
        return cls(library, handle, "dense LoRA")

    @property
    def bytes(self) -> int:
        """Weights that one call reads."""
        return self._library.pool_bytes(self._handle)

    def set(self, dtype: str, x: NDArray, y: NDArray) -> None:
        """What calls compute from now on; bf16 arrays are uint16. The arrays are kept alive."""
        status = self._library.pool_set(self._handle, len(x), DTYPES[dtype], address(x), address(y))
        if status != 0:
            raise LordbaError(f"the kernels refuse x {x.shape} {dtype}: status {status}")
        self._x, self._y = x, y

    def run(self, threads: int, calls: int, cold: bool) -> float:
        """Seconds of so many calls."""
        return self._library.pool_run(self._handle, threads, calls, cold)

    def threads_used(self, threads: int) -> int:
        """How many of the threads offered a call uses."""
        return self._library.pool_threads(self._handle, threads)

    def close(self) -> None:
        """Give the memory back; the pool is of no use from now on."""
        self._library.pool_free(self._handle)
        self._handle = None


@dataclass(frozen=True)
class Roofs:
    """What `threads` threads together can do at best: the best of several short runs."""

    threads: int
    multiply_adds_per_s: float
    read_bytes_per_s: dict[str, float]  # by where the data lies: L1, L2, L3, memory


def measure_roofs(library: ctypes.CDLL, threads: int, memory_bytes: int) -> Roofs:
    """fp32 multiply-adds per second, and bytes read per second from each cache and from memory."""
    sizes = {name: size // 2 for name, size in cache_sizes().items()}
    sizes["memory"] = memory_bytes
    if "L3" in sizes:  # shared
        sizes["L3"] //= threads
    return Roofs(
        threads,
        max(library.roof_multiply_adds(threads) for _ in range(9)),
        {name: max(library.roof_read(threads, size) for _ in range(3)) for name, size in sizes.items()},
    )


def cache_sizes() -> dict[str, int]:
    """Bytes of the first core's data caches, by name."""
    sizes = {}
    for index in sorted(CACHES.glob("index*")):
        if (index / "type").read_text().strip() != "Instruction":
            kib = (index / "size").read_text().strip().removesuffix("K")
            sizes["L" + (index / "level").read_text().strip()] = 1024 * int(kib)
    return sizes


def describe_machine(library: ctypes.CDLL | None = None) -> dict[str, object]:
    """CPU, caches, memory, compiler: what the figures depend on; the clock needs the library."""
    lines = [line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line]
    info = {key.strip(): value.strip() for key, value in lines}
    flags = set(info.get("flags", info.get("Features", "")).split())
    wanted = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_bf16", "avx512_vnni", "asimd", "asimddp", "i8mm")
    pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    compiler = subprocess.run(["cc", "--version"], capture_output=True, text=True).stdout.splitlines()[:1]
    return {
        "cpu": info.get("model name", platform.machine()),
        "family_model": f"{info.get('cpu family', '?')}/{info.get('model', '?')}",
        "flags": [flag for flag in wanted if flag in flags],
        "cores": os.cpu_count(),
        "ghz_estimate": library and round(max(library.roof_cycles() for _ in range(5)) / 1e9, 2),
        "cache_bytes": cache_sizes(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "virtual_machine": "hypervisor" in flags,
        "huge_pages": pages.read_text().strip() if pages.exists() else "unknown",
        "system": f"{platform.system()} {platform.release()}",
        "compiler": compiler[0] if compiler else "unknown",
    }
