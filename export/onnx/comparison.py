"""ONNX programs to compare with: the base alone, or with a dense LoRA as Olive and onnxruntime-genai run it."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from lordba.adapter import Adapter
from lordba.models import BaseModel
from lordba.runtime.onnx_adapter import INPUT, SUFFIX, ProgramInfo, write_onnx_adapter

from ..target import LORA_DTYPES, ExportOptions, Program, Way
from .lowering import requires, save
from .op import DOMAIN, NAME
from .target import PROGRAM_NAME, OnnxTarget

FACTORS = ("lora_A", "lora_B")


class OnnxComparison(OnnxTarget):
    """The target in one of COMPARISON_MODES."""

    def __init__(self, base: BaseModel, name: str, adapter: Adapter, form: str, options: ExportOptions) -> None:
        super().__init__(base, {name: adapter}, options)
        self.form = form
        self.adapter_name, self.adapter = name, adapter

    def lower(self, fingerprint: str, eos_ids: list[int]) -> None:
        super().lower(fingerprint, eos_ids)
        replace_nodes(self.model, None if self.form == "none" else LORA_DTYPES[self.form], self.adapter)
        self.info = ProgramInfo(fingerprint, self.scale_code, {})
        self.model.metadata_props.update(self.info.metadata())

    def write(self, folder: Path) -> Program:
        save(self.model, folder / PROGRAM_NAME)
        file = None
        if self.form != "none":
            file = f"adapters/{self.adapter_name}{SUFFIX}"
            (folder / "adapters").mkdir()
            write_onnx_adapter(
                folder / file, dict(factors(self.adapter, LORA_DTYPES[self.form])), self.info.model_version
            )
        figure = f"{len(self.adapter.modules)} modules as two MatMuls each" if file else "no adapter nodes"
        return Program(PROGRAM_NAME, requires(self.model), self.form, [], {}, file, figure)

    def ways(self, bundle) -> dict[str, Way]:
        return {"program": super().ways(bundle)["program"]}


def replace_nodes(model: ir.Model, dtype: torch.dtype | None, adapter: Adapter) -> None:
    """Take every adapter node out of a model, or put a LoRA's two MatMuls and an Add in its place (dtype not None).

    The factors are inputs, named <path>.lora_A [d_in, r] and .lora_B [r, d_out], that an adapter file fills at each
    run; without one they are zero. ONNX Runtime has no fp16 MatMul on most CPUs, so fp16 factors are cast at each run.
    """
    graph = model.graph
    for node in [node for node in graph if (node.domain, node.op_type) == (DOMAIN, NAME)]:
        x, base, _ = node.inputs
        assert x is not None and base is not None and node.name is not None
        result = base
        if dtype is not None and node.name in adapter.modules:
            module = adapter.modules[node.name]
            new, term = [], x
            for name, shape in zip(FACTORS, ([module.d_in, None], [None, module.d_out]), strict=True):
                factor = _input(graph, f"{node.name}.{name}", shape, dtype)
                if dtype is not torch.float32:
                    new.append(_node("Cast", [factor], f"{node.name}.{name}.cast", {"to": ir.DataType.FLOAT.value}))
                    factor = new[-1].outputs[0]
                new.append(_node("MatMul", [term, factor], f"{node.name}.{name}.product"))
                term = new[-1].outputs[0]
            new.append(_node("Add", [base, term], f"{node.name}.lora_sum"))
            graph.insert_before(node, new)
            result = new[-1].outputs[0]
        ir.convenience.replace_all_uses_with(node.outputs[0], result)
        graph.remove(node, safe=True)
    graph.inputs.remove(graph.initializers.pop(INPUT))
    model.functions.clear()


def factors(adapter: Adapter, dtype: torch.dtype) -> Iterator[tuple[str, np.ndarray]]:
    """The factors of the adapter as the inputs that `replace_nodes` makes."""
    for path, module in adapter.modules.items():
        b, a = module.factors()
        for name, factor in zip(FACTORS, (a.T, b.T), strict=True):
            yield f"{path}.{name}", factor.to(dtype).contiguous().numpy()


def _node(kind: str, inputs: list[ir.Value], name: str, attributes: Mapping[str, int] | None = None) -> ir.Node:
    output = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT))
    return ir.Node("", kind, inputs, ir.convenience.convert_attributes(attributes or {}), outputs=[output], name=name)


def _input(graph: ir.Graph, name: str, shape: list[int | None], dtype: torch.dtype) -> ir.Value:
    tensor = ir.tensor(torch.zeros([size or 1 for size in shape], dtype=dtype).numpy(), name=name)
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.initializers[name] = value
    graph.inputs.append(value)
    return value
