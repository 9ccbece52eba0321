"""Lowering to ONNX: torch.export, the adapter as an overridable initializer, the operator's body beside it."""

from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir
import torch

from lordba.errors import LordbaError
from lordba.runtime.onnx_adapter import INPUT

from .decoder import OnnxDecoder
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
    _open_adapter(model, decoder)
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


def _open_adapter(model: ir.Model, decoder: OnnxDecoder) -> None:
    """Make the adapter an initializer that a run may override, and check that every module has a node of its own."""
    paths, found = list(decoder.nodes), []
    for node in model.graph:
        if (node.domain, node.op_type) == (DOMAIN, NAME):
            node.name = paths[node.attributes["module"].as_int()]
            node.version = VERSION
            found.append(node.name)
    if sorted(found) != sorted(paths):
        lost = sorted(set(paths) - set(found))
        raise LordbaError(
            f"the exported model lost adapters: {len(lost)} of {len(paths)} modules have no {DOMAIN}::{NAME} "
            f"of their own ({lost[:3]}), of {len(found)} nodes; this is a fault of the export, please report it"
        )
    value = model.graph.initializers.pop(f"{INPUT}.blob")
    value.name = INPUT
    value.shape = ir.Shape(["adapter_bytes"])
    assert value.const_value is not None
    value.const_value.name = INPUT
    model.graph.initializers[INPUT] = value
    model.graph.inputs.append(value)
