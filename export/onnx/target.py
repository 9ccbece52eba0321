"""The ONNX target: `model.onnx` with its weights beside it, and adapters in ONNX Runtime's own file form."""

from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor

from lordba.adapter import Adapter
from lordba.errors import LordbaError
from lordba.layers import check_fits
from lordba.models import BaseModel
from lordba.runtime.bundle import Bundle
from lordba.runtime.onnx_adapter import SUFFIX, ProgramInfo, onnxruntime
from lordba.runtime.onnx_runner import OnnxRunner
from lordba.runtime.session import Session
from lordba.scales import ScaleCode

from ..android import ONNX_MAX_SEQ_LEN
from ..model import check_length
from ..target import ExportOptions, Limits, Program, Way
from .decoder import OnnxDecoder
from .genai import write_genai_config
from .lowering import lower, requires, save
from .ort_format import write_ort_pair
from .probe import OnnxProbe
from .quantize import ACCURACY_LEVELS, quantize_base

PROGRAM_NAME = "model.onnx"
FLOAT_LIMITS = {"max_rel_err": 1e-4, "mean_kl": 1e-6, "top1_agreement": 0.999}
LEVEL_LIMITS: dict[int, Limits] = {
    0: {"max_abs_err": 2e-3, "mean_kl": 1e-6, "top1_agreement": 0.999},
    4: {"mean_kl": 0.006, "perplexity_ratio": 1.01},
}
ADAPTER_LIMITS: dict[int, Limits] = {0: LEVEL_LIMITS[0], 4: {"mean_kl": 0.006}}


class OnnxTarget:
    """See target.Target."""

    name = "onnx"
    title = "ONNX"
    toolchain: tuple[str, ...] = ("torch", "onnx", "onnxruntime", "onnxscript", "transformers")
    most_text: tuple[int, int] | None = None
    captured: "CapturedOnnx"
    info: ProgramInfo
    model: ir.Model

    def __init__(self, base: BaseModel, adapters: Mapping[str, Adapter], options: ExportOptions) -> None:
        onnxruntime()  # the export ends with running the program: better to know now
        if options.accuracy_level not in ACCURACY_LEVELS:
            raise LordbaError(f"--accuracy-level must be 0 or 4, found {options.accuracy_level}")
        longest = base.model.config.max_position_embeddings
        self.max_seq_len: int = options.max_seq_len or (min(longest, ONNX_MAX_SEQ_LEN) if options.android else longest)
        check_length(base.model.config, self.max_seq_len)
        self.base = base
        self.adapters = dict(adapters)
        self.options = options
        codes = {adapter.scale_code for adapter in adapters.values()}
        self.scale_code = codes.pop() if len(codes) == 1 else ScaleCode.FP32

    def capture(self) -> "CapturedOnnx":
        self.captured = CapturedOnnx(self.base.model, self.adapters, self.scale_code)
        return self.captured

    def quantize(self, base_quant: str) -> None:
        quantize_base(self.captured.decoder, base_quant, self.options.accuracy_level)

    def lower(self, fingerprint: str, eos_ids: list[int]) -> None:
        self.eos_ids = eos_ids
        decoder = self.captured.decoder
        self.info = ProgramInfo(fingerprint, self.scale_code, decoder.sizes)
        self.model = lower(decoder, self.info.metadata())

    def write(self, folder: Path) -> Program:
        save(self.model, folder / PROGRAM_NAME)
        if self.options.ort_format:
            write_ort_pair(folder / PROGRAM_NAME)
        (folder / "adapters").mkdir()
        files = {name: f"adapters/{name}{SUFFIX}" for name in self.adapters}
        for name, adapter in self.adapters.items():
            self.info.write(adapter, folder / files[name])
        write_genai_config(folder, self.base, PROGRAM_NAME, self.max_seq_len, self.eos_ids)
        return Program(
            path=PROGRAM_NAME,
            requires=requires(self.model),
            adapter_mode="onnx_adapter",
            modules=list(self.captured.decoder.nodes),
            adapter_files=files,
            no_adapter=None,
            figure=f"{len(self.captured.decoder.nodes)} adapter nodes",
        )

    def ways(self, bundle: Bundle) -> dict[str, Way]:
        limits: tuple[Limits, Limits] = (FLOAT_LIMITS, FLOAT_LIMITS)
        if bundle.manifest.base_quant != "none":
            limits = LEVEL_LIMITS[self.options.accuracy_level], ADAPTER_LIMITS[self.options.accuracy_level]
        # One thread each, for the reason of lordba.threads: threads that wait for each other, waiting busily.
        return {
            "program": Way(Session(bundle, runner=OnnxRunner(bundle, threads=1)), *limits),
            "program without our kernel": Way(
                Session(bundle, runner=OnnxRunner(bundle, native=False, threads=1)), *limits
            ),
        }

    def probe(self, tokens: Tensor) -> OnnxProbe:
        return OnnxProbe(self.captured, self.captured.decoder, tokens, self.adapters)


class CapturedOnnx:
    """See target.Captured."""

    def __init__(self, model: torch.nn.Module, adapters: Mapping[str, Adapter], code: ScaleCode) -> None:
        for name, adapter in adapters.items():
            check_fits(adapter, model, f"adapter {name}")
        self.decoder = OnnxDecoder(model, {path for adapter in adapters.values() for path in adapter.modules}, code)
        self.decoder.eval()

    @torch.no_grad()
    def logits(self, tokens: Tensor, adapter: Adapter | None) -> Tensor:
        self.decoder.use(adapter)
        row = tokens[None]
        return self.decoder(row, torch.ones_like(row), torch.arange(len(tokens))[None], self.decoder.no_past())[0][0]
