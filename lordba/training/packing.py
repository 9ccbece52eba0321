"""`lordba.pack`: a trained PEFT model's latents to the adapter folder that every other part reads."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from lordba.adapter import PREFIX, Adapter, SignModule, save_adapter
from lordba.convert import convert_lora
from lordba.errors import LordbaError
from lordba.lora import to_lora
from lordba.models import fingerprint_of
from lordba.scales import ScaleCode
from lordba.training.latents import to_module, to_stored
from lordba.training.tuner import lordba_config, lordba_layers


def pack(
    model: nn.Module,
    folder: str | Path,
    scales: ScaleCode | str = ScaleCode.LOG4,
    adapter_name: str = "default",
    base_fingerprint: str | None = None,
    refit: bool = True,
) -> Adapter:
    """Write an adapter of a PEFT model as signs and scales (docs/format.md), and return it.

    fp32 scales repeat the trained layers bit for bit (in eval mode, or trained in float32); the other codes fit scales
    and signs once more to what they can hold. Without `refit`, the result is the direct form that a device packs, byte
    for byte: the latents' own signs and their implied scales (lordba.training.latents.to_stored).
    The base's fingerprint is taken from the model if that is in float32
    throughout; otherwise give it (lordba.models.fingerprint of the base before it was cast or quantized) or none is
    recorded.
    """
    config = lordba_config(model, adapter_name)
    if config.modules_to_save:
        raise LordbaError(
            f"pack: adapter {adapter_name!r} also trains {sorted(config.modules_to_save)} in full, which signs cannot "
            "hold; save_pretrained keeps both"
        )
    adapter = replace(
        adapter_of(model, adapter_name, scales, refit),
        base_model_name_or_path=config.base_model_name_or_path,
        base_fingerprint=base_fingerprint or config.base_fingerprint or _float32_fingerprint(model),
        peft_config={"task_type": config.task_type} if config.task_type else {},
    )
    save_adapter(adapter, Path(folder))
    return adapter


def adapter_of(
    model: nn.Module,
    adapter_name: str = "default",
    scales: ScaleCode | str = ScaleCode.FP32,
    refit: bool = True,
) -> Adapter:
    """The signs and scales of a PEFT model's adapter, which names no base."""
    lordba_config(model, adapter_name)
    code = ScaleCode(scales)
    if not refit:
        layers = {path: layer for path, layer in lordba_layers(model).items() if adapter_name in layer.lordba_A}
        if odd := next((path for path, layer in layers.items() if layer.scaling[adapter_name] != 1), None):
            raise LordbaError(
                f"pack: module {odd} scales its latents by {layers[odd].scaling[adapter_name]:g}; the direct form "
                "knows a scaling of 1 alone: train with lora_alpha = r, or leave refit=False out"
            )
        direct = {path: to_stored(*layer.latents(adapter_name), code) for path, layer in sorted(layers.items())}
        return Adapter(direct, code)
    modules: dict[str, SignModule] = {}
    for path, layer in lordba_layers(model).items():
        if adapter_name in layer.lordba_packed:
            modules[path] = layer.packed(adapter_name).module
        elif adapter_name in layer.lordba_A:
            modules[path] = to_module(*layer.latents(adapter_name), layer.scaling[adapter_name])
    stored = next(iter(modules.values())).s_in.code
    adapter = Adapter(dict(sorted(modules.items())), stored)
    return adapter if stored is code else convert_lora(to_lora(adapter), scale_code=code)[0]


def _float32_fingerprint(model: nn.Module) -> str | None:
    """The fingerprint of the base inside a PEFT model, if it is one that a cast or quantization cannot have changed."""
    weights = {
        name.removeprefix(PREFIX).replace(".base_layer.", "."): weight
        for name, weight in model.named_parameters()
        if ".lordba_" not in name
    }
    if any(weight.dtype != torch.float32 or type(weight.data) is not torch.Tensor for weight in weights.values()):
        return None
    return fingerprint_of(weights.items())
