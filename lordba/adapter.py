"""The adapter in memory and on disk: a folder of PEFT's shape whose file alone defines the update.

`adapter_config.json` plus `adapter_model.safetensors` (docs/format.md). Per module with path <p> in the base:
y += s_out * (B (s_mid * (A (s_in * x)))), A in {-1,+1}^(r x d_in), B in {-1,+1}^(d_out x r) (LoRDBA, arXiv 2605.24058).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lordba.adapter_folder import (
    CONFIG_NAME,
    FORMAT_VERSION,
    PREFIX,
    WEIGHTS_NAME,
    StoredModule,
    write_adapter_folder,
)
from lordba.errors import LordbaError
from lordba.scales import EncodedScales, ScaleCode, check_encoded, decode_scales, encode_scales
from lordba.signs import has_clean_padding, packed_width, unpack_signs


@dataclass(frozen=True)
class SignModule:
    """The adapter of one linear layer.

    a_signs uint8 [r, ceil(d_in/8)], b_signs uint8 [d_out, ceil(r/8)]; s_in [d_in], s_mid [r], s_out [d_out] encoded.
    """

    a_signs: Tensor
    b_signs: Tensor
    s_in: EncodedScales
    s_mid: EncodedScales
    s_out: EncodedScales

    @property
    def r(self) -> int:
        return self.s_mid.n

    @property
    def d_in(self) -> int:
        return self.s_in.n

    @property
    def d_out(self) -> int:
        return self.s_out.n

    @property
    def nbytes(self) -> int:
        """Stored bytes: signs, scales and their ranges."""
        return self.a_signs.nbytes + self.b_signs.nbytes + sum(s.nbytes for s in self.scales)

    @property
    def scales(self) -> tuple[EncodedScales, EncodedScales, EncodedScales]:
        return self.s_in, self.s_mid, self.s_out

    def factors(self) -> tuple[Tensor, Tensor]:
        """The float factors B [d_out, r] and A [r, d_in] whose product is the update, float64."""
        s_in, s_mid, s_out = (decode_scales(s).double() for s in self.scales)
        a = unpack_signs(self.a_signs, self.d_in, torch.float64) * s_mid[:, None] * s_in
        b = unpack_signs(self.b_signs, self.r, torch.float64) * s_out[:, None]
        return b, a


def zero_module(d_in: int, d_out: int, r: int, code: ScaleCode) -> SignModule:
    """A module of this size that adds nothing: signs of +1, scales of zero."""
    a, b = (torch.zeros(*shape, dtype=torch.uint8) for shape in ((r, packed_width(d_in)), (d_out, packed_width(r))))
    return SignModule(a, b, *(encode_scales(torch.zeros(n), code) for n in (d_in, r, d_out)))


@dataclass(frozen=True)
class Adapter:
    """Sign modules by their path in the base model, and what the adapter says of itself."""

    modules: Mapping[str, SignModule]
    scale_code: ScaleCode
    base_model_name_or_path: str | None = None
    base_fingerprint: str | None = None
    peft_config: Mapping[str, object] = field(default_factory=dict)
    """Further keys of PEFT's configuration (task_type, ...), carried through unchanged."""

    @property
    def r(self) -> int:
        """The largest rank of any module."""
        return max(module.r for module in self.modules.values())

    @property
    def nbytes(self) -> int:
        """Bytes of signs and scales as stored."""
        return sum(module.nbytes for module in self.modules.values())

    @property
    def fp16_lora_bytes(self) -> int:
        """Bytes of an fp16 LoRA with the same ranks and modules."""
        return sum(2 * m.r * (m.d_in + m.d_out) for m in self.modules.values())

    @property
    def bits_per_weight(self) -> float:
        """Exact stored bits per element of A and B: signs, scales and ranges over r (d_in + d_out)."""
        return 8 * self.nbytes / (self.fp16_lora_bytes / 2)


def save_adapter(adapter: Adapter, folder: Path) -> None:
    """Write an adapter folder; an existing adapter there is replaced only once the new one is complete."""
    modules = {
        path: StoredModule(
            r=module.r,
            d_in=module.d_in,
            d_out=module.d_out,
            a_signs=module.a_signs.contiguous(),
            b_signs=module.b_signs.contiguous(),
            scales=(module.s_in.values, module.s_mid.values, module.s_out.values),
            ranges=(module.s_in.range, module.s_mid.range, module.s_out.range),
        )
        for path, module in adapter.modules.items()
    }
    code = adapter.scale_code.value
    base = adapter.base_model_name_or_path
    write_adapter_folder(folder, modules, code, base, adapter.base_fingerprint, adapter.peft_config)


