"""Programs to compare with: the same base without adapters, or with one adapter as a dense LoRA, unmerged.

Each becomes a bundle of its own, which `lordba.profile` measures beside the LoRDBA one. The LoRA has the adapter's own
rank and modules and computes the same update, so that only the form of its factors differs.
"""

from dataclasses import replace

import torch

from lordba.adapter import Adapter
from lordba.bundle import COMPARISON_MODES, MANIFEST_NAME, BundleAdapter, Manifest, read_bundle, write_manifest
from lordba.errors import LordbaError
from lordba.files import check_new_folder, new_folder, size_of
from lordba.models import BaseModel, fingerprint
from lordba.threads import one_torch_thread

from .bundle import TOKENIZER_NAME, ExportResult, Report, check_base, eos_ids, quantized, version_of
from .target import ExportOptions, Target
from .verify import compare, eager_logits, judge, program_logits, text_windows

WINDOWS = 2
FP16_LIMITS = {"max_abs_err": 0.05, "max_rel_err": 0.002, "mean_kl": 1e-5}
"""What rounding an adapter's factors to fp16 may change in a program that is exact otherwise."""
DTYPES = {"lora-fp32": torch.float32, "lora-fp16": torch.float16}


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
    report("hashing the base")
    base_print = fingerprint(base.model)
    check_base(adapters, base_print, base.name)
    target = comparison_target(base, name, adapter, form, options, to)
    report("capturing the decoder")
    target.capture()
    windows = text_windows(lambda text: base.tokenizer(text).input_ids, target.max_seq_len)
    if options.base_quant in ("auto", "none"):
        base_quant, quality = quantized(target, base, windows, options, report)
    else:  # the LoRDBA export of the same base has measured its quality
        base_quant, quality = options.base_quant, {}
        target.quantize(base_quant)
    few = windows.first(WINDOWS)
    expected = list(eager_logits(target.captured, few, None if form == "none" else adapter))
    report(f"lowering to {target.title}")
    eos = eos_ids(base)
    target.lower(base_print, eos)
    with new_folder(options.output, replaceable_if=MANIFEST_NAME) as folder:
        program = target.write(folder)
        base.tokenizer.backend_tokenizer.save(str(folder / TOKENIZER_NAME))
        manifest = Manifest(
            target=target.name,
            program=program.path,
            base={"name": base.name, "fingerprint": base_print},
            base_quant=base_quant,
            toolchain={package: version_of(package) for package in target.toolchain},
            requires=program.requires,
            adapter_mode=form,
            max_seq_len=target.max_seq_len,
            eos_ids=eos,
            modules=[],
            adapters=[] if form == "none" else [dense_entry(name, adapter, form, program.no_adapter or program.path)],
            tokenizer=TOKENIZER_NAME,
            no_adapter=program.no_adapter,
        )
        write_manifest(folder, manifest)
        report("verifying the program")
        way = next(iter(target.ways(read_bundle(folder)).values()))
        figures = compare(few, iter(expected), program_logits(way.session, few)).metrics()
        limits = way.limits if form == "none" else way.adapter_limits
        if form == "lora-fp16":
            limits = {metric: max(limit, FP16_LIMITS.get(metric, limit)) for metric, limit in limits.items()}
        parity = judge("program", None if form == "none" else name, figures, limits)
        write_manifest(folder, replace(manifest, parity=parity))
        size = sum(size_of(path) for path in folder.glob(program.path + "*"))
    return ExportResult(replace(manifest, parity=parity), [], size, program.figure, quality)


def dense_entry(name: str, adapter: Adapter, form: str, file: str) -> BundleAdapter:
    """What the manifest says of an adapter in dense form: its factors' bytes, and the file that holds them."""
    size = DTYPES[form].itemsize * adapter.fp16_lora_bytes // 2
    code = form.removeprefix("lora-")
    return BundleAdapter(name, file, adapter.r, code, len(adapter.modules), size, adapter.fp16_lora_bytes, size)
