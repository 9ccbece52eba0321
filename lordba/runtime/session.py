"""Running a bundle: load, swap the adapter, feed tokens, generate; the runtime's part is a Runner."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lordba.adapter import Adapter
from lordba.errors import LordbaError
from lordba.runtime.bundle import Bundle


class Runner(Protocol):
    """A loaded program with its KV cache, in its runtime."""

    bundle: Bundle
    """Where adapters are looked up; may be set to a newer state of the same bundle."""
    longest: int
    """How many tokens one run takes."""

    def load(self, adapter: str | None) -> Any:
        """An adapter of the bundle by its name, in the runtime's own form; None is the base alone."""
        ...

    def use(self, loaded: Any) -> None:
        """Switch to an adapter that `load` returned."""
        ...

    def write(self, adapter: Adapter, path: Path) -> None:
        """Write an adapter as a file that `load` reads; LordbaError if the program cannot take it."""
        ...

    def run(self, tokens: Sequence[int], start: int) -> np.ndarray:
        """Run tokens that follow the first `start` of the cache (0 forgets it): the last one's logits, float32."""
        ...


class Session:
    """One loaded program with its KV cache. `use` swaps the adapter; `feed` returns the logits of the last token."""

    def __init__(self, bundle: Bundle, adapter: str | None = None, runner: Runner | None = None) -> None:
        self.bundle = bundle
        self.max_seq_len = bundle.manifest.max_seq_len
        self._runner = runner or open_runner(bundle)
        self._length = 0
        self.use(adapter)

    @property
    def length(self) -> int:
        """Tokens in the KV cache."""
        return self._length

    def use(self, adapter: str | None) -> None:
        """Switch to an adapter of the bundle, or to the base alone (None); the KV cache starts anew."""
        self._runner.use(self._runner.load(adapter))
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
        logits = None
        for begin in range(0, len(tokens), self._runner.longest):
            part = tokens[begin : begin + self._runner.longest]
            logits = self._runner.run(part, self._length)
            self._length += len(part)
        assert logits is not None
        return logits

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


def open_runner(bundle: Bundle, *, reference: bool = False) -> Runner:
    """Load the bundle's program in the runtime that it was exported for; `reference` takes our interpreter instead."""
    target = bundle.manifest.target
    if target == "coreml":
        from lordba.runtime.coreml_runner import CoremlRunner

        return CoremlRunner(bundle, reference=reference)
    if reference:
        raise LordbaError(
            f"{bundle.folder}: --reference is for Core ML bundles, which run on Apple systems alone; this one is for "
            f"{target}, whose own runtime runs it here; leave --reference out"
        )
    if bundle.manifest.adapter_mode == "methods":
        raise LordbaError(
            f"{bundle.folder}: its program needs ExecuTorch's Core ML backend, which apps on Apple systems have; "
            "nothing runs it here"
        )
    if target == "executorch":
        from lordba.runtime.executorch_runner import ExecuTorchRunner

        return ExecuTorchRunner(bundle)
    if target == "onnx":
        from lordba.runtime.onnx_runner import OnnxRunner

        return OnnxRunner(bundle)
    raise LordbaError(
        f"{bundle.folder}: is a bundle for {target}, which does not run here; export it for executorch, onnx or coreml"
    )
