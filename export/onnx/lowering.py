"""Lowering to ONNX: torch.export, the adapters' tensors as overridable initializers, the operator's body beside it."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from lordba.errors import LordbaError
from lordba.onnx_adapter import PARAMETERS, RANGE_BYTES, parameter_shapes

from .decoder import AdapterNode, OnnxDecoder
from .op import DOMAIN, IR_VERSION, NAME, OPSET, VERSION, function_body, register_schema

DATA_SUFFIX = ".data"


def lower(decoder: OnnxDecoder, metadata: Mapping[str, str]) -> ir.Model:
    """Export a decoder with optimum's names of inputs and outputs; `metadata` becomes the model's own."""
    register_schema()
    decoder.requires_grad_(False)
    batch, length, past = 2, 5, 3  # neither 0 nor 1, which torch.export would take for constants
    example = (
        torch.zeros(batch, length, dtype=torch.long),
        torch.ones(batch, past + length, dtype=torch.long),
        torch.zeros(batch, length, dtype=torch.long),
        decoder.no_past(batch, past),
    )
    dynamic = (
        {0: "batch", 1: "length"},
        {0: "batch", 1: "total"},
        {0: "batch", 1: "length"},
        [{0: "batch", 2: "past"}] * (2 * decoder.layers),
    )
    kinds = [f"{layer}.{kind}" for layer in range(decoder.layers) for kind in ("key", "value")]
    try:
        program = torch.onnx.export(
            decoder,
            example,
            dynamo=True,
            dynamic_shapes=dynamic,
            input_names=["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{kind}" for kind in kinds)],
            output_names=["logits", *(f"present.{kind}" for kind in kinds)],
            opset_version=OPSET,
            verbose=False,
        )
    except Exception as error:  # torch.export raises what the model's own code and its guards raise
        cause = error.__cause__ or error
        raise LordbaError(
            f"the model cannot be captured by torch.export for ONNX ({type(cause).__name__}: {cause!s:.200}); "
            "this architecture is not supported"
        ) from error
    assert program is not None
    model = program.model
    model.ir_version = IR_VERSION
    _forget_origins(model)
    _name_total(model)
    _open_places(model, decoder)
    body = ir.serde.deserialize_function(function_body(decoder.code))
    model.functions[body.identifier()] = body
    model.metadata_props.update(metadata)
    return model


def save(model: ir.Model, path: Path) -> None:
    """Write the model, with its weights in a file beside it."""
    ir.save(model, path, external_data=path.name + DATA_SUFFIX)


def requires(model: ir.Model) -> list[str]:
    """Operators beyond the standard ones that a runtime must have; ours is not among them, for its body is here."""
    return sorted({f"{node.domain}::{node.op_type}" for node in model.graph if node.domain not in ("", DOMAIN)})


def _forget_origins(model: ir.Model) -> None:
    """Remove what the exporter notes of where things came from: paths of this machine are among it."""
    model.graph.metadata_props.clear()
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in [*model.graph.inputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()


def _name_total(model: ir.Model) -> None:
    """One name for the length of keys and values after the call, which the exporter writes as a sum."""
    (mask,) = [value for value in model.graph.inputs if value.name == "attention_mask"]
    assert mask.shape is not None
    for value in model.graph.outputs[1:]:
        assert value.shape is not None
        value.shape = ir.Shape([value.shape[0], value.shape[1], mask.shape[1], value.shape[3]])


def _open_places(model: ir.Model, decoder: OnnxDecoder) -> None:
    """Turn the placeholders of every adapter node into overridable initializers that stand for no adapter."""
    found = {}
    for node in model.graph:
        if (node.domain, node.op_type) != (DOMAIN, NAME):
            continue
        values = [value for value in node.inputs[2:] if value is not None]
        path = _module_path(values[0])
        if [value.name for value in values] != [f"model.{path}.{name}" for name in PARAMETERS]:
            continue  # the exporter merged it with another's
        found[path] = values
        node.name = path
        node.version = VERSION
    if set(found) != set(decoder.nodes):
        lost = sorted(set(decoder.nodes) - set(found))
        raise LordbaError(
            f"the exported model lost adapters: {len(lost)} of {len(decoder.nodes)} modules have no {DOMAIN}::{NAME} "
            f"of their own ({lost[:3]}); this is a fault of the export, please report it"
        )
    for path, values in found.items():
        no_adapter = _no_adapter(decoder.nodes[path])
        for name, value in zip(PARAMETERS, values, strict=True):
            data, shape = no_adapter[name]
            assert value.name is not None
            model.graph.initializers.pop(value.name)
            value.name = f"{path}.{name}"
            value.const_value = ir.tensor(data, name=value.name)
            value.shape = ir.Shape(shape)
            model.graph.initializers[value.name] = value
            model.graph.inputs.append(value)


def _module_path(value: ir.Value) -> str:
    """The path, in the user's model, of the module that a placeholder belongs to."""
    assert value.name is not None
    return value.name.removeprefix("model.").rpartition(".")[0]


def _no_adapter(node: AdapterNode) -> dict[str, tuple[np.ndarray, list[int | None]]]:
    """Each input's value for "no adapter", of rank 1 with scales of 0, and its shape, None where the rank shows."""
    shapes, others = (parameter_shapes(node.code, node.d_in, node.d_out, rank) for rank in (1, 64))
    result = {}
    for name, shape in shapes.items():
        data = torch.zeros(shape, dtype=node.code.dtype if name == "scales" else torch.uint8)
        if name == "scales" and node.code.is_coded:
            data[:RANGE_BYTES].view(torch.float16).fill_(1.0)
        dims = [size if size == other else None for size, other in zip(shape, others[name], strict=True)]
        result[name] = data.numpy(), dims
    return result
