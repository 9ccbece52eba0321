"""Making a bundle: capture, quantize, lower, verify, write; the order in which `python -m lordba.export` works."""

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from lordba.adapter import Adapter
from lordba.bundle import MANIFEST_NAME, BundleAdapter, Manifest, ParityCheck, read_bundle, write_manifest
from lordba.errors import LordbaError
from lordba.files import check_new_folder, new_folder
from lordba.models import BaseModel, fingerprint
from lordba.session import Session
from lordba.threads import one_torch_thread

from .capture import Captured, capture
from .executorch import Lowered, lower, write_ptd
from .quantize import quantize_base
from .verify import (
    ADAPTER_LIMITS,
    FLOAT_LIMITS,
    GATE,
    OP_LIMIT,
    QUANTIZED_LIMITS,
    OpProbe,
    Windows,
    compare,
    eager_logits,
    float_logits,
    judge,
    program_logits,
    text_windows,
)

ADAPTER_WINDOWS = 2
PROGRAM_NAME = "model.pte"
TOKENIZER_NAME = "tokenizer.json"
Report = Callable[[str], None]


@dataclass(frozen=True)
class ExportOptions:
    """What the user chose; base_quant `auto` is int4 where it passes the quality gate, else int8."""

    output: Path
    base_quant: str = "auto"
    adapter_mode: str = "ptd"
    max_seq_len: int = 512
    route: str = "auto"


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
    partitions: int
    perplexities: dict[str, float]


@one_torch_thread()
def export_executorch(
    base: BaseModel, adapters: dict[str, Adapter], options: ExportOptions, report: Report = lambda _: None
) -> ExportResult:
    """Export a model with its adapters as an ExecuTorch bundle; nothing is written unless everything succeeds."""
    if not adapters:
        raise LordbaError("there is no adapter to export; name at least one with --adapter FOLDER")
    check_new_folder(options.output, replaceable_if=MANIFEST_NAME)
    report("hashing the base")
    base_print = fingerprint(base.model)
    check_base(adapters, base_print, base.name)
    report("capturing the decoder")
    captured = capture(base.model, adapters, options.max_seq_len, options.route)
    windows = text_windows(lambda text: base.tokenizer(text).input_ids, options.max_seq_len)
    captured, base_quant, quality = quantized(base, captured, windows, adapters, options, report)
    size = captured.slot.size_for(list(adapters.values()))
    fixed = size if options.adapter_mode == "ptd" else None
    blobs = {name: captured.slot.blob_of(adapter, fixed) for name, adapter in adapters.items()}
    nothing = captured.slot.blob_of(None, fixed)
    report("lowering to ExecuTorch")
    trace = max(blobs.values(), key=Tensor.numel)
    eos = eos_ids(base)
    lowered = lower(captured, trace, options.adapter_mode, runner_metadata(base, captured, eos))

    with new_folder(options.output, replaceable_if=MANIFEST_NAME) as folder:
        (folder / PROGRAM_NAME).write_bytes(lowered.pte)
        base.tokenizer.backend_tokenizer.save(str(folder / TOKENIZER_NAME))
        entries = write_adapters(folder, adapters, blobs, nothing, lowered)
        manifest = Manifest(
            target="executorch",
            program=PROGRAM_NAME,
            base={"name": base.name, "fingerprint": base_print},
            base_quant=base_quant,
            toolchain={name: version_of(name) for name in ("torch", "executorch", "transformers")},
            requires=lowered.requires,
            adapter_mode=options.adapter_mode,
            max_seq_len=options.max_seq_len,
            eos_ids=eos,
            modules=captured.slot.paths,
            adapters=entries,
            tokenizer=TOKENIZER_NAME,
            no_adapter=adapter_path("none", options.adapter_mode),
        )
        write_manifest(folder, manifest)
        parity, rows = verify(folder, captured, windows, adapters, blobs, nothing, base_quant, quality, report)
        manifest = replace(manifest, parity=parity)
        write_manifest(folder, manifest)
    return ExportResult(manifest, rows, len(lowered.pte), lowered.partitions, quality)


def check_base(adapters: dict[str, Adapter], base_print: str, base_name: str) -> None:
    """Refuse an adapter that was made for other weights than these."""
    for name, adapter in adapters.items():
        if adapter.base_fingerprint not in (None, base_print):
            raise LordbaError(
                f"adapter {name}: was made for the base {adapter.base_model_name_or_path} with fingerprint "
                f"{adapter.base_fingerprint}, but {base_name} has {base_print}; export it with its own base (--model)"
            )


def quantized(
    base: BaseModel,
    captured: Captured,
    windows: Windows,
    adapters: dict[str, Adapter],
    options: ExportOptions,
    report: Report,
) -> tuple[Captured, str, dict[str, float]]:
    """Quantize the base as asked; with `auto`, fall back from int4 to int8 where int4 misses the quality gate.

    Returns the captured decoder, the quantization used, and perplexities of the float model and the eager decoder.
    """
    if options.base_quant == "none":
        return captured, "none", {}
    choices = ["int4", "int8"] if options.base_quant == "auto" else [options.base_quant]
    quality: dict[str, float] = {}
    for i, choice in enumerate(choices):
        if i:
            captured = capture(base.model, adapters, options.max_seq_len, options.route)
        report(f"quantizing the base to {choice} and measuring its quality")
        quantize_base(captured.module, choice)
        candidate = eager_logits(captured, windows, captured.slot.blob_of(None))
        figures = compare(windows, float_logits(base.model, windows), candidate).metrics()
        quality = {"float": figures["perplexity"] / figures["perplexity_ratio"], "eager": figures["perplexity"]}
        if figures["perplexity_ratio"] <= GATE:
            break
    return captured, choice, quality


