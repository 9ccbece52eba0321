"""What adapters cost in ONNX Runtime: decode and prefill of an ONNX bundle with none, with ours, with an fp32 LoRA.

    python benchmarks/onnx_runtime.py bundle-onnx --adapter shakespeare [--threads 1] [--json FILE]

All variants run the same quantized base. `base` has no adapter nodes at all; `lora` has two MatMuls per module, their
fp32 weights as inputs from an .onnx_adapter file (how Olive and onnxruntime-genai run LoRA), of the same rank and
modules, computing the same update. Variants take turns in short blocks, whose first run (caches cold) does not count.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper

from lordba.adapter import Adapter, load_adapter
from lordba.backends.onnxruntime import library
from lordba.bundle import Bundle, read_bundle
from lordba.console import console, table
from lordba.export.bundle import shipped_adapters
from lordba.export.onnx.op import DOMAIN
from lordba.onnx_adapter import write_onnx_adapter

PAST = 128
BLOCK = 9
Values = dict[str, Any]
value = onnxruntime.OrtValue.ortvalue_from_numpy


def without_nodes(bundle: Bundle, lora: Adapter | None) -> Path:
    """The program with every adapter node taken out, or replaced by a LoRA's MatMuls; beside its weights."""
    model = onnx.load(bundle.program, load_external_data=False)
    graph = model.graph
    kept, renamed = [], {}
    for node in graph.node:
        if node.domain != DOMAIN:
            kept.append(node)
            continue
        x, *modules = node.input  # base, signs, scales of each
        for path, base, y in zip(node.name.split(","), modules[::3], node.output, strict=True):
            if lora is None:
                renamed[y] = base
                continue
            module = lora.modules[path]
            for name, shape, free in (("a", [module.d_in, 1], 1), ("b", [1, module.d_out], 0)):
                graph.initializer.append(numpy_helper.from_array(np.zeros(shape, np.float32), f"{path}.{name}"))
                dims = [None if i == free else size for i, size in enumerate(shape)]
                graph.input.append(helper.make_tensor_value_info(f"{path}.{name}", onnx.TensorProto.FLOAT, dims))
            kept.append(helper.make_node("MatMul", [x, f"{path}.a"], [f"{path}.h"]))
            kept.append(helper.make_node("MatMul", [f"{path}.h", f"{path}.b"], [f"{path}.d"]))
            kept.append(helper.make_node("Add", [base, f"{path}.d"], [y]))
    for node in kept:
        for i, name in enumerate(node.input):
            node.input[i] = renamed.get(name, name)
    used = {name for node in kept for name in node.input}
    for field, entries in (
        (graph.node, kept),
        (graph.initializer, [entry for entry in graph.initializer if entry.name in used]),
        (graph.input, [entry for entry in graph.input if entry.name in used]),
        (model.functions, []),
    ):
        copies = [type(entry).FromString(entry.SerializeToString()) for entry in entries]
        del field[:]
        field.extend(copies)
    path = bundle.folder / f".benchmark-{'lora' if lora else 'base'}.onnx"
    onnx.save(model, path)
    return path


def lora_tensors(adapter: Adapter) -> Iterator[tuple[str, np.ndarray]]:
    """The adapter's factors as the fp32 matrices of a LoRA."""
    for path, module in adapter.modules.items():
        b, a = module.factors()
        yield f"{path}.a", a.T.float().contiguous().numpy()
        yield f"{path}.b", b.T.float().contiguous().numpy()


