"""What adapters cost in a program: exports what is missing, measures it, and writes docs/latency.{md,json,html}.

    python benchmarks/latency.py --work FOLDER [--models smollm2,wide] [--targets executorch,onnx] [--wide-layers 6]

FOLDER keeps bundles and measurements; a run that was interrupted goes on, and --again measures anew. `smollm2` is the
embedded default with its shipped adapter `shakespeare`; `wide` has random weights and a random adapter, and the widths
of Llama 3.2 1B (d=2048, 8192 in the MLP). With SmolLM2's vocabulary, 6 layers have that model's share of weights in the
last product (21 %), so that overheads in % are its own; absolute times are not.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from lordba.adapter import Adapter, SignModule, save_adapter
from lordba.console import console, quiet_libraries
from lordba.files import new_file
from lordba.layers import linear_size
from lordba.profiling.page import page
from lordba.profiling.plan import title_of
from lordba.profiling.report import milliseconds_text, overhead_text, phase_name, profile_report, sections, variants
from lordba.runtime.bundle import MANIFEST_NAME
from lordba.scales import ScaleCode, encode_scales
from lordba.signs import pack_signs

PROJECT = Path(__file__).parents[1]
AGAINST = "none,lora-fp32,lora-fp16"
RANK = 16
MAX_SEQ_LEN = {"smollm2": 1024, "wide": 256}
LENGTHS = {"smollm2": "32,128,512", "wide": "32,128"}
BEGIN, END = "<!-- tables: written by benchmarks/latency.py -->", "<!-- end of tables -->"


def wide_model(folder: Path, layers: int) -> None:
    """A random Llama of Llama 3.2 1B's widths, with SmolLM2's tokenizer, and a random adapter of its linear layers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from lordba.models import fingerprint, load_base

    tokenizer = load_base().tokenizer
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=len(tokenizer),
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    generator = torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()

    def module(d_in: int, d_out: int) -> SignModule:
        a, b = (pack_signs(torch.randn(n, k, generator=generator)) for n, k in ((RANK, d_in), (d_out, RANK)))
        sizes = ((d_in, 0.05), (RANK, 1.0), (d_out, 0.05))
        scales = [encode_scales((torch.rand(n, generator=generator) + 0.1) * s, ScaleCode.LOG4) for n, s in sizes]
        return SignModule(a, b, *scales)

    linears = ((path, linear_size(layer)) for path, layer in model.named_modules() if path != "lm_head")
    modules = {path: module(*size) for path, size in linears if size}
    tokenizer.save_pretrained(folder / folder.name)  # the name that the tables have
    model.save_pretrained(folder / folder.name)
    save_adapter(Adapter(modules, ScaleCode.LOG4, folder.name, fingerprint(model)), folder / "random")


def export(work: Path, model: str, target: str, options: argparse.Namespace) -> tuple[Path, list[Path], str]:
    """The bundles of a model for a target, made where missing: the LoRDBA one, those to compare with, the adapter."""
    name = "shakespeare" if model == "smollm2" else "random"
    arguments = ["--target", target, "--base-quant", "int4", "--max-seq-len", str(MAX_SEQ_LEN[model])]
    if model == "smollm2":
        arguments += ["--adapter", f"shakespeare={PROJECT / 'lordba' / 'adapters' / 'shakespeare'}"]
    else:
        layers = options.wide_layers
        folder = work / f"random-d2048-{layers}-layers"
        if not (folder / "random").is_dir():
            wide_model(folder, layers)
        arguments += ["--model", str(folder / folder.name), "--adapter", f"random={folder / 'random'}"]
    made = []
    for form in ("signs", *options.against.split(",")):
        bundle = work / f"{model}-{target}-{form}"
        made.append(bundle)
        if (bundle / MANIFEST_NAME).is_file():
            continue
        own = ["--adapter-form", form, "--output", str(bundle)]
        own += ["--adapter-mode", "input"] if (target, form) == ("executorch", "signs") else []
        run = subprocess.run([sys.executable, "-m", "lordba.export", *arguments, *own], stdout=subprocess.DEVNULL)
        if not (bundle / MANIFEST_NAME).is_file():  # a failed parity check leaves a bundle, and says so
            raise SystemExit(f"error: the export of {bundle.name} failed with {run.returncode}")
    return made[0], made[1:], name


