"""What the sign kernels are measured against: the same y += (x A^T) B^T in C, torch, ONNX Runtime and XNNPACK.

Each contestant is built for one shape and thread count, given x and y by `set`, checked by `delta`, and timed by
`seconds`, per call.
ONNX Runtime and XNNPACK run a chain of modules in one graph, so that what one call of the runtime costs is shared
out among many modules, as in a model.
"""

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .native import Pool

CHAIN = 16  # modules of a chain whose weights are the same and stay in the cache
MOST_CHAINED = 512  # longer graphs take too long to build


class Contestant(Protocol):
    """Something to time. `weight_bytes`: what one module's weights take; `own_threads`: a pool that may spin on."""

    name: str
    weight_bytes: int
    own_threads: bool

    def set(self, x: NDArray) -> None:
        """Use this fp32 [T, d_in] and a y of zeros [T, d_out] from now on."""

    def delta(self) -> NDArray:
        """What one call adds to y, fp32 or fp64 [T, d_out]; to be asked right after `set`."""

    def seconds(self, calls: int, cold: bool) -> float | None:
        """Time of one call, on average over at least so many; None if it has no such form."""


class DenseC:
    """Our own dense LoRA in C (dense_lora.h), with fp32 or fp16 weights."""

    own_threads = False

    def __init__(self, name: str, pool: Pool, d_out: int, threads: int) -> None:
        self.name, self.weight_bytes = name, pool.bytes
        self._pool, self._d_out, self._threads = pool, d_out, threads

    def set(self, x: NDArray) -> None:
        self._y = zeros(len(x), self._d_out)
        self._pool.set("fp32", x, self._y)

    def delta(self) -> NDArray:
        self.seconds(1, cold=False)
        return self._y

    def seconds(self, calls: int, cold: bool) -> float:
        return self._pool.run(self._threads, calls, cold) / calls


