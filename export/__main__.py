"""`python -m lordba.export`: a model and its adapters become a bundle that a phone's runtime can run."""

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from lordba.adapter import Adapter, load_adapter
from lordba.console import console, quiet_libraries, run_command, table
from lordba.errors import LordbaError
from lordba.inspect import parity_table
from lordba.runtime.bundle import COMPARISON_MODES, is_adapter_name

if TYPE_CHECKING:
    from .bundle import ExportResult
    from .target import ExportOptions

DESCRIPTION = """\
Lower a decoder with unmerged LoRDBA adapters into a bundle: the program, one small file per adapter, a manifest.
Without --model and --adapter it takes the embedded default: SmolLM2-135M-Instruct and the adapters that ship here.
"""
EXAMPLES = """\
examples:
  python -m lordba.export --target executorch
  python -m lordba.export --target onnx --base-quant int8
  python -m lordba.export --target coreml --ios 17 --stateless --adapter shakespeare=./shakespeare
  python -m lordba.export --target executorch --model ./my-model --adapter ./pirate --adapter terse=./my-terse-adapter
  python -m lordba.export --target executorch --train
  python -m lordba.export --target executorch --base-quant none --adapter-mode input --output ./float-bundle
  python -m lordba.export --target executorch --android
  python -m lordba.export --target executorch --adapter shakespeare=./shakespeare --adapter-form lora-fp32
"""


