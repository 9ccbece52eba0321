"""The Core ML target: `model.mlpackage`, with adapters as functions of it, as packages of their own, or as inputs."""

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lordba.adapter import Adapter
from lordba.blob import make_blob
from lordba.errors import LordbaError
from lordba.models import BaseModel
from lordba.runtime.bundle import Bundle, ParityCheck
from lordba.runtime.coreml_adapter import Parts
from lordba.runtime.coreml_runner import BASE_FUNCTION, FUNCTIONS, INPUTS, PACKAGES, CoremlRunner
from lordba.runtime.session import Session

from ..model import check_length
from ..target import ExportOptions, Limits, Program, Way
from .decoder import CoremlDecoder
from .lowering import CoremlOptions, convert
from .package import added_bytes, merge
from .probe import CoremlProbe, stored_parts
from .quantize import quantize_base

PROGRAM_NAME = "model.mlpackage"
MAX_SEQ_LEN = 512
MOST_ADDED = 1.15  # weights of an adapter in the package, over the adapter's own bytes
ALIGNMENT = 65536  # bytes beyond that for small adapters: each matrix begins at a multiple of 64 and has a header of 64
# Numbers in the model's own code are in fp16 too; float32 packages reach 1e-5.
EXACT_LIMITS: Limits = {"max_rel_err": 1e-4, "top1_agreement": 0.999}
HALF_LIMITS: Limits = {"mean_kl": 5e-3, "perplexity_ratio": 1.01}
HALF_ADAPTER_LIMITS: Limits = {"mean_kl": 5e-3}