class Variant:
    """One way to run the base, with a past of PAST tokens."""

    def __init__(self, program: Path, adapter: Path | None, threads: int, *, native: bool) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.force_spinning_stop", "1")  # or it takes the next variant's time
        if native:
            options.register_custom_ops_library(str(library()))
        self.session = onnxruntime.InferenceSession(str(program), options)
        self.run_options = onnxruntime.RunOptions()
        if adapter:
            self.adapter = onnxruntime.LoraAdapter()
            self.adapter.Load(str(adapter))
            self.run_options.add_active_adapter(self.adapter)
        self.outputs = [output.name for output in self.session.get_outputs()]
        shapes = {entry.name: entry.shape for entry in self.session.get_inputs() if entry.name.startswith("past")}
        self.empty = {name: value(np.zeros([1, s[1], 0, s[3]], np.float32)) for name, s in shapes.items()}
        self.past: Values = self.empty
        results = self.run(PAST, 0)
        names = (name.replace("present", "past_key_values") for name in self.outputs[1:])
        self.past = dict(zip(names, results[1:], strict=True))

    def run(self, tokens: int, past: int) -> list[Any]:
        feeds = {
            "input_ids": value(np.full((1, tokens), 4)),
            "attention_mask": value(np.ones((1, past + tokens), np.int64)),
            "position_ids": value(np.arange(past, past + tokens)[None]),
        }
        cache = self.past if past else self.empty
        return self.session.run_with_ort_values(self.outputs, {**feeds, **cache}, self.run_options)

    def milliseconds(self, tokens: int, past: int) -> float:
        started = time.perf_counter()
        self.run(tokens, past)
        return 1e3 * (time.perf_counter() - started)


def measure(variants: Mapping[str, Variant], tokens: int, past: int, rounds: int, block: int) -> dict[str, list[float]]:
    """Milliseconds of each run, variants in turn; the first of a block is left out where there are more."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _, (name, variant) in itertools.product(range(rounds), variants.items()):
        runs = [variant.milliseconds(tokens, past) for _ in range(block)]
        times[name] += runs[1:] or runs
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--adapter", default="shakespeare", help="one of the shipped adapters (default: shakespeare)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--fallback", action="store_true", help="also time the body in standard operators")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    bundle = read_bundle(arguments.bundle, "onnx")
    adapter = load_adapter(shipped_adapters()[arguments.adapter])
    ours = bundle.adapter_file(arguments.adapter)
    with tempfile.TemporaryDirectory() as name:
        lora = Path(name) / "lora.onnx_adapter"
        write_onnx_adapter(lora, dict(lora_tensors(adapter)), bundle.manifest.base["fingerprint"])
        programs = [without_nodes(bundle, wanted) for wanted in (None, adapter)]
        try:
            variants = {
                "base": Variant(programs[0], None, arguments.threads, native=False),
                "none": Variant(bundle.program, None, arguments.threads, native=True),
                "lordba": Variant(bundle.program, ours, arguments.threads, native=True),
                "dense_lora": Variant(programs[1], lora, arguments.threads, native=False),
            }
            if arguments.fallback:
                variants["lordba_fallback"] = Variant(bundle.program, ours, arguments.threads, native=False)
        finally:
            for program in programs:
                program.unlink()
    rows = []
    for phase, tokens, past, rounds, block in (
        ("decode", 1, PAST, arguments.rounds, BLOCK),
        ("prefill", PAST, 0, max(3, arguments.rounds // 2), 1),
    ):
        times = measure(variants, tokens, past, rounds, block)
        base = statistics.median(times["base"])
        for name, runs in times.items():
            rows.append(
                {
                    "target": "onnx",
                    "model": bundle.manifest.base["name"],
                    "adapter": name,
                    "phase": phase,
                    "T": tokens,
                    "threads": arguments.threads,
                    "ms_p50": statistics.median(runs),
                    "ms_p99": float(np.percentile(runs, 99)),
                    "overhead_pct": 100 * (statistics.median(runs) / base - 1),
                    "overhead_pct_of_fastest": 100 * (min(runs) / min(times["base"]) - 1),
                }
            )
    cells = [
        [
            row["phase"],
            row["adapter"],
            *(f"{row[key]:.2f}" for key in ("ms_p50", "ms_p99")),
            *(f"{row[key]:+.1f} %" for key in ("overhead_pct", "overhead_pct_of_fastest")),
        ]
        for row in rows
    ]
    columns = ["phase", "adapter", "ms p50", "ms p99", "over base", "of the fastest runs"]
    console().print(table(f"{bundle.manifest.base_quant}, {arguments.threads} threads", columns, cells))
    if arguments.json:
        machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        conditions = {
            "onnxruntime": onnxruntime.__version__,
            "base_quant": bundle.manifest.base_quant,
            "past": PAST,
            "rank": adapter.r,
            "load": os.getloadavg()[0],
        }
        arguments.json.write_text(json.dumps({"machine": machine, "conditions": conditions, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