ADAPTER_MODES = {"executorch": ("ptd", "input"), "coreml": ("functions", "inputs")}
OPTION_OWNERS = {
    "route": "executorch",
    "delegate": "executorch",
    "train": "executorch",
    "accuracy_level": "onnx",
    "ort_format": "onnx",
    "ios": "coreml",
    "sign_storage": "coreml",
    "stateless": "coreml",
}
DELEGATE_OPTIONS = ("sign_storage",)
"""Of Core ML, and also of ExecuTorch's delegate for it."""


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    result = argparse.ArgumentParser(
        "python -m lordba.export",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = result.add_argument
    add("--target", required=True, choices=["executorch", "onnx", "coreml"], help="the runtime to export for")
    add("--model", help="a local folder, a .gguf file or a hub id (the only case that uses the network)")
    add(
        "--adapter",
        action="append",
        default=[],
        metavar="[NAME=]FOLDER",
        help="a LoRDBA adapter folder (see lordba.convert); repeat for several. The name defaults to the folder's",
    )
    add("--output", type=Path, help="the bundle's folder (default: bundle-TARGET or bundle-TARGET-android)")
    add(
        "--base-quant",
        default="auto",
        choices=["auto", "int4", "int8", "none"],
        help="weights of the frozen base; auto is int4 where perplexity stays within 1.05x of float, else int8",
    )
    add(
        "--adapter-mode",
        choices=[mode for modes in ADAPTER_MODES.values() for mode in modes],
        help="executorch: ptd (default) is a data file beside the program, also for ExecuTorch's own LLM runner; "
        "input: an argument of each call, of any rank. Both swap without reloading. "
        "coreml: functions (default) of one program, which share the base; inputs: arguments of each call",
    )
    add(
        "--adapter-form",
        default="signs",
        choices=["signs", *COMPARISON_MODES],
        help="other than signs (default): a program to compare with, for lordba.profile --against: the base without "
        "adapters, or with one adapter as a dense LoRA",
    )
    add(
        "--max-seq-len",
        type=int,
        help="tokens that the KV cache holds (default: 512, or what the model takes for onnx)",
    )
    add(
        "--route",
        default="auto",
        choices=["auto", "fast", "generic"],
        help="executorch: fast captures Llama-like models, generic any transformers decoder",
    )
    add(
        "--accuracy-level",
        type=int,
        default=4,
        choices=[0, 4],
        help="onnx: 4 rounds the activations of quantized layers to int8, which is fast (default); 0 keeps them float",
    )
    add("--ios", type=int, default=18, choices=[16, 17, 18], help="coreml: the oldest system to run on (default: 18)")
    add(
        "--sign-storage",
        default="lut1",
        choices=["lut1", "int8", "fp16"],
        help="coreml: how signs are stored; lut1 is 1 bit (default), the others for devices that cannot load that",
    )
    add(
        "--stateless",
        action="store_true",
        help="coreml: without KV cache, for systems before iOS 18; every step runs the whole text",
    )
    add(
        "--delegate",
        default="xnnpack",
        choices=["xnnpack", "coreml"],
        help="executorch: what runs the program; coreml puts a Core ML program into the .pte (Apple systems only)",
    )
    add(
        "--train",
        nargs="?",
        const="fused",
        choices=["fused", "portable"],
        help="executorch: add a program that trains adapters on the device; fused (default) is small and fast, "
        "portable has standard operators alone, for runtimes without our kernels",
    )
    add(
        "--android",
        action="store_true",
        help="executorch, onnx: a bundle for the app in android_demo, with adapters as inputs, for onnx of 1024 tokens",
    )
    add("--ort-format", action="store_true", help="onnx: also write the program as .ort files, for builds for phones")
    return result


def read_adapters(values: list[str], use_shipped: bool) -> dict[str, Adapter]:
    """Load the adapters named on the command line, or the shipped ones."""
    from .bundle import shipped_adapters

    folders = shipped_adapters() if use_shipped and not values else {}
    for value in values:
        name, _, folder = value.rpartition("=")
        path = Path(folder)
        name = name or path.resolve().name
        if name in folders or not is_adapter_name(name):
            raise LordbaError(
                f"--adapter {value}: the name {name!r} is taken or no usable file name; give another: NAME={folder}"
            )
        folders[name] = path
    return {name: load_adapter(path) for name, path in folders.items()}


def check_options(arguments: argparse.Namespace) -> None:
    """Refuse an option of the other target, which would be without effect."""
    for name, target in OPTION_OWNERS.items():
        delegated = arguments.delegate == "coreml" and name in DELEGATE_OPTIONS
        if target != arguments.target and not delegated and getattr(arguments, name) != parser().get_default(name):
            option = "--" + name.replace("_", "-")
            raise LordbaError(f"{option} is for --target {target}, not for {arguments.target}; leave it out")
    if arguments.adapter_form != "signs" and arguments.adapter_mode:
        raise LordbaError("--adapter-mode is for programs of --adapter-form signs; leave it out")
    modes = ADAPTER_MODES.get(arguments.target, ())
    if arguments.adapter_mode and not modes:
        owners = " or ".join(ADAPTER_MODES)
        raise LordbaError(f"--adapter-mode is for --target {owners}, not for {arguments.target}; leave it out")
    if arguments.adapter_mode and arguments.adapter_mode not in modes:
        raise LordbaError(
            f"--adapter-mode {arguments.adapter_mode}: --target {arguments.target} takes {' or '.join(modes)}"
        )


def main() -> None:
    arguments = parser().parse_args()
    check_options(arguments)
    quiet_libraries()
    adapters = read_adapters(arguments.adapter, use_shipped=arguments.model is None)
    from lordba.models import load_base

    from .android import for_android
    from .bundle import EXPORTERS
    from .target import ExportOptions

    form = arguments.adapter_form
    variant = [form] * (form != "signs") + ["android"] * arguments.android
    options = ExportOptions(
        output=arguments.output or Path("-".join(["bundle", arguments.target, *variant])),
        base_quant=arguments.base_quant,
        adapter_mode=arguments.adapter_mode,
        max_seq_len=arguments.max_seq_len,
        route=arguments.route,
        accuracy_level=arguments.accuracy_level,
        ort_format=arguments.ort_format,
        ios=arguments.ios,
        sign_storage=arguments.sign_storage,
        stateless=arguments.stateless,
        delegate=arguments.delegate,
        train=arguments.train,
        android=arguments.android,
    )
    if options.android:
        options = for_android(options, arguments.target)
    status = console(stderr=True)
    started = time.monotonic()
    with status.status("starting") as spinner:

        def report(step: str) -> None:
            status.print(f"{time.monotonic() - started:4.0f} s  {step}")
            spinner.update(step)

        report("loading the model")
        base = load_base(arguments.model)
        if form == "signs":
            result = EXPORTERS[arguments.target](base, adapters, options, report)
        else:
            from .comparison import export_comparison

            result = export_comparison(base, adapters, form, arguments.target, options, report)
    show(result, options)
    if not all(check.passed for check in result.manifest.parity):
        print("error: the bundle was written, but a parity check failed (see the table)", file=sys.stderr)
        sys.exit(1)


def show(result: "ExportResult", options: "ExportOptions") -> None:
    """The summary: adapters, checks, and what to run next."""
    out = console()
    columns = ["adapter", "rank", "bytes", "vs fp16 LoRA", "runtime file", "worst op error", "KL from base"]
    rows = [
        [
            row.adapter.name,
            str(row.adapter.r),
            f"{row.adapter.bytes:,}",
            f"{row.adapter.fp16_lora_bytes / row.adapter.bytes:.2f}x",
            f"{row.adapter.file_bytes:,} ({row.adapter.file_bytes / row.adapter.bytes:.2f}x)",
            f"{row.worst_error:.1e}",
            f"{row.kl_from_base:.3f}",
        ]
        for row in result.rows
    ]
    if rows:
        out.print(table("adapters", columns, rows))
    out.print(parity_table(result.manifest.parity))
    perplexity = ", ".join(f"{name} {value:.2f}" for name, value in result.perplexities.items())
    out.print(
        f"{options.output}/{result.manifest.program}: {result.program_bytes / 1e6:.1f} MB, "
        f"base {result.manifest.base_quant}, {result.figure}" + (f"; perplexity {perplexity}" if perplexity else ""),
        soft_wrap=True,
    )
    if options.android:
        out.print(f"next: scripts/push_android_bundle.sh {options.output}")
        return
    if not rows:
        out.print(f"next: python -m lordba.profile BUNDLE --against {options.output}")
        return
    first = result.rows[0].adapter.name
    reference = " --reference" if result.manifest.target == "coreml" and sys.platform != "darwin" else ""
    out.print(f'next: python -m lordba.run {options.output}{reference} --adapter {first} --prompt "Once upon a time"')


if __name__ == "__main__":
    run_command(main)
