"""ExecuTorch programs: load, swap the adapter, run."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lordba.adapter import Adapter
from lordba.blob import MAGIC
from lordba.errors import LordbaError
from lordba.runtime.bundle import Bundle
from lordba.runtime.install import write_blob

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


class _DataFile:
    """A program's data file, a private and unnamed one that ExecuTorch maps: what is written is what the program reads.

    So an adapter changes without loading the program, and packing its base, again.
    """

    def __init__(self, data: bytes) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the program that maps it)
        self.path = Path(f"/dev/fd/{self._file.fileno()}")
        self.head = _head(data)
        self.size = len(data)
        self.write(data)

    def takes(self, data: bytes) -> bool:
        """Whether these bytes may replace the others: a program reads all but the blob only when it is loaded."""
        return len(data) == self.size and _head(data) == self.head

    def write(self, data: bytes) -> None:
        self._file.seek(0)
        self._file.write(data)
        self._file.flush()


def _head(data: bytes) -> bytes:
    """What precedes the adapter in a data file: its key, its type, its size."""
    return data[: data.find(MAGIC)]


class ExecuTorchRunner:
    """See session.Runner. A swap writes other bytes into the program's data file (ptd mode) or is a new argument (input
    mode). With `trace` ExecuTorch notes the times of all operators, for `write_trace`."""

    def __init__(self, bundle: Bundle, *, trace: bool = False) -> None:
        self.bundle = bundle
        self._trace = trace
        self.longest = bundle.manifest.max_seq_len - 1  # the program's longest input
        _check_operators(bundle)
        self._program: Program | None = None
        self._data: _DataFile | None = None
        self._blob: Tensor | None = None

    def load(self, adapter: str | None) -> bytes | Tensor | None:
        file = self.bundle.adapter_file(adapter)
        if file is None:
            return None
        if self.bundle.manifest.adapter_mode != "input":
            return file.read_bytes()
        return torch.from_numpy(np.fromfile(file, dtype=np.uint8))

    def use(self, loaded: bytes | Tensor | None) -> None:
        if not isinstance(loaded, bytes):
            self._blob = loaded
            self._program = self._program or Program(self.bundle.program, trace=self._trace)
        elif self._data and self._data.takes(loaded):
            self._data.write(loaded)
        else:
            data = _DataFile(loaded)
            self._program, self._data = Program(self.bundle.program, data.path, trace=self._trace), data

    def write_trace(self, path: Path) -> None:
        """Write the ETDump of the program since it was loaded."""
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
