"""Lowering to ExecuTorch: torch.export, XNNPACK for the base, our op beside it, and a check of what came out."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lordba.errors import LordbaError

from .adapted import BLOB_ALIGNMENT
from .capture import Captured

ADAPTER_TAG = "adapter"
OP = ("lordba::sign_adapter", "blob_out")
BASE_ARGUMENT = 5
"""The op's argument that it adds to."""


@dataclass(frozen=True)
class Lowered:
    """A lowered program: the bytes of the .pte, the operators that its runtime must have, and the adapter's key."""

    pte: bytes
    requires: list[str]
    partitions: int
    adapter_key: str | None


def lower(captured: Captured, blob: Tensor | None, adapter_mode: str, constants: dict[str, object]) -> Lowered:
    """Lower a captured decoder.

    `blob` is an adapter for tracing and, in ptd mode, fixes the size of every adapter; `constants` become the
    program's metadata methods. Only XnnpackPartitioner is given: a second partitioner in the same call gives
    silently wrong numbers, and a custom op needs none.
    """
    from executorch.devtools.backend_debug import get_delegation_info
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower

    length = torch.export.Dim("length", min=1, max=captured.max_seq_len - 1)
    example: tuple[Tensor, ...] = (torch.zeros(1, 8, dtype=torch.long), torch.zeros(1, dtype=torch.long))
    dynamic: tuple[dict | None, ...] = ({1: length}, None)
    if adapter_mode == "input":
        assert blob is not None
        example += (blob,)
        dynamic += ({0: BLOB_ALIGNMENT * torch.export.Dim("adapter_blocks", min=1, max=1 << 20)},)
        captured.slot.blob = None
    else:
        captured.slot.blob = blob
    captured.module.requires_grad_(False)
    with torch.no_grad():
        try:
            program = torch.export.export(captured.module, example, dynamic_shapes=dynamic, strict=False)
        except Exception as error:  # torch.export raises what the model's own code and its guards raise
            raise LordbaError(
                f"the model cannot be captured by torch.export on the {captured.route} path "
                f"({type(error).__name__}: {error!s:.200}); this architecture is not supported"
            ) from error
        edge = to_edge_transform_and_lower(
            program,
            partitioner=[_partitioner()],
            compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
            constant_methods=constants,
        )
        partitions = get_delegation_info(edge.exported_program().graph_module).num_delegated_subgraphs
        config = ExecutorchBackendConfig(
            external_constants=lambda node: ADAPTER_TAG if node.name.endswith("slot_blob") else None,
            memory_planning_pass=in_place_planning(alloc_graph_input=adapter_mode == "ptd"),
            do_quant_fusion_and_const_prop=False,
        )
        executorch = edge.to_executorch(config)
    plan = executorch.executorch_program.execution_plan[0]
    check_program(plan, captured)
    key = None
    if adapter_mode == "ptd":
        key = _external_key(executorch)
    requires = sorted(
        f"{op.name}.{op.overload}" if op.overload else op.name
        for op in plan.operators
        if not op.name.startswith(("aten::", "executorch_prim::"))
    )
    return Lowered(executorch.buffer, requires, partitions, key)


def in_place_planning(alloc_graph_input: bool):
    """ExecuTorch's memory planning, where an adapter op's output lies where its base lay, if nothing else reads that.

    The kernel then adds in place; without an adapter it has nothing to copy.
    """
    from executorch.exir.passes import MemoryPlanningPass

    class InPlacePlanning(MemoryPlanningPass):
        def run(self, graph_module, graph_signature=None):
            for node in graph_module.graph.nodes:
                if node.target == torch.ops.lordba.sign_adapter.blob_out:
                    base = node.args[BASE_ARGUMENT]
                    if base is not None and base.op == "call_function" and len(base.users) == 1:
                        node.meta["_share_alloc_with_arg_idx"] = BASE_ARGUMENT
            return super().run(graph_module, graph_signature)

    return InPlacePlanning(alloc_graph_input=alloc_graph_input)


def check_program(plan, captured: Captured) -> None:
    """Raise unless every adapted module has its op in the emitted program, exactly once."""
    found: list[int] = []
    op_index = {i for i, op in enumerate(plan.operators) if (op.name, op.overload) == OP}
    for chain in plan.chains:
        for instruction in chain.instructions:
            call = instruction.instr_args
            if getattr(call, "op_index", None) in op_index:
                first = plan.values[call.args[2]].val.int_val
                outputs = plan.values[call.args[4]].val.items
                found += range(first, first + len(outputs))
    missing = set(range(len(captured.slot.paths))) - set(found)
    if missing or len(found) != len(set(found)):
        names = [captured.slot.paths[i] for i in sorted(missing)][:3]
        raise LordbaError(
            f"the lowered program lost adapters: {len(missing)} of {len(captured.slot.paths)} modules have no "
            f"lordba::sign_adapter ({names}); this is a fault of the export, please report it"
        )


def write_ptd(path: Path, key: str, blob: Tensor) -> None:
    """Write an adapter as ExecuTorch's named data file, without exporting the program again."""
    from executorch.exir._serialize.data_serializer import DataEntry, DataPayload
    from executorch.exir.schema import ScalarType
    from executorch.exir.tensor_layout import TensorLayout
    from executorch.extension.flat_tensor.serialize.serialize import FlatTensorSerializer

    layout = TensorLayout(ScalarType.BYTE, [blob.numel()], [0])
    payload = DataPayload([blob.numpy().tobytes()], {key: DataEntry(0, BLOB_ALIGNMENT, layout)})
    path.write_bytes(bytes(FlatTensorSerializer().serialize(payload)))


def _partitioner():
    """XNNPACK, told what it would find out slowly by itself (lowering takes a tenth of the time; tests compare)."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir.backend.compile_spec_schema import CompileSpec
    from executorch.exir.backend.partitioner import DelegationSpec

    partitioner = XnnpackPartitioner()
    partitioner.delegation_spec = DelegationSpec("XnnpackBackend", [CompileSpec("dqlinear_partitioner", b"")])
    kept = partitioner.ops_to_not_decompose
    partitioner.ops_to_not_decompose = lambda program: (kept(program)[0], None)
    return partitioner


def _external_key(executorch) -> str:
    """The name under which the program looks for its adapter."""
    from executorch.exir._serialize._cord import Cord
    from executorch.extension.flat_tensor.serialize.serialize import FlatTensorSerializer

    data = executorch._tensor_data[ADAPTER_TAG]
    named = FlatTensorSerializer().deserialize(Cord(bytes(data))).named_data
    (key,) = named
    return key
