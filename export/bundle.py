"""Making a bundle: capture, quantize, lower, verify, write; the order in which `python -m lordba.export` works."""

import importlib.metadata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from lordba.adapter import Adapter
from lordba.errors import LordbaError
from lordba.files import check_new_folder, new_folder, size_of
from lordba.models import BaseModel, fingerprint
from lordba.runtime.bundle import (
    MANIFEST_NAME,
    Bundle,
    BundleAdapter,
    Manifest,
    ParityCheck,
    read_bundle,
    write_manifest,
)
from lordba.threads import one_torch_thread

from .android import describe
from .target import ExportOptions, Program, Target, Way
from .verify import GATE, OP_LIMIT, Windows, compare, eager_logits, float_logits, judge, program_logits, text_windows

ADAPTER_WINDOWS = 2
OTHER_WAY_TOKENS = 64  # of a window, for ways to run a bundle that are not the one users get
TOKENIZER_NAME = "tokenizer.json"
Report = Callable[[str], None]


@dataclass(frozen=True)
class AdapterRow:
    """One line of the summary: an adapter with its worst error and how far it moves the program from the base."""

    adapter: BundleAdapter
    worst_error: float
    kl_from_base: float


@dataclass(frozen=True)
class ExportResult:
    """What was made: the manifest as written, the summary's rows, and figures of the program."""

    manifest: Manifest
    rows: list[AdapterRow]
    program_bytes: int
    figure: str
    perplexities: dict[str, float]


def export_executorch(
    base: BaseModel, adapters: dict[str, Adapter], options: ExportOptions, report: Report = lambda _: None
) -> ExportResult:
    """Export a model with its adapters as an ExecuTorch bundle; nothing is written unless everything succeeds."""
    if options.delegate == "coreml":
        if options.train:
            raise LordbaError(
                "--train is for --delegate xnnpack: Core ML cannot train what it runs; leave one of them out"
            )
        from .coreml.delegate import DelegateTarget

        return export(DelegateTarget(base, adapters, options), base, adapters, options, report)
    from .executorch.target import ExecuTorchTarget

    return export(ExecuTorchTarget(base, adapters, options), base, adapters, options, report)


def export_onnx(
    base: BaseModel, adapters: dict[str, Adapter], options: ExportOptions, report: Report = lambda _: None
) -> ExportResult:
    """Export a model with its adapters as an ONNX bundle; nothing is written unless everything succeeds."""
    try:
        from .onnx.target import OnnxTarget
    except ImportError as missing:
        raise LordbaError(f"the ONNX target needs {missing.name}; run: pip install 'lordba[onnx]'") from missing
    return export(OnnxTarget(base, adapters, options), base, adapters, options, report)


def export_coreml(
    base: BaseModel, adapters: dict[str, Adapter], options: ExportOptions, report: Report = lambda _: None
) -> ExportResult:
    """Export a model with its adapters as a Core ML bundle; nothing is written unless everything succeeds."""
    from .coreml.target import CoremlTarget

    return export(CoremlTarget(base, adapters, options), base, adapters, options, report)


EXPORTERS = {"executorch": export_executorch, "onnx": export_onnx, "coreml": export_coreml}


@one_torch_thread()
def export(
    target: Target, base: BaseModel, adapters: dict[str, Adapter], options: ExportOptions, report: Report
) -> ExportResult:
    """The way of every export, through what a target brings to it."""
    if not adapters:
        raise LordbaError("there is no adapter to export; name at least one with --adapter FOLDER")
    check_new_folder(options.output, replaceable_if=MANIFEST_NAME)
    base_print, windows = prepare(target, base, adapters, report)
    base_quant, quality = quantized(target, base, windows, options, report)
    report(f"lowering to {target.title}")
    target.lower(base_print, eos_ids(base))

    with new_folder(options.output, replaceable_if=MANIFEST_NAME) as folder:
        program = target.write(folder)
        entries = [entry(folder, program, name, adapter) for name, adapter in adapters.items()]
        manifest = write_unverified(folder, target, program, base, base_print, base_quant, entries)
        parity, rows = verify(target, read_bundle(folder), windows, adapters, quality, report)
        manifest = replace(manifest, parity=[*program.checks, *parity])
        write_manifest(folder, manifest)
        if options.android:
            describe(folder, target.name)
        size = sum(size_of(path) for path in folder.glob(program.path + "*"))
    return ExportResult(manifest, rows, size, program.figure, quality)


def prepare(target: Target, base: BaseModel, adapters: dict[str, Adapter], report: Report) -> tuple[str, Windows]:
    """Check that the adapters are for this base and capture it; returns its fingerprint and the text to verify with."""
    report("hashing the base")
    base_print = fingerprint(base.model)
    check_base(adapters, base_print, base.name)
    report("capturing the decoder")
    target.capture()
    return base_print, text_windows(lambda text: base.tokenizer(text).input_ids, target.max_seq_len)


def write_unverified(
    folder: Path,
    target: Target,
    program: Program,
    base: BaseModel,
    base_print: str,
    base_quant: str,
    adapters: list[BundleAdapter],
) -> Manifest:
    """Add tokenizer and manifest to a folder that holds a program, so that it can be run; no parity is claimed yet."""
    base.tokenizer.backend_tokenizer.save(str(folder / TOKENIZER_NAME))
    manifest = Manifest(
        target=target.name,
        program=program.path,
        base={"name": base.name, "fingerprint": base_print},
        base_quant=base_quant,
        toolchain={name: version_of(name) for name in target.toolchain},
        requires=program.requires,
        adapter_mode=program.adapter_mode,
        max_seq_len=target.max_seq_len,
        eos_ids=eos_ids(base),
        modules=list(program.modules),
        adapters=adapters,
        tokenizer=TOKENIZER_NAME,
        no_adapter=program.no_adapter,
        training=program.training,
    )
    write_manifest(folder, manifest)
    return manifest


