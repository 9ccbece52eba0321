"""ExecuTorch with Core ML as its delegate: one `.pte` whose methods, base and adapters, share one Core ML package."""

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from lordba.adapter import Adapter
from lordba.errors import LordbaError
from lordba.models import BaseModel
from lordba.runtime.bundle import Bundle
from lordba.runtime.coreml_runner import BASE_FUNCTION, METHODS, CoremlRunner
from lordba.runtime.session import Session

from ..target import ExportOptions, Limits, Program, Way
from .lowering import export_program, quiet
from .target import HALF_ADAPTER_LIMITS, HALF_LIMITS, CoremlTarget

PROGRAM_NAME = "model.pte"
OUTPUT_LIMITS: Limits = {"max_rel_err": 1e-3}  # ExecuTorch's Core ML backend puts logits out in fp16
REFERENCE_MAGIC = b"CMJR"  # of a method that refers to a package which several methods share


class DelegateTarget(CoremlTarget):
    """See target.Target. The decoder, the quantization and the checks are the Core ML target's."""

    name = "executorch"
    title = "ExecuTorch with Core ML"
    toolchain: tuple[str, ...] = ("torch", "executorch", "coremltools", "transformers")

    def __init__(self, base: BaseModel, adapters: Mapping[str, Adapter], options: ExportOptions) -> None:
        if options.adapter_mode or options.route != "auto" or options.ios != 18:
            raise LordbaError(
                "--delegate coreml makes adapters methods of the program, for iOS 18; "
                "leave out --adapter-mode, --route and --ios"
            )
        super().__init__(base, adapters, options)
        self.adapter_mode = METHODS
        self._recovered = tempfile.TemporaryDirectory()

    def lower(self, fingerprint: str, eos_ids: list[int]) -> None:
        self.captured.round_weights()
        programs = {}
        for name in (None, *self.adapters):
            self.captured.use(self.adapters[name] if name else None)
            programs[self.functions[name] if name else BASE_FUNCTION] = export_program(self.captured, False)
        self._pte = lower_to_pte(programs, self.options.sign_storage)

    def write(self, folder: Path) -> Program:
        (folder / PROGRAM_NAME).write_bytes(self._pte)
        self._package = recover_package(self._pte, Path(self._recovered.name))
        added, checks = self._measure(self._package)
        return Program(
            path=PROGRAM_NAME,
            requires=["CoreMLBackend", "iOS 18"],
            adapter_mode=self.adapter_mode,
            modules=list(self.captured.layers),
            adapter_files=dict.fromkeys(self.adapters, PROGRAM_NAME),
            no_adapter=None,
            figure=f"{1 + len(self.functions)} methods that share one Core ML package",
            functions=self.functions,
            added_bytes=added,
            checks=checks,
        )

    def ways(self, bundle: Bundle) -> dict[str, Way]:
        self._runner = CoremlRunner(bundle, reference=True, program=self._package)
        exact = CoremlRunner(bundle, reference=True, exact=True, program=self._package)
        return {
            "program": Way(Session(bundle, runner=self._runner), HALF_LIMITS, HALF_ADAPTER_LIMITS),
            "program without fp16 rounding": Way(Session(bundle, runner=exact), OUTPUT_LIMITS, OUTPUT_LIMITS),
        }


def lower_to_pte(methods: Mapping[str, torch.export.ExportedProgram], storage: str) -> bytes:
    """Lower methods by ExecuTorch's Core ML partitioner, each as a whole, into one program."""
    with quiet(), torch.no_grad():
        import coremltools as ct
        from executorch.backends.apple.coreml.compiler import CoreMLBackend
        from executorch.backends.apple.coreml.partition import CoreMLPartitioner
        from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

        from .mil import sign_storage

        specs = CoreMLBackend.generate_compile_specs(
            compute_precision=ct.precision.FLOAT16, minimum_deployment_target=ct.target.iOS18
        )
        try:
            with sign_storage(storage), lengths_from_one():
                edge = to_edge_transform_and_lower(
                    dict(methods),
                    partitioner=[CoreMLPartitioner(compile_specs=specs, lower_full_graph=True)],
                    compile_config=EdgeCompileConfig(_check_ir_validity=False),
                )
        except NotImplementedError as error:
            raise LordbaError(f"ExecuTorch's Core ML partitioner cannot take this model: {error!s:.300}") from error
        return bytes(edge.to_executorch().buffer)


@contextlib.contextmanager
def lengths_from_one() -> Iterator[None]:
    """Let programs take one token, too: the edge dialect raises the lower bound of every length to 2."""
    from coremltools.converters.mil.frontend.torch import exir_utils

    name = "_construct_ct_range_dim_from_torch_value_ranges"
    make = getattr(exir_utils, name)

    def from_one(bounds: Any) -> Any:
        dimension = make(bounds)
        dimension.lower_bound = min(dimension.lower_bound, 1)
        return dimension

    with patch.object(exir_utils, name, from_one):
        yield


def recover_package(pte: bytes, folder: Path) -> Path:
    """Unpack the Core ML package inside a program whose methods share one."""
    from executorch.backends.apple.coreml import executorchcoreml
    from executorch.exir._serialize._program import deserialize_pte_binary

    file = deserialize_pte_binary(pte)
    data = {item.data for item in file.program.backend_delegate_data}
    keys = {json.loads(item[len(REFERENCE_MAGIC) :])["key"] for item in data if item.startswith(REFERENCE_MAGIC)}
    if len(keys) != 1 or file.named_data is None:
        raise LordbaError("the .pte holds no package that its methods share; this is a fault of the export")
    entry = file.named_data.pte_data[keys.pop()]
    folder.mkdir(parents=True, exist_ok=True)
    executorchcoreml.unflatten_directory_contents(file.named_data.buffers[entry.buffer_index], str(folder))
    (package,) = (path.parent for path in folder.rglob("Manifest.json"))
    return package
