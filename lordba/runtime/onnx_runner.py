"""ONNX bundles in ONNX Runtime: the KV cache goes from one run's outputs to the next one's inputs, uncopied."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lordba.adapter import Adapter
from lordba.errors import LordbaError
from lordba.runtime.bundle import COMPARISON_MODES, Bundle
from lordba.runtime.onnx_adapter import OnnxAdapter, ProgramInfo, onnxruntime

FIXED_INPUTS = {"input_ids", "attention_mask", "position_ids"}


class OnnxRunner:
    """See session.Runner.

    `native` registers our kernel; without it ONNX Runtime runs the operator's body in standard operators.
    `threads` 0 leaves their number to ONNX Runtime, which then keeps every core busy.
    `as_feeds` passes an adapter's tensors as plain inputs, as bindings without LoraAdapter do; results are the same.
    `spin` False lets its threads sleep between runs, so that another program can use the cores.
    `trace` has ONNX Runtime note the times of all nodes, for `write_trace`, in a file whose name begins so.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        native: bool = True,
        as_feeds: bool = False,
        threads: int = 0,
        spin: bool = True,
        trace: Path | None = None,
    ) -> None:
        self.bundle = bundle
        self._runtime = onnxruntime()
        self._as_feeds = as_feeds
        self.longest = bundle.manifest.max_seq_len
        options = self._runtime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        if not spin:
            options.add_session_config_entry("session.force_spinning_stop", "1")
        if trace:
            options.enable_profiling, options.profile_file_prefix = True, str(trace)
        if native:
            from lordba.backends.onnxruntime import library

            options.register_custom_ops_library(str(library()))
        try:
            self._session = self._runtime.InferenceSession(str(bundle.program), options)
        except Exception as error:  # the binding's exceptions share no other type
            raise LordbaError(
                f"{bundle.program}: onnxruntime {self._runtime.__version__} cannot load it ({error!s:.300}); "
                f"the bundle was made with {bundle.manifest.toolchain}"
            ) from error
        self.info = ProgramInfo.read(self._session.get_modelmeta().custom_metadata_map, bundle.program)
        _check_program(self.info, bundle)
        self._outputs = [output.name for output in self._session.get_outputs()]
        inputs = {value.name: value for value in self._session.get_inputs()}
        self._takes_positions = "position_ids" in inputs  # a model may know positions by itself
        self._empty = {
            name: self._value(np.zeros([1, *value.shape[1:2], 0, value.shape[3]], np.float32))
            for name, value in inputs.items()
            if name not in FIXED_INPUTS
        }
        self._past: dict[str, Any] = self._empty
        self._adapter: OnnxAdapter | None = None
        self._run_options = self._runtime.RunOptions()

    def load(self, adapter: str | None) -> OnnxAdapter | None:
        file = self.bundle.adapter_file(adapter)
        return None if file is None else self.load_file(file)

    def load_file(self, file: Path) -> OnnxAdapter:
        """The adapter in this file."""
        adapter = OnnxAdapter(file)
        if self.bundle.manifest.adapter_mode not in COMPARISON_MODES:  # a dense LoRA holds other tensors
            adapter.check(self.info)
        return adapter

    def use(self, loaded: OnnxAdapter | None) -> None:
        self._run_options = self._runtime.RunOptions()
        if loaded is not None and not self._as_feeds:
            self._run_options.add_active_adapter(loaded.lora)
        self._adapter = loaded

    def write_trace(self) -> Path:
        """End the trace and return its file (Chrome's trace events, JSON)."""
        return Path(self._session.end_profiling())

    def write(self, adapter: Adapter, path: Path) -> None:
        self.info.write(adapter, path)
        self.load_file(path)

    def run(self, tokens: Sequence[int], start: int) -> np.ndarray:
        if start == 0:
            self._past = self._empty
        end = start + len(tokens)
        feeds = {
            "input_ids": self._value(np.array([list(tokens)], np.int64)),
            "attention_mask": self._value(np.ones((1, end), np.int64)),
            **self._past,
        }
        if self._takes_positions:
            feeds["position_ids"] = self._value(np.arange(start, end, dtype=np.int64)[None])
        if self._adapter is not None and self._as_feeds:
            feeds |= self._adapter.inputs
        logits, *present = self._session.run_with_ort_values(self._outputs, feeds, self._run_options)
        names = (name.replace("present", "past_key_values", 1) for name in self._outputs[1:])
        self._past = dict(zip(names, present, strict=True))
        return logits.numpy()[0, -1].copy()

    def _value(self, array: np.ndarray) -> Any:
        return self._runtime.OrtValue.ortvalue_from_numpy(array)


def _check_program(program: ProgramInfo, bundle: Bundle) -> None:
    """The program must be of the manifest's base and have a place for every module that the manifest names."""
    expected = bundle.manifest.base["fingerprint"]
    if program.fingerprint != expected:
        raise LordbaError(
            f"{bundle.program}: was made for the base {program.fingerprint}, the manifest says {expected}; "
            "export the bundle again"
        )
    if lost := sorted({path for path in bundle.manifest.modules if path} - set(program.modules)):
        raise LordbaError(f"{bundle.program}: has no place for an adapter of {lost[0]}; export the bundle again")