def adapter_path(name: str, mode: str) -> str:
    return f"adapters/{name}.{'ptd' if mode == 'ptd' else 'blob'}"


def write_adapters(
    folder: Path, adapters: dict[str, Adapter], blobs: dict[str, Tensor], nothing: Tensor, lowered: Lowered
) -> list[BundleAdapter]:
    """Write each adapter, and the file that stands for none, in the form that the program takes."""
    (folder / "adapters").mkdir()
    mode = "ptd" if lowered.adapter_key else "input"

    def write(name: str, blob: Tensor) -> Path:
        path = folder / adapter_path(name, mode)
        if lowered.adapter_key:
            write_ptd(path, lowered.adapter_key, blob)
        else:
            path.write_bytes(blob.numpy().tobytes())
        return path

    write("none", nothing)
    return [
        BundleAdapter(
            name=name,
            file=adapter_path(name, mode),
            r=adapter.r,
            scale_code=adapter.scale_code.value,
            modules=len(adapter.modules),
            bytes=adapter.nbytes,
            fp16_lora_bytes=adapter.fp16_lora_bytes,
            file_bytes=write(name, blobs[name]).stat().st_size,
        )
        for name, adapter in adapters.items()
    ]


def verify(
    folder: Path,
    captured: Captured,
    windows: Windows,
    adapters: dict[str, Adapter],
    blobs: dict[str, Tensor],
    nothing: Tensor,
    base_quant: str,
    quality: dict[str, float],
    report: Report,
) -> tuple[list[ParityCheck], list[AdapterRow]]:
    """Compare the written bundle, through the runtime, with the eager decoder; base first, then every adapter."""
    bundle = read_bundle(folder)
    limits, adapter_limits = (
        (FLOAT_LIMITS, FLOAT_LIMITS) if base_quant == "none" else (QUANTIZED_LIMITS, ADAPTER_LIMITS)
    )
    report("verifying the program without adapter")
    session = Session(bundle)
    base_logits = []

    def remembered():
        for i, logits in enumerate(program_logits(session, windows)):
            if i < ADAPTER_WINDOWS:
                base_logits.append(logits)
            yield logits

    figures = compare(windows, eager_logits(captured, windows, nothing), remembered()).metrics()
    checks = judge("program", None, figures, limits)
    if quality:
        quality["program"] = figures["perplexity"]
        ratio = {"perplexity_ratio_to_float": figures["perplexity"] / quality["float"]}
        checks += judge("quality gate", None, ratio, {"perplexity_ratio_to_float": GATE})
    report("verifying every adapter op on real activations")
    probe = OpProbe(captured, windows, blobs[next(iter(blobs))])
    rows = []
    few = windows.first(ADAPTER_WINDOWS)
    for entry in bundle.manifest.adapters:
        report(f"verifying adapter {entry.name}")
        session.use(entry.name)
        found = list(program_logits(session, few))
        figures = compare(few, eager_logits(captured, few, blobs[entry.name]), iter(found)).metrics()
        checks += judge("program", entry.name, figures, adapter_limits)
        error = probe.worst_error(adapters[entry.name], blobs[entry.name])
        checks += judge("adapter ops", entry.name, {"max_rel_err": error}, {"max_rel_err": OP_LIMIT})
        moved = compare(few, iter(base_logits), iter(found)).metrics()["mean_kl"]
        rows.append(AdapterRow(entry, error, moved))
    return checks, rows


def version_of(package: str) -> str:
    """The version of an installed package, without a local part such as +cpu."""
    return importlib.metadata.version(package).partition("+")[0]


def eos_ids(base: BaseModel) -> list[int]:
    """The tokens that end a text, from the generation config or else the tokenizer."""
    ids = base.model.generation_config.eos_token_id if base.model.generation_config else None
    ids = base.tokenizer.eos_token_id if ids is None else ids
    return [] if ids is None else list(ids) if isinstance(ids, list | tuple) else [ids]


def runner_metadata(base: BaseModel, captured: Captured, eos: list[int]) -> dict[str, object]:
    """The metadata methods that ExecuTorch's own LLM runner asks a program for."""
    config = base.model.config
    return {
        "get_bos_id": base.tokenizer.bos_token_id or 0,
        "get_eos_ids": eos or [0],
        "get_max_seq_len": captured.max_seq_len - 1,
        "get_max_context_len": captured.max_seq_len,
        "get_n_layers": config.num_hidden_layers,
        "get_vocab_size": config.vocab_size,
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": True,
        "enable_dynamic_shape": True,
    }


def shipped_adapters() -> dict[str, Path]:
    """The adapters that come with lordba for its embedded default model, by name."""
    import lordba

    folder = Path(lordba.__file__).parent / "adapters"
    return {path.parent.name: path.parent for path in sorted(folder.glob("*/adapter_config.json"))}
