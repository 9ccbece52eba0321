"""The ExecuTorch target: a `.pte` with XNNPACK, and adapters as `.ptd` data files or as inputs."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from lordba.adapter import Adapter
from lordba.models import BaseModel
from lordba.runtime.bundle import Bundle, ParityCheck
from lordba.runtime.executorch_runner import Program as RuntimeProgram
from lordba.runtime.session import Session

from ..target import ExportOptions, Program, Way, record_inputs, worst_error
from ..verify import text_windows
from .adapted import AdaptedLinear
from .capture import Captured, capture
from .lowering import Lowered, lower, write_ptd
from .quantize import quantize_base
from .train_check import check_training
from .train_program import TRAINING_NAME, TrainingProgram, largest_adapter, training_program

MAX_SEQ_LEN = 512
FLOAT_LIMITS = {"max_abs_err": 2e-3, "mean_kl": 1e-6, "top1_agreement": 0.999}
QUANTIZED_LIMITS = {"mean_kl": 0.035, "perplexity_ratio": 1.015}
ADAPTER_LIMITS = {"mean_kl": 0.035}  # over few windows a ratio of perplexities is mostly noise


class ExecuTorchTarget:
    """See target.Target."""

    name = "executorch"
    title = "ExecuTorch"
    toolchain: tuple[str, ...] = ("torch", "executorch", "transformers")
    most_text: tuple[int, int] | None = None
    captured: Captured
    lowered: Lowered

    def __init__(self, base: BaseModel, adapters: Mapping[str, Adapter], options: ExportOptions) -> None:
        self.base = base
        self.adapters = dict(adapters)
        self.options = options
        self.adapter_mode = options.adapter_mode or "ptd"
        self.max_seq_len = options.max_seq_len or MAX_SEQ_LEN
        self.base_quant = "none"
        self.training: TrainingProgram | None = None

    def capture(self) -> Captured:
        self.base_quant = "none"
        self.captured = capture(self.base.model, self.adapters, self.max_seq_len, self.options.route)
        return self.captured

    def quantize(self, base_quant: str) -> None:
        self.base_quant = base_quant
        quantize_base(self.captured.module, base_quant)

    def blobs(self) -> dict[str | None, Tensor]:
        """Every adapter, and None for no adapter, as the program takes them: in ptd mode all of one size."""
        slot = self.captured.slot
        fitting: list[Adapter | None] = [*self.adapters.values(), *([self._trained()] if self.options.train else [])]
        size = slot.size_for(fitting) if self.adapter_mode == "ptd" else None
        return {name: slot.blob_of(self.adapters[name] if name else None, size) for name in (None, *self.adapters)}

    def _trained(self) -> Adapter:
        """An adapter of the sizes that training on the device makes: every module, the largest rank, log4 scales."""
        return largest_adapter(self.base.model, self.captured.slot.paths, self._rank)

    @property
    def _rank(self) -> int:
        return max(adapter.r for adapter in self.adapters.values())

    def lower(self, fingerprint: str, eos_ids: list[int]) -> None:
        trace = max(self.blobs().values(), key=Tensor.numel)
        metadata = runner_metadata(self.base, self.max_seq_len, eos_ids)
        self.lowered = lower(self.captured, trace, self.adapter_mode, metadata)
        if self.options.train:
            paths = [path for path in self.captured.slot.paths if path]
            self.training = training_program(
                self.base.model, self.options.train, paths, self._rank, self.base_quant, self.max_seq_len, fingerprint
            )

    def write(self, folder: Path) -> Program:
        (folder / "model.pte").write_bytes(self.lowered.pte)
        if self.training:
            (folder / TRAINING_NAME).write_bytes(self.training.pte)
        (folder / "adapters").mkdir()
        files = {name: self._write_adapter(folder, name or "none", blob) for name, blob in self.blobs().items()}
        return Program(
            path="model.pte",
            requires=self.lowered.requires,
            adapter_mode=self.adapter_mode,
            modules=self.captured.slot.paths,
            adapter_files={name: files[name] for name in self.adapters},
            no_adapter=files[None],
            figure=f"{self.lowered.partitions} delegate partitions",
            training=self.training.entry if self.training else None,
            checks=self._training_checks(folder),
        )

    def _training_checks(self, folder: Path) -> list[ParityCheck]:
        if not self.training:
            return []
        windows = text_windows(lambda text: self.base.tokenizer(text).input_ids, self.max_seq_len)
        return check_training(self.training, folder / TRAINING_NAME, self.captured, windows.tokens[0])

    def _write_adapter(self, folder: Path, name: str, blob: Tensor) -> str:
        key = self.lowered.adapter_key
        file = f"adapters/{name}.{'ptd' if key else 'blob'}"
        if key:
            write_ptd(folder / file, key, blob)
        else:
            (folder / file).write_bytes(blob.numpy().tobytes())
        return file

    def ways(self, bundle: Bundle) -> dict[str, Way]:
        if bundle.manifest.base_quant == "none":
            return {"program": Way(Session(bundle), FLOAT_LIMITS, FLOAT_LIMITS)}
        return {"program": Way(Session(bundle), QUANTIZED_LIMITS, ADAPTER_LIMITS)}

    def probe(self, tokens: Tensor) -> "ExecuTorchProbe":
        return ExecuTorchProbe(self.captured, tokens, self.adapters)


def runner_metadata(base: BaseModel, max_seq_len: int, eos: list[int]) -> dict[str, object]:
    """The metadata methods that ExecuTorch's own LLM runner asks a program for."""
    config = base.model.config
    return {
        "get_bos_id": base.tokenizer.bos_token_id or 0,
        "get_eos_ids": eos or [0],
        "get_max_seq_len": max_seq_len - 1,
        "get_max_context_len": max_seq_len,
        "get_n_layers": config.num_hidden_layers,
        "get_vocab_size": config.vocab_size,
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": True,
        "enable_dynamic_shape": True,
    }


