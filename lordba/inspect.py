"""`python -m lordba.inspect`: what an adapter folder (LoRDBA or plain LoRA) or a bundle holds: shapes, bytes, bits."""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from lordba.adapter import WEIGHTS_NAME, Adapter, load_adapter
from lordba.console import console, group_by_type, run_command, table
from lordba.files import sha256_of, size_of
from lordba.lora import LoraAdapter, find_adapter, read_config, read_lora
from lordba.runtime.bundle import MANIFEST_NAME, ParityCheck, read_bundle
from lordba.scales import decode_scales


@dataclass(frozen=True)
class _Line:
    """One module: its shape, its stored bytes, and the range of its largest scales or its LoRA scaling."""

    path: str
    d_in: int
    d_out: int
    r: int
    nbytes: int
    strength: float


def inspect_adapter(folder: Path, *, verbose: bool = False) -> None:
    """Print an adapter folder's contents on stdout; every deviation from its format is a LordbaError."""
    folder = find_adapter(folder)
    adapter = load_adapter(folder) if read_config(folder).get("peft_type") == "LORDBA" else read_lora(folder)
    lines = list(_lordba_lines(adapter) if isinstance(adapter, Adapter) else _lora_lines(adapter))
    _print_table(lines, "max s_out*s_mid*s_in" if isinstance(adapter, Adapter) else "alpha / r", verbose=verbose)
    weights = folder / WEIGHTS_NAME
    stored = sum(line.nbytes for line in lines)
    bits = 8 * stored / sum(line.r * (line.d_in + line.d_out) for line in lines)
    facts = {
        "kind": f"LoRDBA, {adapter.scale_code.value} scales" if isinstance(adapter, Adapter) else "plain LoRA",
        "base": adapter.base_model_name_or_path or "not recorded",
        "tensors": f"{stored:,} bytes, {bits:.4f} bits per adapter weight",
        "file": f"{weights.stat().st_size:,} bytes, sha256 {sha256_of(weights)}",
    }
    if isinstance(adapter, Adapter):
        facts["base fingerprint"] = adapter.base_fingerprint or "not recorded"
        facts["fp16 LoRA"] = f"{adapter.fp16_lora_bytes:,} bytes, {adapter.fp16_lora_bytes / stored:.2f}x as many"
    _print_facts(facts)


def inspect_bundle(folder: Path) -> None:
    """Print what a bundle holds on stdout, after checking every file of it against the manifest."""
    manifest = read_bundle(folder).manifest
    adapters = [
        [a.name, str(a.r), a.scale_code, str(a.modules), f"{a.bytes:,}", f"{a.file_bytes:,}"] for a in manifest.adapters
    ]
    console().print(table("adapters", ["name", "r", "scales", "modules", "bytes", "runtime file"], adapters))
    console().print(parity_table(manifest.parity))
    facts = {
        "target": f"{manifest.target}, adapters as {manifest.adapter_mode}, up to {manifest.max_seq_len} tokens",
        "base": f"{manifest.base['name']}, {manifest.base_quant}",
        "base fingerprint": manifest.base["fingerprint"],
        "program": f"{size_of(folder / manifest.program):,} bytes",
        "requires": ", ".join(manifest.requires),
        "made with": ", ".join(f"{name} {version}" for name, version in manifest.toolchain.items()),
    }
    _print_facts(facts)


def parity_table(checks: Sequence[ParityCheck]) -> Table:
    """How a program compares with its eager reference, one line per figure."""
    rows = [
        [
            f"{c.check}: {c.adapter or 'base'}",
            c.metric,
            f"{c.value:.4g}",
            f"{c.limit:g}",
            "ok" if c.passed else "FAILED",
        ]
        for c in checks
    ]
    return table("parity with the eager reference", ["check", "metric", "value", "limit", ""], rows)


def _print_facts(facts: Mapping[str, str]) -> None:
    for name, fact in facts.items():
        print(f"{name + ':':<18}{fact}")


def _lordba_lines(adapter: Adapter) -> Iterable[_Line]:
    for path, m in adapter.modules.items():
        peaks = [float(decode_scales(scales).max()) for scales in m.scales]
        yield _Line(path, m.d_in, m.d_out, m.r, m.nbytes, peaks[0] * peaks[1] * peaks[2])


def _lora_lines(lora: LoraAdapter) -> Iterable[_Line]:
    return (_Line(path, m.d_in, m.d_out, m.r, m.nbytes, m.scaling) for path, m in lora.modules.items())


def _print_table(lines: Sequence[_Line], strength: str, *, verbose: bool) -> None:
    groups = {line.path: [line] for line in lines} if verbose else group_by_type(lines, lambda line: line.path)
    rows = [_row(name, group) for name, group in groups.items()]
    columns = ["module" if verbose else "modules", "count", "d_in", "d_out", "r", strength, "bytes"]
    console().print(table("", columns, rows, ["all", str(len(lines)), "", "", "", "", _row("all", lines)[-1]]))


def _row(name: str, group: Sequence[_Line]) -> list[str]:
    spans = (_span([getattr(line, key) for line in group]) for key in ("d_in", "d_out", "r", "strength"))
    return [name, str(len(group)), *spans, f"{sum(line.nbytes for line in group):,}"]


def _span(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.4g}" if low == high else f"{low:.4g} .. {high:.4g}"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m lordba.inspect",
        description="Show what an adapter (LoRDBA or plain PEFT LoRA) or a bundle holds, after checking all of it.",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="an adapter folder or a bundle")
    parser.add_argument("--verbose", action="store_true", help="list every module, not only every type of module")
    args = parser.parse_args()
    if (args.folder / MANIFEST_NAME).is_file():
        inspect_bundle(args.folder)
    else:
        inspect_adapter(args.folder, verbose=args.verbose)


if __name__ == "__main__":
    run_command(main)