class Torch:
    """Two matrix products, the second added in place, nothing allocated; torch's own threads.

    Weights lie in the order in which torch was fastest: fp32 as [d_in, r] and [r, d_out], bf16 as nn.Linear has them.
    """

    own_threads = True

    def __init__(self, name: str, dtype: torch.dtype, a: NDArray, b: NDArray, modules: int, threads: int) -> None:
        self.name, self._dtype, self._threads = name, dtype, threads
        self._transposed = dtype == torch.float32
        matrices = [torch.from_numpy(m.T if self._transposed else m) for m in (a, b)]
        weights = torch.cat([m.flatten() for m in matrices]).to(dtype)
        self.weight_bytes = weights.nbytes
        pool = weights.repeat(modules).view(modules, -1)
        order = np.random.default_rng(0).permutation(modules)
        self._shapes = tuple(m.shape for m in matrices)
        self._hot = self._factors(pool[0])
        self._cold = itertools.cycle([self._factors(pool[i]) for i in order.tolist()])

    def _factors(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """A^T [d_in, r] and B^T [r, d_out] of one module."""
        split = self._shapes[0].numel()
        a, b = weights[:split].view(self._shapes[0]), weights[split:].view(self._shapes[1])
        return (a, b) if self._transposed else (a.t(), b.t())

    def set(self, x: NDArray) -> None:
        a_t, b_t = self._hot
        self._x = torch.from_numpy(x).to(self._dtype)
        self._h = torch.empty(len(x), a_t.shape[1], dtype=self._dtype)
        self._y = torch.zeros(len(x), b_t.shape[1], dtype=self._dtype)

    def delta(self) -> NDArray:
        self.seconds(1, cold=False)
        return self._y.float().numpy()

    def seconds(self, calls: int, cold: bool) -> float:
        torch.set_num_threads(self._threads)
        x, h, y, mm = self._x, self._h, self._y, torch.mm
        modules = itertools.islice(self._cold, calls) if cold else itertools.repeat(self._hot, calls)
        with torch.inference_mode():
            start = time.perf_counter()
            for a_t, b_t in modules:
                mm(x, a_t, out=h)
                y.addmm_(h, b_t)
            return (time.perf_counter() - start) / calls


class OnnxRuntime:
    """A chain of MatMul, MatMul, Add in one session, outputs bound to memory of their own; weights prepacked by it."""

    name = "ort_fp32"
    own_threads = True

    def __init__(self, a: NDArray, b: NDArray, pool_modules: int, threads: int) -> None:
        self.weight_bytes = a.nbytes + b.nbytes
        self._a_t, self._b_t, self._threads = np.ascontiguousarray(a.T), np.ascontiguousarray(b.T), threads
        self._modules = {False: CHAIN, True: pool_modules}
        self._sessions = {False: self._session(CHAIN, shared=True)}
        if pool_modules <= MOST_CHAINED:
            self._sessions[True] = self._session(pool_modules, shared=False)

    def _session(self, modules: int, shared: bool):
        import onnxruntime
        from onnx import TensorProto, helper, numpy_helper

        d_in, d_out = len(self._a_t), self._b_t.shape[1]
        nodes, weights, y = [], [], "y"
        for i in range(modules):
            k = 0 if shared else i
            if k == i:
                scale = np.float32(1 + 1e-3 * k)  # equal weights would be shared
                weights.append(numpy_helper.from_array(scale * self._a_t, f"a{k}"))
                weights.append(numpy_helper.from_array(scale * self._b_t, f"b{k}"))
            nodes.append(helper.make_node("MatMul", ["x", f"a{k}"], [f"h{i}"]))
            nodes.append(helper.make_node("MatMul", [f"h{i}", f"b{k}"], [f"delta{i}"]))
            nodes.append(helper.make_node("Add", [y, f"delta{i}"], [f"y{i}"]))
            y = f"y{i}"
        x_info, y_info, out_info = (
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["T", d])
            for name, d in (("x", d_in), ("y", d_out), (y, d_out))
        )
        graph = helper.make_graph(nodes, "lora", [x_info, y_info], [out_info], weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = self._threads, 1, 3
        options.add_session_config_entry("session.force_spinning_stop", "1")  # after a run, not within it
        return onnxruntime.InferenceSession(
            model.SerializeToString(),
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=["CommonSubexpressionElimination"],  # equal modules of a chain are all computed
        )

    def set(self, x: NDArray) -> None:
        from onnxruntime import OrtValue

        y = zeros(len(x), self._b_t.shape[1])
        self._bindings = {}
        for cold, session in self._sessions.items():
            binding = session.io_binding()
            binding.bind_ortvalue_input("x", OrtValue.ortvalue_from_numpy(x))
            binding.bind_ortvalue_input("y", OrtValue.ortvalue_from_numpy(y))
            result = OrtValue.ortvalue_from_numpy(zeros(*y.shape))
            binding.bind_ortvalue_output(session.get_outputs()[0].name, result)
            self._bindings[cold] = (binding, result)

    def seconds(self, calls: int, cold: bool) -> float | None:
        if cold not in self._sessions:
            return None
        run, (binding, _) = self._sessions[cold].run_with_iobinding, self._bindings[cold]
        return chained(lambda: run(binding), calls, self._modules[cold])

    def delta(self) -> NDArray:
        self.seconds(1, cold=False)
        return self._bindings[False][1].numpy() / CHAIN


class Xnnpack:
    """A chain of two linears and an addition, a program delegated to XNNPACK, in ExecuTorch's runtime; hot only."""

    name = "xnnpack_fp32"
    own_threads = True

    def __init__(self, program: Path, d_out: int, weight_bytes: int, threads: int) -> None:
        from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
        from executorch.runtime import Runtime

        self._d_out, self.weight_bytes = d_out, weight_bytes
        with quiet_stderr():
            runtime = Runtime.get()
            _unsafe_reset_threadpool(threads)  # before loading: a loaded program keeps its pool
            self._program = runtime.load_program(program)
            self._method = self._program.load_method("forward")

    def set(self, x: NDArray) -> None:
        self._inputs = [torch.from_numpy(x), torch.zeros(len(x), self._d_out)]

    def seconds(self, calls: int, cold: bool) -> float | None:
        return None if cold else chained(lambda: self._method.execute(self._inputs), calls, CHAIN)

    def delta(self) -> NDArray:
        return self._method.execute(self._inputs)[0].numpy() / CHAIN


@contextlib.contextmanager
def quiet_stderr() -> Iterator[None]:
    """Drop what C++ libraries print there, which would tear the progress bar."""
    kept, devnull = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(devnull)


def zeros(*shape: int) -> NDArray:
    """fp32 zeros where a cache line starts: numpy's own need not, and vectors that cross lines are slower."""
    return torch.zeros(*shape).numpy()


def chained(run: Callable[[], object], calls: int, modules: int) -> float:
    """Time of one module when each run holds so many."""
    runs = -(-calls // modules)
    start = time.perf_counter()
    for _ in range(runs):
        run()
    return (time.perf_counter() - start) / (runs * modules)
