"""`python -m lordba.convert`: a PEFT LoRA to LoRDBA by ADMM on its factors, and LoRDBA back to a plain LoRA."""

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import torch

from lordba.adapter import CONFIG_NAME, WEIGHTS_NAME, Adapter, SignModule, load_adapter, save_adapter
from lordba.console import console, group_by_type, progress_bar, run_command, table
from lordba.conversion.admm import LowRank, relative_error, to_signs
from lordba.conversion.refit import refit, store
from lordba.errors import LordbaError
from lordba.files import check_new_folder
from lordba.lora import LoraAdapter, LoraModule, find_adapter, read_config, read_lora, to_lora, write_lora
from lordba.scales import ScaleCode
from lordba.threads import one_torch_thread

# Factor elements that are solved together: enough to hide Python, few enough to stay in the cache.
_BATCH_ELEMENTS = 2**18
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class ModuleReport:
    """What the conversion did to one module; rho and errors are ratios of Frobenius norms."""

    path: str
    rho_a: float
    """|| |A| - p q^T || / ||A|| of the LoRA's own A; 0 means that signs and scales hold it exactly."""
    rho_b: float
    error: float
    """||update - LoRA's update|| / ||LoRA's update||, with the scales as stored."""
    nbytes: int

    @property
    def predicted_error(self) -> float:
        """The error to expect from rounding both factors as they stand, were their errors independent."""
        return float((1 - (1 - self.rho_a**2) * (1 - self.rho_b**2)) ** 0.5)


