"""One cell of the benchmark: all contestants of a shape, in turns, and the rows that come of it (docs/kernels.md)."""

import ctypes
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from lordba.adapter import SignModule
from lordba.blob import make_blob
from lordba.errors import LordbaError
from lordba.ops import sign_adapter_blob
from lordba.scales import ScaleCode, encode_scales
from lordba.signs import pack_signs

from .baselines import Contestant, DenseC, OnnxRuntime, Torch, Xnnpack
from .native import Pool, Roofs

BASELINES = ("c_fp32", "c_fp16w", "torch_fp32", "ort_fp32", "xnnpack_fp32", "torch_bf16")
STATISTICS: dict[str, Callable[[Sequence[float]], float]] = {
    "median": statistics.median,
    "best": min,
}  # of a contestant's samples
DECODE_TOKENS = 8  # up to here a call is "decode"
LEAST_REPEATS, LONGEST_CELL_S = 5, 2.0  # slow cells get fewer repeats
WRONG = 0.02  # relative error; bf16 of a runtime that rounds h as well stays below
TICK_S = 0.005  # longer than the system's, at which it accounts for the time that threads use


@dataclass(frozen=True)
class Shape:
    """A square module."""

    d: int
    r: int

    @property
    def dense_bytes(self) -> int:
        """Of fp32 weights."""
        return 2 * self.d * self.r * 4

    def __str__(self) -> str:
        return f"{self.d}x{self.r}"


@dataclass(frozen=True)
class Plan:
    """What to measure, and for how long."""

    shapes: tuple[Shape, ...]
    tokens: tuple[int, ...]
    caches: tuple[str, ...]  # hot, cold
    threads: tuple[int, ...]
    isas: tuple[str, ...]
    dtypes: tuple[str, ...]  # of our kernels: fp32, bf16
    baselines: tuple[str, ...]
    scales: ScaleCode
    prepared: bool
    repeats: int
    sample_s: float
    statistic: str
    pool_bytes: int

    @property
    def cells(self) -> int:
        return len(self.shapes) * len(self.threads) * len(self.tokens) * len(self.caches)


@dataclass(frozen=True)
class Weights:
    """Random weights of one shape: the adapter's blob, and a dense LoRA a [r, d], b [d, r] with outputs as small."""

    blob: NDArray
    a: NDArray
    b: NDArray

    @classmethod
    def random(cls, shape: Shape, scales: ScaleCode) -> "Weights":
        generator = torch.Generator().manual_seed(0)

        def matrix(rows: int, columns: int) -> torch.Tensor:
            return torch.randn(rows, columns, generator=generator)

        def positive(n: int, size: float) -> torch.Tensor:
            return size * torch.exp(0.5 * torch.randn(n, generator=generator))

        d, r = shape.d, shape.r
        vectors = (positive(d, d**-0.5), positive(r, 1.0), positive(d, 1e-3 * r**-0.5))
        module = SignModule(
            pack_signs(matrix(r, d)), pack_signs(matrix(d, r)), *(encode_scales(v, scales) for v in vectors)
        )
        return cls(
            make_blob([module]).numpy(), (matrix(r, d) * d**-0.5).numpy(), (matrix(d, r) * 1e-3 * r**-0.5).numpy()
        )


class SignKernels:
    """Ours: the kernels of one instruction set, on x and y of one dtype."""

    own_threads = False

    def __init__(self, isa: str, dtype: str, pool: Pool, weights: Weights, threads: int) -> None:
        self.name, self.isa, self.dtype, self.weight_bytes = f"{isa}/{dtype}", isa, dtype, pool.bytes
        self._pool, self._weights, self._threads = pool, weights, threads
        self._d_out = len(weights.b)

    def set(self, x: NDArray) -> None:
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[self.dtype]
        self._x = torch.from_numpy(x).to(dtype)
        self._y = torch.zeros(len(x), self._d_out, dtype=dtype)
        self._arrays = [t.view(torch.uint16).numpy() if self.dtype == "bf16" else t.numpy() for t in (self._x, self._y)]

    def delta(self) -> NDArray:
        self.seconds(1, cold=False)
        return self._y.double().numpy()

    def seconds(self, calls: int, cold: bool) -> float:
        self._pool.set(self.dtype, *self._arrays)  # both dtypes share the pool
        return self._pool.run(self._threads, calls, cold) / calls

    def threads_used(self) -> int:
        """What the library's plan makes of the threads offered."""
        self._pool.set(self.dtype, *self._arrays)
        return self._pool.threads_used(self._threads)

    def error(self) -> float:
        """Of `delta` against the float64 oracle, as `relative_error` has it."""
        picked = picked_tokens(len(self._x))
        x, blob = self._x[picked].double(), torch.from_numpy(self._weights.blob)
        return relative_error(self.delta()[picked], sign_adapter_blob(x, blob, 0, x.shape[1], [self._d_out]).numpy())