class _Ops(nn.Module):
    """Every adapter op of a program, each on an input of its own."""

    def __init__(self, layers: Sequence[AdaptedLinear]) -> None:
        super().__init__()
        self.calls = [(layer._first, layer.d_in, layer.d_outs) for layer in layers]

    def forward(self, blob: Tensor, inputs: list[Tensor]) -> list[Tensor]:
        op = torch.ops.lordba.sign_adapter.blob
        return [op(x, blob, *call) for x, call in zip(inputs, self.calls, strict=True)]


class ExecuTorchProbe:
    """Runs every adapter op of a captured program alone, in a program of their own; see target.Probe."""

    def __init__(self, captured: Captured, tokens: Tensor, adapters: Mapping[str, Adapter]) -> None:
        self._adapters = adapters
        self._slot = captured.slot
        self._layers = [m for m in captured.module.modules() if isinstance(m, AdaptedLinear) and m._slot is not None]
        seen = record_inputs(self._layers, captured, tokens)
        self._inputs = [seen[layer].reshape(1, -1, layer.d_in) for layer in self._layers]
        self._program = RuntimeProgram(self._lower())

    def worst_error(self, name: str) -> float:
        adapter = self._adapters[name]
        return self.error_of(adapter, self._slot.blob_of(adapter))

    def error_of(self, adapter: Adapter, blob: Tensor) -> float:
        """The worst error against `adapter` if the program is given `blob`."""
        outputs = self._program.execute([blob, *self._inputs])
        terms = []
        for layer, x, y in zip(self._layers, self._inputs, outputs, strict=True):
            paths = self._slot.paths[layer._first : layer._first + len(layer.d_outs)]
            terms += [(path, x, part) for path, part in zip(paths, y.split(layer.d_outs, -1), strict=True)]
        return worst_error(terms, adapter)

    def _lower(self) -> bytes:
        from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge
        from executorch.exir.passes import MemoryPlanningPass

        blocks = torch.export.Dim("adapter_blocks", min=1, max=1 << 20)
        program = torch.export.export(
            _Ops(self._layers).eval(),
            (self._slot.blob_of(next(iter(self._adapters.values()))), self._inputs),
            dynamic_shapes=({0: 64 * blocks}, [None] * len(self._inputs)),
            strict=False,
        )
        edge = to_edge(program, compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True))
        config = ExecutorchBackendConfig(memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False))
        return edge.to_executorch(config).buffer