def check_base(adapters: dict[str, Adapter], base_print: str, base_name: str) -> None:
    """Refuse an adapter that was made for other weights than these."""
    for name, adapter in adapters.items():
        if adapter.base_fingerprint not in (None, base_print):
            raise LordbaError(
                f"adapter {name}: was made for the base {adapter.base_model_name_or_path} with fingerprint "
                f"{adapter.base_fingerprint}, but {base_name} has {base_print}; export it with its own base (--model)"
            )


def quantized(
    target: Target, base: BaseModel, windows: Windows, options: ExportOptions, report: Report
) -> tuple[str, dict[str, float]]:
    """Quantize the captured base as asked; with `auto`, fall back from int4 to int8 where int4 misses the quality gate.

    Returns the quantization used, and perplexities of the float model and the eager decoder.
    """
    if options.base_quant == "none":
        return "none", {}
    choices = ["int4", "int8"] if options.base_quant == "auto" else [options.base_quant]
    quality: dict[str, float] = {}
    for choice in choices:
        captured = target.capture()
        report(f"quantizing the base to {choice} and measuring its quality")
        target.quantize(choice)
        figures = compare(windows, float_logits(base.model, windows), eager_logits(captured, windows, None)).metrics()
        quality = {"float": figures["perplexity"] / figures["perplexity_ratio"], "eager": figures["perplexity"]}
        if figures["perplexity_ratio"] <= GATE:
            break
    return choice, quality


def entry(folder: Path, program: Program, name: str, adapter: Adapter) -> BundleAdapter:
    """What the manifest says of a written adapter."""
    file = program.adapter_files[name]
    added = program.added_bytes.get(name)
    return BundleAdapter(
        name=name,
        file=file,
        r=adapter.r,
        scale_code=adapter.scale_code.value,
        modules=len(adapter.modules),
        bytes=adapter.nbytes,
        fp16_lora_bytes=adapter.fp16_lora_bytes,
        file_bytes=size_of(folder / file) if added is None else added,
        function=program.functions.get(name),
    )


def verify(
    target: Target,
    bundle: Bundle,
    windows: Windows,
    adapters: dict[str, Adapter],
    quality: dict[str, float],
    report: Report,
) -> tuple[list[ParityCheck], list[AdapterRow]]:
    """Compare the written bundle, through the runtime, with the eager decoder; base first, then every adapter."""
    captured = target.captured
    (main, way), *other_ways = target.ways(bundle).items()
    session = way.session
    if target.most_text:
        windows = windows.first(*target.most_text)
    report("verifying the program without adapter")
    base_logits = []

    def remembered() -> Iterator[Tensor]:
        for i, logits in enumerate(program_logits(session, windows)):
            if i < ADAPTER_WINDOWS:
                base_logits.append(logits)
            yield logits

    figures = compare(windows, eager_logits(captured, windows, None), remembered()).metrics()
    checks = judge(main, None, figures, way.limits)
    if quality:
        # The program may have run on less text than the eager decoder, so that only ratios compare.
        quality["program"] = quality["eager"] * figures["perplexity_ratio"]
        ratio = {"perplexity_ratio_to_float": quality["program"] / quality["float"]}
        checks += judge("quality gate", None, ratio, {"perplexity_ratio_to_float": GATE})
    report("verifying every adapter op on real activations")
    probe = target.probe(windows.tokens[0])
    rows = []
    few = windows.first(ADAPTER_WINDOWS)
    for listed in bundle.manifest.adapters:
        report(f"verifying adapter {listed.name}")
        session.use(listed.name)
        found = list(program_logits(session, few))
        figures = compare(few, eager_logits(captured, few, adapters[listed.name]), iter(found)).metrics()
        checks += judge(main, listed.name, figures, way.adapter_limits)
        error = probe.worst_error(listed.name)
        checks += judge("adapter ops", listed.name, {"max_rel_err": error}, {"max_rel_err": OP_LIMIT})
        moved = compare(few, iter(base_logits), iter(found)).metrics()["mean_kl"]
        rows.append(AdapterRow(listed, error, moved))
    short = windows.first(ADAPTER_WINDOWS, OTHER_WAY_TOKENS)
    for name, other in other_ways:
        report(f"verifying the {name}")
        checks += verify_other_way(name, other, target, short, adapters)
    return checks, rows


def verify_other_way(
    check: str,
    way: Way,
    target: Target,
    windows: Windows,
    adapters: dict[str, Adapter],
) -> list[ParityCheck]:
    """The same checks, on less text, of another way to run the bundle."""
    checks = []
    for name in (None, *adapters):
        way.session.use(name)
        reference = eager_logits(target.captured, windows, adapters[name] if name else None)
        figures = compare(windows, reference, program_logits(way.session, windows)).metrics()
        checks += judge(check, name, figures, way.adapter_limits)
    return checks


def version_of(package: str) -> str:
    """The version of an installed package, without a local part such as +cpu."""
    return importlib.metadata.version(package).partition("+")[0]


def eos_ids(base: BaseModel) -> list[int]:
    """The tokens that end a text, from the generation config or else the tokenizer."""
    ids = base.model.generation_config.eos_token_id if base.model.generation_config else None
    ids = base.tokenizer.eos_token_id if ids is None else ids
    return [] if ids is None else list(ids) if isinstance(ids, list | tuple) else [ids]


def shipped_adapters() -> dict[str, Path]:
    """The adapters that come with lordba for its embedded default model, by name."""
    import lordba

    folder = Path(lordba.__file__).parent / "adapters"
    return {path.parent.name: path.parent for path in sorted(folder.glob("*/adapter_config.json"))}