def convert_lora(
    lora: LoraAdapter,
    rank: int | None = None,
    scale_code: ScaleCode | str = ScaleCode.LOG4,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[Adapter, list[ModuleReport]]:
    """Convert every module; `rank` None keeps each module's own. `progress` is told how many modules came to be done.

    The adapter carries no base fingerprint; reports are in the order of the module paths.
    """
    if rank is not None and rank < 1:
        raise LordbaError(f"rank must be at least 1, found {rank}")
    code = ScaleCode(scale_code)
    modules: dict[str, SignModule] = {}
    reports: dict[str, ModuleReport] = {}
    with one_torch_thread():
        for batch in _batches(lora, rank):
            for path, module, report in _convert_batch(batch, rank, code):
                modules[path], reports[path] = module, report
            progress(len(batch))
    adapter = Adapter(
        modules=dict(sorted(modules.items())),
        scale_code=code,
        base_model_name_or_path=lora.base_model_name_or_path,
        peft_config=lora.peft_config,
    )
    return adapter, [reports[path] for path in adapter.modules]


def _batches(lora: LoraAdapter, rank: int | None) -> Iterator[list[tuple[str, LoraModule]]]:
    """Modules of one shape at a time, a limited number together."""
    groups: dict[tuple[int, int, int], list[tuple[str, LoraModule]]] = defaultdict(list)
    for path, module in lora.modules.items():
        groups[module.d_out, module.d_in, module.r].append((path, module))
    for (d_out, d_in, r), group in groups.items():
        size = max(1, _BATCH_ELEMENTS // ((d_out + d_in) * max(r, rank or r)))
        yield from (group[i : i + size] for i in range(0, len(group), size))


def _convert_batch(
    batch: Sequence[tuple[str, LoraModule]], rank: int | None, code: ScaleCode
) -> Iterator[tuple[str, SignModule, ModuleReport]]:
    pairs = [module.factors() for _, module in batch]
    target = LowRank(torch.stack([b for b, _ in pairs]), torch.stack([a.T for _, a in pairs]))
    factors, rho = to_signs(target, rank or batch[0][1].r)
    factors = refit(target, factors, code)
    errors = relative_error(target, factors)
    stored = store(factors, code)
    for (path, _), module, (rho_b, rho_a), error in zip(batch, stored, rho.tolist(), errors.tolist(), strict=True):
        yield path, module, ModuleReport(path, rho_a, rho_b, error, module.nbytes)


def check_output(out: Path, source: Path, peft_type: str) -> None:
    """Refuse an output that would replace anything but an adapter of the same kind; called before the work starts."""
    if out.resolve() == source.resolve():
        raise LordbaError(f"{out}: the output would replace the adapter that is read; name another folder")
    check_new_folder(out, replaceable_if=CONFIG_NAME)
    if not (out / CONFIG_NAME).is_file():
        return
    found = read_config(out).get("peft_type")
    foreign = sorted(path.name for path in out.iterdir() if path.name not in (CONFIG_NAME, WEIGHTS_NAME))
    if found != peft_type or foreign:
        holds = f"a {found} adapter" if found != peft_type else f"further files ({foreign[0]})"
        raise LordbaError(f"{out}: holds {holds}, which would be lost; name another folder or remove it yourself")


def to_lordba(args: argparse.Namespace) -> None:
    """PEFT LoRA folder to adapter folder, with a report."""
    source = find_adapter(args.source)
    check_output(args.out, source, "LORDBA")
    lora = read_lora(source)
    base = None
    if args.base is not None:
        from lordba.models import load_base  # transformers is slow to import and only needed here

        base = load_base(args.base)
    with progress_bar() as bar:
        task = bar.add_task("converting", total=len(lora.modules))
        adapter, reports = convert_lora(lora, args.rank, args.scales, lambda done: bar.advance(task, done))
    if base is not None:
        from lordba.layers import check_fits
        from lordba.models import fingerprint

        check_fits(adapter, base.model, str(source))
        name = adapter.base_model_name_or_path or base.name
        adapter = replace(adapter, base_model_name_or_path=name, base_fingerprint=fingerprint(base.model))
    save_adapter(adapter, args.out)
    print_reports(adapter, reports, verbose=args.verbose)
    print(f"wrote {args.out}; next: python -m lordba.export --target executorch --adapter {args.out}")


def to_peft(args: argparse.Namespace) -> None:
    """Adapter folder to plain PEFT LoRA folder."""
    source = find_adapter(args.source)
    check_output(args.out, source, "LORA")
    adapter = load_adapter(source)
    write_lora(to_lora(adapter), args.out, _DTYPES[args.dtype])
    print(
        f"wrote {args.out}: {len(adapter.modules)} modules, r={adapter.r}, {args.dtype}; any PEFT LoRA runtime loads it"
    )


def print_reports(adapter: Adapter, reports: Sequence[ModuleReport], *, verbose: bool) -> None:
    """One row per module type, or per module, and what the whole adapter comes to."""
    groups = {r.path: [r] for r in reports} if verbose else group_by_type(reports, lambda r: r.path)
    rows = [_row(name, group) for name, group in groups.items()]
    columns = ["module" if verbose else "modules", "count", "rho A", "rho B", "predicted", "actual", "bytes"]
    console().print(table("Relative error of the update (means)", columns, rows, _row("all", reports)))
    print(
        "rho: distance of the LoRA's own factors from signs x scales; predicted: the error if they were just rounded; "
        "actual: after ADMM, as stored"
    )
    print(
        f"{adapter.nbytes:,} bytes of signs and {adapter.scale_code.value} scales = {adapter.bits_per_weight:.4f} bits "
        f"per adapter weight, {adapter.fp16_lora_bytes / adapter.nbytes:.2f}x smaller than fp16 LoRA of the same rank"
    )


def _row(name: str, group: Sequence[ModuleReport]) -> list[str]:
    means = (fmean(getattr(r, key) for r in group) for key in ("rho_a", "rho_b", "predicted_error", "error"))
    return [name, str(len(group)), *(f"{mean:.4f}" for mean in means), f"{sum(r.nbytes for r in group):,}"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lordba.convert",
        description="Convert a PEFT LoRA of linear layers into a LoRDBA adapter: both factors become signs with three "
        "scale vectors, over ten times smaller. Or turn a LoRDBA adapter back into a plain LoRA with --to lora.",
        epilog="example: python -m lordba.convert my-lora my-adapter --base my-model",
    )
    parser.add_argument("source", type=Path, metavar="PEFT_DIR", help="adapter folder (with --to lora: a LoRDBA one)")
    parser.add_argument(
        "out", type=Path, metavar="OUT", help="folder to write; an adapter of the same kind is replaced"
    )
    parser.add_argument("--to", choices=("lordba", "lora"), default="lordba", help="what to write (default: lordba)")
    parser.add_argument("--verbose", action="store_true", help="report every module, not only every type of module")
    forth = parser.add_argument_group("to lordba")
    forth.add_argument("--rank", type=_positive, help="rank of the result; higher is closer (default: the LoRA's own)")
    forth.add_argument(
        "--scales", choices=[code.value for code in ScaleCode], help="how scales are stored (default: log4, smallest)"
    )
    forth.add_argument("--base", metavar="MODEL", help="check against this base model and record its fingerprint")
    back = parser.add_argument_group("to lora")
    back.add_argument("--dtype", choices=_DTYPES, help="of the LoRA's tensors (default: float32, which is exact)")
    return parser


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, found {value}")
    return value


def main() -> None:
    parser = _parser()
    args = parser.parse_args()
    misplaced = ("rank", "scales", "base") if args.to == "lora" else ("dtype",)
    for name in misplaced:
        if getattr(args, name) is not None:
            parser.error(f"--{name} has no meaning with --to {args.to}")
    args.scales, args.dtype = args.scales or "log4", args.dtype or "float32"
    (to_peft if args.to == "lora" else to_lordba)(args)


if __name__ == "__main__":
    run_command(main)
