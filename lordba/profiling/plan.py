"""What a profile measures: the programs side by side, and how long and how often each runs."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lordba.errors import LordbaError
from lordba.runtime.bundle import COMPARISON_MODES, Bundle, BundleAdapter

CONTEXT = 128
"""Tokens in the cache when decoding is measured, where they fit."""


@dataclass(frozen=True)
class Variant:
    """One way to run the base: a bundle with one of its adapters, or without.

    `adapter` is the record's: "none" (no adapter nodes at all, where a bundle of that kind is given), "dense_lora" or
    "lordba"; a LoRDBA program with no adapter swapped in is "lordba" without a name.
    """

    folder: str
    target: str
    model: str
    base_quant: str
    adapter: str
    adapter_name: str | None = None
    rank: int | None = None
    bits: float | None = None
    scale_code: str | None = None

    @property
    def use(self) -> str | None:
        """What the bundle is asked to use; a dense LoRA is always on."""
        return self.adapter_name if self.adapter == "lordba" else None

    @property
    def about(self) -> dict[str, Any]:
        """Its fields as the record has them."""
        return {name: value for name, value in asdict(self).items() if name != "folder"}

    @property
    def title(self) -> str:
        return title_of(self.about)


def title_of(row: Any) -> str:
    """What to call a variant, from a row of the record or `Variant.about`."""
    if row["adapter"] == "none":
        return "base only"
    if row["adapter"] == "dense_lora":
        return f"dense LoRA {row['scale_code'] or 'fp16'}"
    return "LoRDBA" if row["adapter_name"] else "LoRDBA program, no adapter"


@dataclass(frozen=True)
class Plan:
    """What one worker process measures with one number of threads.

    Each round runs every variant once: a prefill of each length, and `decode` tokens after `context` of them.
    """

    variants: Sequence[Variant]
    lengths: Sequence[int]
    decode: int
    context: int
    threads: int
    rounds: int
    loads: int
    swaps: int
    first: int = 0
    """The variant that is loaded first, the others follow in turn: it gets the largest pieces of memory."""
    clock: str = "wall"
    """"cpu": the processor time of the process, which other work on the machine touches less; for one thread."""

    def json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def read(text: str) -> "Plan":
        record = json.loads(text)
        return Plan(**record | {"variants": [Variant(**variant) for variant in record["variants"]]})


def variants_of(bundle: Bundle, adapter: str | None, against: Sequence[Bundle]) -> list[Variant]:
    """The variants to compare: the base first, then dense LoRAs, then the bundle without and with its adapter.

    Raises LordbaError where the bundles are not of one base, one target and one quantization.
    """
    if _mode(bundle) in COMPARISON_MODES:
        raise LordbaError(f"{bundle.folder}: is a bundle to compare with; name it with --against, beside a LoRDBA one")
    for other in against:
        _check_comparable(bundle, other)
    result = [_variant(other) for other in sorted(against, key=lambda b: COMPARISON_MODES.index(_mode(b)))]
    if any(variant.adapter == "none" for variant in result):
        result.append(_variant(bundle, "lordba"))
    else:
        result.insert(0, _variant(bundle, "none"))
    if adapter:
        result.append(_variant(bundle, "lordba", bundle.adapter(adapter)))
    return result


def fitting_lengths(lengths: Sequence[int], bundles: Sequence[Bundle], decode: int) -> tuple[list[int], list[str]]:
    """The lengths that every program takes in one run, and what to say of the others."""
    longest = min(b.manifest.max_seq_len - (b.manifest.target == "executorch") for b in bundles)
    if decode + 2 > longest:
        raise LordbaError(f"--decode {decode}: the program takes {longest} tokens; decode fewer or export a longer one")
    kept = [length for length in lengths if length <= longest]
    dropped = [
        f"prompt length {length} is left out: the program takes {longest} tokens at once (export with --max-seq-len)"
        for length in lengths
        if length > longest
    ]
    if not kept:
        raise LordbaError(f"--prompt-lengths: the program takes at most {longest} tokens at once; give a shorter one")
    return kept, dropped


def context_of(bundles: Sequence[Bundle], decode: int) -> int:
    """How many tokens are in the cache when decoding is measured."""
    return min(CONTEXT, min(b.manifest.max_seq_len for b in bundles) - decode - 1)


def _variant(bundle: Bundle, adapter: str | None = None, entry: BundleAdapter | None = None) -> Variant:
    """A LoRDBA bundle as `adapter` says, with one of its adapters; or a bundle to compare with as what it is."""
    if adapter is None:
        adapter = "none" if _mode(bundle) == "none" else "dense_lora"
        entry = bundle.manifest.adapters[0] if bundle.manifest.adapters else None
    return Variant(
        folder=str(bundle.folder),
        target=bundle.manifest.target,
        model=bundle.manifest.base["name"],
        base_quant=bundle.manifest.base_quant,
        adapter=adapter,
        adapter_name=entry.name if entry else None,
        rank=entry.r if entry else None,
        bits=16 * entry.bytes / entry.fp16_lora_bytes if entry else None,
        scale_code=entry.scale_code if entry else None,
    )


def _mode(bundle: Bundle) -> str:
    return bundle.manifest.adapter_mode


def _check_comparable(bundle: Bundle, other: Bundle) -> None:
    if _mode(other) not in COMPARISON_MODES:
        raise LordbaError(
            f"--against {other.folder}: is a bundle with LoRDBA adapters; make one to compare with by "
            "python -m lordba.export --adapter-form none (or lora-fp32, lora-fp16)"
        )
    for what in ("target", "base_quant"):
        ours, theirs = getattr(bundle.manifest, what), getattr(other.manifest, what)
        if ours != theirs:
            raise LordbaError(
                f"--against {other.folder}: its {what} is {theirs}, in {bundle.folder} it is {ours}; export both alike"
            )
    if bundle.manifest.base["fingerprint"] != other.manifest.base["fingerprint"]:
        raise LordbaError(f"--against {other.folder}: was made of another base than {bundle.folder}; export it again")