class CoremlTarget:
    """See target.Target."""

    name = "coreml"
    title = "Core ML"
    toolchain: tuple[str, ...] = ("torch", "coremltools", "transformers")
    most_text: tuple[int, int] | None = (2, 48)
    captured: CoremlDecoder

    def __init__(
        self, base: BaseModel, adapters: Mapping[str, Adapter], options: ExportOptions, precision: str = "fp16"
    ) -> None:
        check_installed()
        check_system(options)
        config = base.model.config
        self.max_seq_len: int = options.max_seq_len or min(MAX_SEQ_LEN, config.max_position_embeddings)
        check_length(config, self.max_seq_len)
        self.base = base
        self.adapters = dict(adapters)
        self.options = options
        self.precision = precision
        self.functions = function_names(adapters)
        self.adapter_mode = options.adapter_mode or FUNCTIONS
        if self.adapter_mode == FUNCTIONS and options.ios < 18:
            self.adapter_mode = PACKAGES  # one function is all that a package holds there
        self._models: dict[str | None, Any] = {}

    def capture(self) -> CoremlDecoder:
        self.captured = CoremlDecoder(
            self.base.model,
            self.adapters,
            self.max_seq_len,
            stateless=self.options.stateless,
            precision=self.precision,
            palettes=self.options.sign_storage == "lut1" and self.options.ios >= 18,
        ).eval()
        return self.captured

    def quantize(self, base_quant: str) -> None:
        if base_quant == "int4" and self.options.ios < 18:
            raise LordbaError(f"--base-quant int4 needs --ios 18, not {self.options.ios}; take int8")
        quantize_base(self.captured, base_quant)
        if self.precision == "fp16":
            self.captured.round_weights()

    def lower(self, fingerprint: str, eos_ids: list[int]) -> None:
        if self.precision == "fp16":
            self.captured.round_weights()
        as_inputs = self.adapter_mode == INPUTS
        options = CoremlOptions(self.options.ios, self.options.sign_storage, as_inputs)
        for name in (None,) if as_inputs else (None, *self.adapters):
            self.captured.use(self.adapters[name] if name else None)
            self._models[name] = convert(self.captured, options)

    def write(self, folder: Path) -> Program:
        program = folder / PROGRAM_NAME
        adapter_folder = folder / "adapters"
        files = dict.fromkeys(self.adapters, PROGRAM_NAME)
        functions: dict[str, str] = {}
        added: dict[str, int] = {}
        checks: list[ParityCheck] = []
        if self.adapter_mode == FUNCTIONS:
            functions = self.functions
            added, checks = self._write_functions(folder, program)
            figure = f"{1 + len(functions)} functions"
        else:
            self._models[None].save(str(program))
            adapter_folder.mkdir()
            if self.adapter_mode == PACKAGES:
                files = {name: f"adapters/{name}.mlpackage" for name in self.adapters}
                for name, file in files.items():
                    self._models[name].save(str(folder / file))
            else:
                files = {name: f"adapters/{name}.blob" for name in self.adapters}
                modules = self.captured.adapter_inputs.modules
                for name, file in files.items():
                    blob = make_blob([self.adapters[name].modules.get(path) for path in modules])
                    (folder / file).write_bytes(blob.numpy().tobytes())
            figure = f"adapters as {self.adapter_mode}"
        for leftover in folder.rglob("executorch_debug_handle_mapping.json"):
            leftover.unlink()  # coremltools writes it beside the model, with no entry in the package's own list
        for path in folder.rglob("*.mlpackage/**/*"):
            path.chmod(0o755 if path.is_dir() else 0o644)  # coremltools leaves some for their owner alone
        modules = self.captured.adapter_inputs.modules if self.adapter_mode == INPUTS else list(self.captured.layers)
        return Program(
            path=PROGRAM_NAME,
            requires=[f"iOS {self.options.ios}"],
            adapter_mode=self.adapter_mode,
            modules=modules,
            adapter_files=files,
            no_adapter=None,
            figure=figure,
            functions=functions,
            added_bytes=added,
            checks=checks,
        )

    def _write_functions(self, folder: Path, program: Path) -> tuple[dict[str, int], list[ParityCheck]]:
        """Write base and adapters as functions: what each adds, and whether its weights stay within the limit."""
        with tempfile.TemporaryDirectory(dir=folder.parent) as parts:
            sources: dict[str, Path] = {}
            for name, model in self._models.items():
                function = self.functions[name] if name else BASE_FUNCTION
                sources[function] = Path(parts) / f"{function}.mlpackage"
                model.save(str(sources[function]))
            merge(sources, program)
        return self._measure(program)

    def _measure(self, package: Path) -> tuple[dict[str, int], list[ParityCheck]]:
        sizes = added_bytes(package, [BASE_FUNCTION, *self.functions.values()])
        added = {name: sum(sizes[function]) for name, function in self.functions.items()}
        checks = []
        for name, function in self.functions.items():
            ratio = sizes[function][0] / self.adapters[name].nbytes
            limit = MOST_ADDED + ALIGNMENT / self.adapters[name].nbytes
            checks.append(ParityCheck("added weights", name, "ratio_to_adapter", ratio, limit, ratio <= limit))
        return added, checks

    def ways(self, bundle: Bundle) -> dict[str, Way]:
        self._runner = CoremlRunner(bundle, reference=True)
        rounded = Session(bundle, runner=self._runner)
        exact = Session(bundle, runner=CoremlRunner(bundle, reference=True, exact=True))
        return {
            "program": Way(rounded, HALF_LIMITS, HALF_ADAPTER_LIMITS),
            "program without fp16 rounding": Way(exact, EXACT_LIMITS, EXACT_LIMITS),
        }

    def probe(self, tokens: Tensor) -> CoremlProbe:
        return CoremlProbe(self.captured, tokens, self.adapters, self._stored)

    def _stored(self, name: str) -> dict[str, Parts]:
        """What the package that was written last holds of an adapter."""
        if self.adapter_mode == INPUTS:
            return self._runner.adapter_parts(name)
        constants = self._runner.constants(name)
        return stored_parts(self.captured, self.adapters[name], constants)


def check_installed() -> None:
    try:
        import coremltools  # noqa: F401
    except ImportError as missing:
        raise LordbaError(f"the Core ML target needs {missing.name}; run: pip install 'lordba[coreml]'") from missing


def check_system(options: ExportOptions) -> None:
    """Refuse what the systems that the program is for do not have."""
    if options.ios < 18 and not options.stateless:
        raise LordbaError(f"--ios {options.ios} has no states for a KV cache; add --stateless, or take --ios 18")


def function_names(adapters: Mapping[str, Adapter]) -> dict[str, str]:
    """A function's name for each adapter: MIL takes letters, digits and underscores."""
    names = {name: re.sub(r"\W", "_", name, flags=re.ASCII) for name in adapters}
    for name, function in names.items():
        taken = [BASE_FUNCTION, *(other for key, other in names.items() if key != name)]
        if function in taken or not function[0].isalpha():
            raise LordbaError(f"adapter {name}: its function {function!r} is taken or no name; rename it: NEW={name}")
    return names
