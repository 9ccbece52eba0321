"""ExecuTorch programs: load, swap the adapter, run."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lordba.adapter import Adapter
from lordba.bundle import Bundle
from lordba.errors import LordbaError
from lordba.install import write_blob

if TYPE_CHECKING:
    from executorch.runtime import Runtime


class Program:
    """A program's `forward` in ExecuTorch's runtime, with our kernels and ExecuTorch's LLM and quantized ones."""

    def __init__(self, program: Path | bytes, data: Path | None = None, *, trace: bool = False) -> None:
        # The method refers to the program's memory without owning it: both must live as long as this.
        self._program = _runtime().load_program(program, data_path=data, enable_etdump=trace)
        self._method = self._program.load_method("forward")

    def execute(self, inputs: Sequence[object]) -> Sequence[Tensor]:
        """Run once; the tensors returned are overwritten by the next call."""
        return self._method.execute(inputs)

    def write_trace(self, path: Path) -> None:
        """Write the times of every operator of every call so far, as an ETDump; needs `trace`."""
        self._program.write_etdump_result_to_file(str(path), "")


class ExecuTorchRunner:
    """See session.Runner. In ptd mode a swap loads the program again with another data file; in input mode it is a
    new argument. With `trace` ExecuTorch notes the times of all operators, for `write_trace`."""

    def __init__(self, bundle: Bundle, *, trace: bool = False) -> None:
        self.bundle = bundle
        self._trace = trace
        self.longest = bundle.manifest.max_seq_len - 1  # the program's longest input
        _check_operators(bundle)
        self._program: Program | None = None
        self._blob: Tensor | None = None

    def load(self, adapter: str | None) -> Path | Tensor | None:
        file = self.bundle.adapter_file(adapter)
        if file is None or self.bundle.manifest.adapter_mode != "input":
            return file
        return torch.from_numpy(np.fromfile(file, dtype=np.uint8))

    def use(self, loaded: Path | Tensor | None) -> None:
        if isinstance(loaded, Tensor):
            self._blob = loaded
            self._program = self._program or Program(self.bundle.program, trace=self._trace)
        else:
            self._program = Program(self.bundle.program, loaded, trace=self._trace)

    def write_trace(self, path: Path) -> None:
        """Write the ETDump of the program since its last swap."""
        assert self._program is not None
        self._program.write_trace(path)

    def write(self, adapter: Adapter, path: Path) -> None:
        write_blob(self.bundle, adapter, path)

    def run(self, tokens: Sequence[int], start: int) -> np.ndarray:
        assert self._program is not None
        inputs = [torch.tensor([list(tokens)]), torch.tensor([start])]
        logits = self._program.execute(inputs if self._blob is None else [*inputs, self._blob])[0]
        return logits.flatten().numpy().copy()


def set_threads(threads: int) -> None:
    """Give ExecuTorch's pool, which XNNPACK and our kernels share, that many threads; no program may be loaded yet.

    Attention runs on torch's threads, which OMP_NUM_THREADS sets before torch loads.
    """
    _runtime()
    from executorch.extension.pybindings import portable_lib

    portable_lib._unsafe_reset_threadpool(threads)
    found = portable_lib._threadpool_get_thread_count()
    if found != threads:
        raise LordbaError(
            f"ExecuTorch runs on {found} threads where {threads} were asked for; ask for {found} or fewer"
        )


def _check_operators(bundle: Bundle) -> None:
    missing = set(bundle.manifest.requires) - set(_runtime().operator_registry.operator_names)
    if missing:
        raise LordbaError(
            f"{bundle.program}: needs operators that this runtime lacks: {', '.join(sorted(missing))}; "
            f"the bundle was made with {bundle.manifest.toolchain}"
        )


def _runtime() -> "Runtime":
    import executorch.kernels.quantized  # noqa: F401 (quantized embedding)
    from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401 (KV cache and attention)
    from executorch.runtime import Runtime

    from lordba.backends.executorch import load

    load()
    return Runtime.get()
