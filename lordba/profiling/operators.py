"""Where a run's time goes, from the runtimes' own traces: ExecuTorch's ETDump and ONNX Runtime's profile.

Operators are summed to five groups. "linears" are the base's matrix products with their quantization; those of a dense
LoRA are among them in ExecuTorch, whose trace does not tell them apart. "runtime" is what no operator accounts for:
dispatch, and for ExecuTorch the way into XNNPACK's partitions and out of them.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lordba.runtime.executorch_runner import ExecuTorchRunner

GROUPS = ("linears", "adapters", "attention", "rest", "runtime")
Run = Counter[str]
"""Milliseconds of each group in one run, and their `total`."""

_ATTENTION = ("llama::", "lordba::rope_heads")
_CALLS = ("OPERATOR_CALL", "DELEGATE_CALL")


def read_runs(runner: Any, folder: Path) -> list[Run]:
    """Every run of a runner that was opened with a trace, in their order."""
    if isinstance(runner, ExecuTorchRunner):
        path = folder / "trace.etdp"
        runner.write_trace(path)
        return list(executorch_runs(path))
    return list(onnx_runs(json.loads(runner.write_trace().read_text())))


def medians(runs: Sequence[Run]) -> dict[str, float]:
    """The median of each group over runs."""
    return {group: float(np.median([run[group] for run in runs])) for group in (*GROUPS, "total")}


def executorch_runs(path: Path) -> Iterator[Run]:
    """The runs in an ETDump file."""
    from executorch.devtools.etdump.serialize import deserialize_from_etdump_flatcc

    for block in deserialize_from_etdump_flatcc(path.read_bytes()).run_data:
        events = [event.profile_event for event in block.events or [] if event.profile_event]
        run: Run = Counter()
        for event in events:
            name = event.delegate_debug_id_str or event.name or ""
            spent = (event.end_time - event.start_time) / 1e6
            if name == "Method::execute":
                run["total"] = spent
            elif name not in _CALLS:  # they hold the other events
                run[_executorch_group(name)] += spent
        if run["total"]:
            yield _with_runtime(run)


def onnx_runs(events: Sequence[dict[str, Any]]) -> Iterator[Run]:
    """The runs in a profile of ONNX Runtime."""
    nodes = [e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
    at = 0
    for whole in [event for event in events if event["name"] == "model_run"]:
        end, run = whole["ts"] + whole["dur"], Counter({"total": whole["dur"] / 1e3})
        while at < len(nodes) and nodes[at]["ts"] < end:
            run[_onnx_group(nodes[at])] += nodes[at]["dur"] / 1e3
            at += 1
        yield _with_runtime(run)


def _with_runtime(run: Run) -> Run:
    run["runtime"] = run["total"] - sum(run[group] for group in GROUPS if group != "runtime")
    return run


def _executorch_group(name: str) -> str:
    name = name.removeprefix("native_call_")
    if name.startswith("lordba::sign_adapter"):
        return "adapters"
    if name.startswith(_ATTENTION):
        return "attention"
    return "linears" if name.startswith(("Fully Connected", "Convert")) else "rest"


def _onnx_group(event: dict[str, Any]) -> str:
    kind, name = event["args"]["op_name"], event["name"]
    shapes = [shape for entry in event["args"].get("input_type_shape", []) for shape in entry.values()]
    if kind.startswith("SignAdapter") or ".lora_" in name:
        return "adapters"
    # a matrix product with one changing input has a weight; ReduceSum: the group sums of 4-bit weights with an offset
    if kind in ("MatMulNBits", "Gemm", "ReduceSum") or (kind == "MatMul" and len(shapes) == 1):
        return "linears"
    # all that has heads: rotation, the cache's copies, scores, softmax
    heads = any(len(shape) >= 4 for shape in shapes)
    return "attention" if heads or kind in ("Softmax", "MultiHeadAttention", "GroupQueryAttention") else "rest"