def measure(work: Path, model: str, target: str, options: argparse.Namespace) -> dict[str, Any]:
    """The record of a model on a target, measured where missing."""
    path = work / f"{model}-{target}.json"
    if options.again or not path.is_file():
        bundle, against, adapter = export(work, model, target, options)
        arguments = [str(bundle), "--adapter", adapter, "--threads", options.threads, "--rounds", str(options.rounds)]
        arguments += ["--processes", str(options.processes)]
        arguments += ["--prompt-lengths", LENGTHS[model], "--clock", options.clock]
        for other in against:
            arguments += ["--against", str(other)]
        command = [sys.executable, "-m", "lordba.profile", *arguments, "--json", str(path)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads(path.read_text())


def merged(records: list[dict[str, Any]]) -> dict[str, Any]:
    """One record of several of the same machine; what differs in their conditions is listed."""
    result = dict(records[0])
    for key in ("rows", "memory", "operators"):
        result[key] = [row for record in records for row in record[key]]
    versions = {name: v for record in records for name, v in record["machine"]["versions"].items()}
    notes = {note: None for record in records for note in record["conditions"]["notes"]}
    loads = [load for record in records for load in record["conditions"]["load_average"]]
    result["machine"] = {**records[0]["machine"], "versions": versions}
    result["conditions"] = {**records[0]["conditions"], "notes": list(notes), "load_average": loads}
    return result


def tables(record: dict[str, Any]) -> str:
    """Overheads as Markdown, a table per section."""
    parts = []
    for title, rows in sections(record["rows"]):
        phases = list(dict.fromkeys(phase_name(row) for row in rows if row["phase"] != "swap"))
        cells = {(title_of(row), phase_name(row)): row for row in rows}
        lines = [f"**{title}**", "", f"| | {' | '.join(phases)} |", f"|---|{'---:|' * len(phases)}"]
        for variant in variants(rows):
            shown = [cells[variant, phase] for phase in phases]
            texts = (overhead_text(row) or f"{milliseconds_text(row['ms_p50'])} ms" for row in shown)
            lines.append(f"| {variant} | {' | '.join(texts)} |")
        swaps = [f"{milliseconds_text(row['ms_p50'])} ms" for row in rows if row["phase"] == "swap"]
        parts.append("\n".join(lines) + (f"\n\nA swap, from the adapter's file: {swaps[0]}." if swaps else ""))
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where bundles and measurements are kept")
    parser.add_argument("--models", default="smollm2,wide")
    parser.add_argument("--targets", default="executorch,onnx")
    parser.add_argument("--against", default=AGAINST, help=f"forms of --adapter-form to compare with: {AGAINST}")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=6)
    parser.add_argument("--wide-layers", type=int, default=6)
    parser.add_argument("--again", action="store_true", help="measure anew what has been measured")
    parser.add_argument("--docs", type=Path, default=PROJECT / "docs", help="where latency.* is written")
    options = parser.parse_args()
    quiet_libraries()
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    pairs = [(model, target) for model in options.models.split(",") for target in options.targets.split(",")]
    for model, target in pairs:  # all exports first: nothing else shall run when times are taken
        if options.again or not (work / f"{model}-{target}.json").is_file():
            export(work, model, target, options)
    record = merged([measure(work, model, target, options) for model, target in pairs])
    console().print(profile_report(record))
    text = (options.docs / "latency.md").read_text()
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    contents = {
        "latency.md": f"{before}{BEGIN}\n\n{tables(record)}\n\n{END}{after}",
        "latency.json": json.dumps(record, indent=1, sort_keys=True, ensure_ascii=False) + "\n",
        "latency.html": page(record),
    }
    for name, content in contents.items():
        with new_file(options.docs / name) as path:
            path.write_text(content)


if __name__ == "__main__":
    main()
