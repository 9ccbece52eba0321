"""Programs to compare with: the same base without adapters, or with one adapter as a dense LoRA, unmerged.

Each becomes a bundle of its own, which `lordba.profile` measures beside the LoRDBA one. The LoRA has the adapter's own
rank and modules and computes the same update, so that only the form of its factors differs.
"""

from dataclasses import replace

from lordba.adapter import Adapter
from lordba.errors import LordbaError
from lordba.files import check_new_folder, new_folder, size_of
from lordba.models import BaseModel
from lordba.runtime.bundle import COMPARISON_MODES, MANIFEST_NAME, BundleAdapter, read_bundle, write_manifest
from lordba.threads import one_torch_thread

from .bundle import ExportResult, Report, eos_ids, prepare, quantized, write_unverified
from .target import LORA_DTYPES, ExportOptions, Target
from .verify import compare, eager_logits, judge, program_logits

WINDOWS = 2
FP16_LIMITS = {"max_abs_err": 0.05, "max_rel_err": 0.002, "mean_kl": 1e-5}
"""What rounding an adapter's factors to fp16 may change in a program that is exact otherwise."""


def comparison_target(
    base: BaseModel, name: str, adapter: Adapter, form: str, options: ExportOptions, to: str
) -> Target:
    """The target `to` in one of COMPARISON_MODES."""
    if form not in COMPARISON_MODES:
        raise LordbaError(f"an adapter's form must be one of {', '.join(COMPARISON_MODES)}, found {form!r}")
    if to == "executorch" and options.delegate == "xnnpack":
        from .executorch.comparison import ExecuTorchComparison

        return ExecuTorchComparison(base, name, adapter, form, options)
    if to == "onnx":
        from .onnx.comparison import OnnxComparison

        return OnnxComparison(base, name, adapter, form, options)
    raise LordbaError("programs to compare with exist for --target onnx and for --target executorch with XNNPACK")


@one_torch_thread()
def export_comparison(
    base: BaseModel, adapters: dict[str, Adapter], form: str, to: str, options: ExportOptions, report: Report
) -> ExportResult:
    """Export the base in this form; its logits must agree with those of the eager decoder in the same state."""
    if len(adapters) != 1:
        raise LordbaError(f"--adapter-form {form} takes one adapter, found {len(adapters)}; name it with --adapter")
    ((name, adapter),) = adapters.items()
    check_new_folder(options.output, replaceable_if=MANIFEST_NAME)
    target = comparison_target(base, name, adapter, form, options, to)
    base_print, windows = prepare(target, base, adapters, report)
    if options.base_quant in ("auto", "none"):
        base_quant, quality = quantized(target, base, windows, options, report)
    else:  # the LoRDBA export of the same base has measured its quality
        base_quant, quality = options.base_quant, {}
        target.quantize(base_quant)
    few = windows.first(WINDOWS)
    expected = list(eager_logits(target.captured, few, None if form == "none" else adapter))
    report(f"lowering to {target.title}")
    target.lower(base_print, eos_ids(base))
    with new_folder(options.output, replaceable_if=MANIFEST_NAME) as folder:
        program = target.write(folder)
        entries = [] if form == "none" else [dense_entry(name, adapter, form, program.no_adapter or program.path)]
        manifest = write_unverified(folder, target, program, base, base_print, base_quant, entries)
        report("verifying the program")
        way = next(iter(target.ways(read_bundle(folder)).values()))
        figures = compare(few, iter(expected), program_logits(way.session, few)).metrics()
        limits = way.limits if form == "none" else way.adapter_limits
        if form == "lora-fp16":
            limits = {metric: max(limit, FP16_LIMITS.get(metric, limit)) for metric, limit in limits.items()}
        parity = judge("program", None if form == "none" else name, figures, limits)
        manifest = replace(manifest, parity=parity)
        write_manifest(folder, manifest)
        size = sum(size_of(path) for path in folder.glob(program.path + "*"))
    return ExportResult(manifest, [], size, program.figure, quality)


def dense_entry(name: str, adapter: Adapter, form: str, file: str) -> BundleAdapter:
    """What the manifest says of an adapter in dense form: its factors' bytes, and the file that holds them."""
    size = LORA_DTYPES[form].itemsize * adapter.fp16_lora_bytes // 2
    code = form.removeprefix("lora-")
    return BundleAdapter(name, file, adapter.r, code, len(adapter.modules), size, adapter.fp16_lora_bytes, size)