@dataclass
class Field:
    """All contestants of one shape and thread count."""

    signs: list[SignKernels]
    baselines: list[Contestant]
    pools: list[Pool]
    weights: Weights

    def close(self) -> None:
        """Give the pools' memory back."""
        for pool in self.pools:
            pool.close()


def assemble(library: ctypes.CDLL, plan: Plan, shape: Shape, threads: int, programs: Path) -> Field:
    """Build every contestant that the plan names; each has a pool of modules of its own, as large in bytes."""
    weights = Weights.random(shape, plan.scales)
    field = Field([], [], [], weights)

    def modules(module_bytes: int) -> int:
        return -(-plan.pool_bytes // module_bytes)

    def keep(pool: Pool) -> Pool:
        field.pools.append(pool)
        return pool

    for isa in plan.isas:
        probe = Pool.of_signs(library, isa, weights.blob, plan.prepared, 1)
        count = modules(probe.bytes)
        probe.close()
        pool = keep(Pool.of_signs(library, isa, weights.blob, plan.prepared, count))
        field.signs += [SignKernels(isa, dtype, pool, weights, threads) for dtype in plan.dtypes]
    a_t, b_t = np.ascontiguousarray(weights.a.T), np.ascontiguousarray(weights.b.T)
    for name in plan.baselines:
        if name in ("c_fp32", "c_fp16w"):
            dtype = np.float32 if name == "c_fp32" else np.float16
            count = modules(shape.dense_bytes * np.dtype(dtype).itemsize // 4)
            field.baselines.append(
                DenseC(
                    name, keep(Pool.of_dense(library, a_t.astype(dtype), b_t.astype(dtype), count)), shape.d, threads
                )
            )
        elif name in ("torch_fp32", "torch_bf16"):
            torch_dtype = torch.float32 if name == "torch_fp32" else torch.bfloat16
            count = modules(shape.dense_bytes * torch_dtype.itemsize // 4)
            field.baselines.append(Torch(name, torch_dtype, weights.a, weights.b, count, threads))
        elif name == "ort_fp32":
            wanted = modules(shape.dense_bytes) if "cold" in plan.caches else 0
            field.baselines.append(OnnxRuntime(weights.a, weights.b, wanted, threads))
        else:
            field.baselines.append(Xnnpack(programs / f"{shape}.pte", shape.d, shape.dense_bytes, threads))
    return field


def compete(contestants: Sequence[Contestant], cold: bool, threads: int, plan: Plan) -> dict[str, list[float]]:
    """Microseconds per call of every sample, by name: rounds in which each has its turn, in random order."""
    shuffled = random.Random(0)
    calls: dict[str, int] = {}
    round_s = 0.0
    for contestant in contestants:
        once = contestant.seconds(1, cold)
        if once is not None:
            start = time.perf_counter()
            again = contestant.seconds(max(1, int(0.1 * plan.sample_s / once)), cold) or once
            round_s += max(plan.sample_s, time.perf_counter() - start)  # longer: a chain runs as a whole
            calls[contestant.name] = max(1, int(plan.sample_s / min(once, again)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    running = [contestant for contestant in contestants if contestant.name in calls]
    for _ in range(min(plan.repeats, max(LEAST_REPEATS, int(LONGEST_CELL_S / round_s)))):
        shuffled.shuffle(running)
        for contestant in running:
            n = calls[contestant.name]
            if not cold and n > 1:  # its weights come back into the caches
                contestant.seconds(max(1, n // 8), cold)
            samples[contestant.name].append(1e6 * (contestant.seconds(n, cold) or 0.0))
            if contestant.own_threads and threads > 1:
                settle()
    return samples


def settle() -> None:
    """Wait until idle threads of the runtimes have stopped spinning, which they do for milliseconds after a call."""
    for _ in range(6):
        before = time.process_time()
        time.sleep(TICK_S)
        if time.process_time() - before < 0.1 * TICK_S:
            return


def spread(samples: Sequence[float]) -> float:
    """Interquartile range relative to the median."""
    if len(samples) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return (high - low) / middle


def measure(
    library: ctypes.CDLL, plan: Plan, roofs: dict[int, Roofs], programs: Path
) -> Iterator[list[dict[str, object]]]:
    """Measure cell by cell, and yield each cell's rows: one for each of our kernels against each baseline."""
    for shape in plan.shapes:
        for threads in plan.threads:
            field = assemble(library, plan, shape, threads, programs)
            try:
                for tokens in plan.tokens:
                    errors, used = prepare(field, shape, tokens)
                    for cache in plan.caches:
                        samples = compete([*field.signs, *field.baselines], cache == "cold", threads, plan)
                        yield [
                            row(shape, tokens, cache, ours, theirs, samples, roofs[threads], plan.statistic)
                            | {"max_rel_err": errors[ours.name], "threads_used": used[ours.name]}
                            for ours in field.signs
                            for theirs in field.baselines
                            if theirs.name in samples and (ours.dtype == "bf16") == (theirs.name == "torch_bf16")
                        ]
            finally:
                field.close()
                del field  # XNNPACK's programs go before its threads change


def prepare(field: Field, shape: Shape, tokens: int) -> tuple[dict[str, float], dict[str, int]]:
    """Give all contestants the same x, and check them; our errors, and the threads that our plans use."""
    x = torch.randn(tokens, shape.d, generator=torch.Generator().manual_seed(tokens)).numpy()  # aligned, as all y are
    errors, used = {}, {}
    for signs in field.signs:
        signs.set(x)
        errors[signs.name], used[signs.name] = signs.error(), signs.threads_used()
        check(signs.name, errors[signs.name], shape, tokens)
    picked = picked_tokens(tokens)
    expected = x[picked].astype(np.float64) @ field.weights.a.T.astype(np.float64) @ field.weights.b.T
    for baseline in field.baselines:
        baseline.set(x)
        check(baseline.name, relative_error(baseline.delta()[picked], expected), shape, tokens)
    return errors, used


def check(name: str, error: float, shape: Shape, tokens: int) -> None:
    """Refuse to time what computes something else."""
    if not error < WRONG:
        raise LordbaError(f"{name} computes something else at d x r = {shape}, T={tokens}: relative error {error:.2g}")


def picked_tokens(tokens: int) -> list[int]:
    """Those that are checked: the first, a middle one, the last."""
    return sorted({0, tokens // 2, tokens - 1})


def relative_error(found: NDArray, expected: NDArray) -> float:
    """The largest difference, relative to the largest expected magnitude."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def row(
    shape: Shape,
    tokens: int,
    cache: str,
    ours: SignKernels,
    theirs: Contestant,
    samples: dict[str, list[float]],
    roofs: Roofs,
    statistic: str,
) -> dict[str, object]:
    """One comparison. Roof fractions: multiply-adds (ours: signed additions) and, cold, weights read from memory."""
    ours_us, theirs_us = (STATISTICS[statistic](samples[side.name]) for side in (ours, theirs))
    work = 2 * tokens * shape.d * shape.r

    def fractions(side: str, us: float, weight_bytes: int) -> dict[str, object]:
        read = weight_bytes / (us * 1e-6) / roofs.read_bytes_per_s["memory"]
        return {
            f"{side}_weight_bytes": weight_bytes,
            f"{side}_of_fma_roof": round(work / (us * 1e-6) / roofs.multiply_adds_per_s, 4),
            f"{side}_of_read_roof": round(read, 4) if cache == "cold" else None,
        }

    return {
        "phase": "decode" if tokens <= DECODE_TOKENS else "prefill",
        "T": tokens,
        "d_in": shape.d,
        "d_out": shape.d,
        "r": shape.r,
        "dtype": ours.dtype,
        "isa": ours.isa,
        "threads": roofs.threads,
        "cache": cache,
        "ours_us": round(ours_us, 4),
        "ours_spread": round(spread(samples[ours.name]), 4),
        "baseline": theirs.name,
        "baseline_us": round(theirs_us, 4),
        "baseline_spread": round(spread(samples[theirs.name]), 4),
        "ratio": round(theirs_us / ours_us, 4),
        "activation_bytes": 3 * tokens * shape.d * (2 if ours.dtype == "bf16" else 4),
        **fractions("ours", ours_us, ours.weight_bytes),
        **fractions("baseline", theirs_us, theirs.weight_bytes),
    }