def load_adapter(folder: Path) -> Adapter:
    """Read and check an adapter folder; every deviation from the format is a LordbaError that names it."""
    config = _read_config(folder / CONFIG_NAME)
    code = ScaleCode(config["scale_code"])
    weights = folder / WEIGHTS_NAME
    if not weights.is_file():
        raise LordbaError(f"{weights}: not found; an adapter folder holds {CONFIG_NAME} and {WEIGHTS_NAME}")
    try:
        with safe_open(weights, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise LordbaError(f"{weights}: cannot be read ({error}); it is truncated or damaged, copy it anew") from error
    shapes = _read_shapes(metadata, weights)
    modules = {
        key.removeprefix(PREFIX): take_module(key, shape, code, tensors, weights) for key, shape in shapes.items()
    }
    if tensors:
        raise LordbaError(f"{weights}: unexpected tensor {min(tensors)!r} that its shapes metadata does not list")
    known = {"peft_type", "format_version", "scale_code", "r", "target_modules", "base_model_name_or_path"}
    return Adapter(
        modules=modules,
        scale_code=code,
        base_model_name_or_path=config.get("base_model_name_or_path"),
        base_fingerprint=config.get("base_fingerprint"),
        peft_config={k: v for k, v in config.items() if k not in known | {"base_fingerprint"}},
    )


def _read_config(path: Path) -> dict:
    if not path.is_file():
        raise LordbaError(f"{path}: not found; an adapter folder holds {CONFIG_NAME} and {WEIGHTS_NAME}")
    try:
        config = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise LordbaError(f"{path}: is not readable JSON ({error}); copy the adapter anew") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORDBA":
        found = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        hint = "; convert it first: python -m lordba.convert PEFT_DIR OUT" if found == "LORA" else ""
        raise LordbaError(f"{path}: expected peft_type LORDBA, found {found!r}{hint}")
    if config.get("format_version") is None and "lora_alpha" in config:
        raise LordbaError(
            f"{path}: belongs to latents that are in training; lordba.pack(model, DIR) writes them as signs and scales"
        )
    if config.get("format_version") != FORMAT_VERSION:
        raise LordbaError(
            f"{path}: format_version {config.get('format_version')!r} is not known here (this lordba reads "
            f"{FORMAT_VERSION}); install a newer lordba or convert the adapter again"
        )
    if config.get("scale_code") not in {code.value for code in ScaleCode}:
        raise LordbaError(
            f"{path}: scale_code must be one of {[c.value for c in ScaleCode]}, found {config.get('scale_code')!r}"
        )
    return config


def _read_shapes(metadata: Mapping[str, str], path: Path) -> dict[str, dict[str, int]]:
    if metadata.get("format") != "lordba" or metadata.get("format_version") != str(FORMAT_VERSION):
        raise LordbaError(
            f"{path}: safetensors metadata must say format=lordba, format_version={FORMAT_VERSION}; "
            f"found {dict(metadata)!r:.120}"
        )
    try:
        shapes = json.loads(metadata["shapes"])
        for key, shape in shapes.items():
            if not key.startswith(PREFIX) or not all(
                type(shape[n]) is int and shape[n] > 0 for n in ("d_in", "d_out", "r")
            ):
                raise ValueError(f"entry {key!r}: {shape!r}")
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise LordbaError(f"{path}: the shapes metadata is not usable ({error}); write the adapter anew") from error
    if not shapes:
        raise LordbaError(f"{path}: holds no modules; there is nothing to adapt")
    return shapes


def take_module(
    key: str, shape: Mapping[str, int], code: ScaleCode, tensors: dict[str, Tensor], path: Path
) -> SignModule:
    """Remove one module's tensors from `tensors`, checked against its shape."""
    d_in, d_out, r = shape["d_in"], shape["d_out"], shape["r"]

    def take(name: str) -> Tensor:
        if f"{key}.{name}" not in tensors:
            raise LordbaError(f"{path}: tensor {key}.{name} is missing; the file is incomplete, copy it anew")
        return tensors.pop(f"{key}.{name}")

    def signs(name: str, rows: int, columns: int) -> Tensor:
        packed = take(name)
        expected = (rows, packed_width(columns))
        if packed.dtype != torch.uint8 or tuple(packed.shape) != expected:
            raise LordbaError(
                f"{path}: {key}.{name} must be uint8 {list(expected)}, found {packed.dtype} {list(packed.shape)}"
            )
        if not has_clean_padding(packed, columns):
            raise LordbaError(f"{path}: {key}.{name} has padding bits that are not zero; the file is damaged")
        return packed

    def scales(name: str, n: int) -> EncodedScales:
        where = f"{path}: {key}.lordba_scale_{name}"
        values = take(f"lordba_scale_{name}")
        scale_range = take(f"lordba_scale_{name}.range") if code.is_coded else None
        encoded = EncodedScales(code, n, values, scale_range)
        check_encoded(encoded, where)
        return encoded

    return SignModule(
        a_signs=signs("lordba_A.signs", r, d_in),
        b_signs=signs("lordba_B.signs", d_out, r),
        s_in=scales("in", d_in),
        s_mid=scales("mid", r),
        s_out=scales("out", d_out),
    )
