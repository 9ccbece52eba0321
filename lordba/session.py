"""Running a bundle's ExecuTorch program: load, swap the adapter, feed tokens, generate."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lordba.bundle import Bundle
from lordba.errors import LordbaError

if TYPE_CHECKING:
    from executorch.runtime import Runtime


class Program:
    """A program's `forward` in ExecuTorch's runtime, with our kernels and ExecuTorch's LLM and quantized ones."""

    def __init__(self, program: Path | bytes, data: Path | None = None) -> None:
        # The method refers to the program's memory without owning it: both must live as long as this.
        self._program = _runtime().load_program(program, data_path=data)
        self._method = self._program.load_method("forward")

    def execute(self, inputs: Sequence[object]) -> Sequence[Tensor]:
        """Run once; the tensors returned are overwritten by the next call."""
        return self._method.execute(inputs)


class Session:
    """One loaded program with its KV cache. `use` swaps the adapter; `feed` returns the logits of the last token.

    In ptd mode a swap loads the program again with another data file; in input mode it is a new argument.
    """

    def __init__(self, bundle: Bundle, adapter: str | None = None) -> None:
        self.bundle = bundle
        self.max_seq_len = bundle.manifest.max_seq_len
        _check_operators(bundle)
        self._program: Program | None = None
        self._blob: Tensor | None = None
        self._length = 0
        self.use(adapter)

    @property
    def length(self) -> int:
        """Tokens in the KV cache."""
        return self._length

    def use(self, adapter: str | None) -> None:
        """Switch to an adapter of the bundle, or to the base alone (None); the KV cache starts anew."""
        file = self.bundle.adapter_file(adapter)
        if self.bundle.manifest.adapter_mode == "input":
            assert file is not None
            self._blob = torch.from_numpy(np.fromfile(file, dtype=np.uint8))
            self._program = self._program or Program(self.bundle.program)
        else:
            self._program = Program(self.bundle.program, file)
        self.reset()

    def reset(self) -> None:
        """Forget the text so far; the cache is overwritten from the start."""
        self._length = 0

    def feed(self, tokens: Sequence[int]) -> np.ndarray:
        """Append tokens to the text and return the logits [vocabulary] of what comes next, float32."""
        if not tokens or self._length + len(tokens) > self.max_seq_len:
            raise LordbaError(
                f"{len(tokens)} tokens after {self._length} do not fit the program, which was exported for "
                f"{self.max_seq_len}; shorten the prompt or export with a larger --max-seq-len"
            )
        assert self._program is not None
        logits = None
        for begin in range(0, len(tokens), self.max_seq_len - 1):  # the program's longest input
            part = list(tokens[begin : begin + self.max_seq_len - 1])
            inputs = [torch.tensor([part]), torch.tensor([self._length])]
            logits = self._program.execute(inputs if self._blob is None else [*inputs, self._blob])[0]
            self._length += len(part)
        assert logits is not None
        return logits.flatten().numpy().copy()

    def generate(self, prompt: Sequence[int], max_new_tokens: int) -> Iterator[int]:
        """Greedy continuation of a prompt, token by token, until an end token or the end of the cache."""
        logits = self.feed(prompt)
        for i in range(max_new_tokens):
            token = int(logits.argmax())
            if token in self.bundle.manifest.eos_ids:
                return
            yield token
            if i + 1 == max_new_tokens or self._length >= self.max_seq_len:
                return
            logits = self.feed([token])


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
