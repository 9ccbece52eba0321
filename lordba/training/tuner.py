"""LoRDBA as a PEFT method: `get_peft_model(model, LordbaConfig(r=16, target_modules="all-linear"))`.

Importing this module (or naming `lordba.LordbaConfig`) registers peft_type LORDBA, so that PEFT reads our folders: a
checkpoint of latents, `<p>.lordba_A.weight` [r, d_in] and `<p>.lordba_B.weight` [d_out, r], or a packed adapter. PEFT
without lordba knows neither the type nor the tensors, and refuses.
"""

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lordba.adapter import FORMAT_VERSION, PREFIX, Adapter, SignModule, take_module
from lordba.errors import LordbaError
from lordba.layers import SignTerm, linear_size
from lordba.lora import LoraAdapter
from lordba.scales import ScaleCode
from lordba.training.latents import to_latents
from lordba.training.ste import add_signed, frozen_linear, is_quantized

try:
    from peft import PeftConfig, PeftType
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, register_peft_method
except ImportError as error:
    raise LordbaError(
        f"training needs PEFT, which cannot be imported ({error}): pip install 'lordba[train]'"
    ) from error

NAME = "lordba"


@dataclass
class LordbaConfig(PeftConfig):
    """LoraConfig's own names and defaults, as far as they have a meaning here.

    r is the rank, lora_alpha / r scales the update. rank_pattern and alpha_pattern set both for modules whose path ends
    in a pattern; modules_to_save trains further modules in full, which only a checkpoint of latents can hold.
    """

    r: int = 8
    target_modules: Collection[str] | None = None
    exclude_modules: Collection[str] | None = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    bias: str = "none"
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    fan_in_fan_out: bool = False
    """Without effect: GPT-2's Conv1D is recognised by itself."""
    format_version: int | None = None
    """Set in packed adapters, with the two below (docs/format.md)."""
    scale_code: str | None = None
    base_fingerprint: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType(NAME.upper())
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        if self.r < 1 or any(r < 1 for r in self.rank_pattern.values()):
            raise LordbaError(f"LordbaConfig: r must be at least 1, found {self.r}, {self.rank_pattern}")
        if self.bias != "none":
            raise LordbaError(f"LordbaConfig: bias must be 'none', found {self.bias!r}: the base stays as it is")
        if self.is_packed and (self.format_version != FORMAT_VERSION or self.scale_code not in set(ScaleCode)):
            raise LordbaError(
                f"a packed adapter of format_version {self.format_version}, scale_code {self.scale_code!r} is not "
                f"known here (this lordba reads {FORMAT_VERSION}); install a newer lordba"
            )
        if not 0 <= self.lora_dropout < 1:
            raise LordbaError(f"LordbaConfig: lora_dropout must be in [0, 1), found {self.lora_dropout}")

    @property
    def is_packed(self) -> bool:
        """True if this configuration was read from a packed adapter."""
        return self.format_version is not None

    def rank_and_scaling(self, path: str) -> tuple[int, float]:
        """r and alpha / r (rank-stabilised: alpha / sqrt(r)) of the module at this path."""
        r, alpha = (
            next((v for k, v in table.items() if re.match(rf"(.*\.)?({k})$", path)), default)
            for table, default in ((self.rank_pattern, self.r), (self.alpha_pattern, self.lora_alpha))
        )
        return int(r), alpha / (math.sqrt(r) if self.use_rslora else r)


class LordbaLayer(nn.Module, BaseTunerLayer):
    """A frozen linear layer with sign adapters beside it: latents in training, packed signs where frozen."""

    adapter_layer_names = ("lordba_A", "lordba_B")
    other_param_names = ("scaling", "lordba_dropout", "lordba_packed")

    def __init__(self, base_layer: nn.Module, adapter_name: str, where: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.where = where
        size = linear_size(self.get_base_layer())
        if size is None:
            raise LordbaError(
                f"module {where}: is a {type(self.get_base_layer()).__name__}, but only linear layers can be adapted; "
                "leave it out of target_modules"
            )
        self.in_features, self.out_features = size
        self.lordba_A, self.lordba_B = nn.ModuleDict(), nn.ModuleDict()
        self.scaling: dict[str, float] = {}
        self.lordba_dropout, self.lordba_packed = nn.ModuleDict(), nn.ModuleDict()
        self._active_adapter = adapter_name
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    def add_latents(self, name: str, r: int, scaling: float, dropout: float) -> None:
        """New latents, initialised as LoRA does: A [r, d_in] uniform, B [d_out, r] zero."""
        self.scaling[name] = scaling
        self.lordba_dropout[name] = nn.Dropout(dropout) if dropout else nn.Identity()
        self.lordba_A[name] = nn.Linear(self.in_features, r, bias=False)
        self.lordba_B[name] = nn.Linear(r, self.out_features, bias=False)
        a, b = self.latents(name)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        nn.init.zeros_(b)
        self._move_adapter_to_device_of_base_layer(name)

    def add_packed(self, name: str, module: SignModule) -> None:
        """The frozen form of an adapter, as its folder holds it."""
        self.scaling[name] = 1.0
        self.lordba_packed[name] = SignTerm(module).to(self.weight.device)

    def packed(self, name: str) -> SignTerm:
        """The frozen form of an adapter."""
        term = self.lordba_packed[name]
        assert isinstance(term, SignTerm)
        return term

    def latents(self, name: str) -> tuple[Tensor, Tensor]:
        """A [r, d_in] and B [d_out, r] of an adapter."""
        return self.lordba_A[name].get_parameter("weight"), self.lordba_B[name].get_parameter("weight")

    def set_latents(self, name: str, a: Tensor, b: Tensor) -> None:
        """Give an adapter other latents, of whatever rank, with a scaling of 1."""
        old = self.latents(name)[0]
        for layers, value in ((self.lordba_A, a), (self.lordba_B, b)):
            layer = nn.Linear(value.shape[1], value.shape[0], bias=False, device="meta")
            value = value.to(self.weight.device, old.dtype).contiguous()
            layer.weight = nn.Parameter(value, requires_grad=old.requires_grad)
            layers[name] = layer
        self.scaling[name] = 1.0

    def drop(self, name: str) -> None:
        """Take an adapter off this layer alone."""
        for attribute in (*self.adapter_layer_names, *self.other_param_names):
            if name in getattr(self, attribute):
                del getattr(self, attribute)[name]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., d_in] -> [..., d_out]; in eval mode exactly what the packed adapter computes (with fp32 scales)."""
        base = self.base_layer
        y = frozen_linear(x, base) if is_quantized(base) else base(x, *args, **kwargs)
        if self.disable_adapters:
            return y
        for name in self.active_adapters:
            if name in self.lordba_packed:
                y = y + self.packed(name)(x).to(y.dtype)
            elif name in self.lordba_A:
                a, b = self.latents(name)
                x_seen = self.lordba_dropout[name](x)
                y = add_signed(y, x_seen, a, b, self.scaling[name], exact=not self.training)
            elif name in self.scaling:
                raise LordbaError(f"module {self.where}: the packed adapter {name!r} was never loaded; use PeftModel")
        return y

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused: a LoRDBA adapter stays beside its base."""
        raise LordbaError(
            "a LoRDBA adapter is never merged into its base; pack it, then python -m lordba.convert --to lora writes "
            "a plain LoRA that computes the same and can be merged"
        )


class LordbaModel(BaseTuner):
    """Puts LordbaLayers into a model and reads their tensors; what PEFT calls a tuner."""

    prefix = f"{NAME}_"
    tuner_layer_cls = LordbaLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING  # type: ignore[assignment]

    def _create_and_replace(
        self, peft_config, adapter_name, target, target_name, parent, current_key, parameter_name=None
    ) -> None:
        layer = target if isinstance(target, LordbaLayer) else LordbaLayer(target, adapter_name, current_key)
        r, scaling = peft_config.rank_and_scaling(current_key)
        if peft_config.is_packed and peft_config.inference_mode:
            layer.scaling[adapter_name] = 1.0  # its tensors come with the folder
        else:
            layer.add_latents(adapter_name, r, scaling, peft_config.lora_dropout)
        if layer is target:
            layer.set_adapter(layer.active_adapters, inference_mode=peft_config.inference_mode)
            return
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # a further adapter does not become trainable by itself
        self._replace_module(parent, target_name, layer, target)

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        if any(adapter_name in layer.lordba_packed for layer in lordba_layers(model).values()):
            raise LordbaError(
                f"adapter {adapter_name!r} is packed and cannot change: lordba.pack(model, DIR) writes it again"
            )
        return super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        """Checkpoint names to the model's; a packed adapter goes into its layers, as signs or as latents."""
        layers = lordba_layers(model)
        tensors = {name if name.startswith(PREFIX) else PREFIX + name: value for name, value in state_dict.items()}
        if config.is_packed and not any(name.endswith(".lordba_A.weight") for name in tensors):
            _load_packed(layers, config, adapter_name, tensors)
            own = re.compile(rf"\.lordba_(A|B|packed)\.{re.escape(adapter_name)}\.")
            return {name: value for name, value in model.state_dict().items() if own.search(name)}
        wanted = {
            f"{PREFIX}{path}.lordba_{factor}.weight"
            for path, layer in layers.items()
            if adapter_name in layer.lordba_A
            for factor in "AB"
        }
        if odd := wanted ^ {name for name in tensors if ".lordba_" in name or ".lora_" in name}:
            name = min(odd)
            state = "is missing from" if name in wanted else "has no place in"
            raise LordbaError(
                f"adapter {adapter_name!r}: {name} {state} this model's latents; load it onto its own base"
            )
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


def lordba_layers(model: nn.Module) -> dict[str, LordbaLayer]:
    """The adapted layers by their path in the base model."""
    return {path.removeprefix(PREFIX): layer for path, layer in model.named_modules() if isinstance(layer, LordbaLayer)}


def lordba_config(model: nn.Module, adapter_name: str) -> LordbaConfig:
    """The configuration of a PEFT model's adapter."""
    config = getattr(model, "peft_config", {}).get(adapter_name)
    if not isinstance(config, LordbaConfig):
        raise LordbaError(f"the model has no LoRDBA adapter named {adapter_name!r}; name one of its own")
    return config


def start_from(
    model: nn.Module, adapter: Adapter, adapter_name: str = "default", lora: LoraAdapter | None = None
) -> None:
    """Let a PEFT model's latents begin at an adapter, such as convert_lora makes of a LoRA; ranks may differ.

    lora: the LoRA that it was made of, which tells the signs that matter from those that training may flip early.
    """
    layers = {path: layer for path, layer in lordba_layers(model).items() if adapter_name in layer.lordba_A}
    if odd := layers.keys() ^ adapter.modules.keys():
        raise LordbaError(
            f"start_from: only one of model and adapter adapts {min(odd)}; give both the same target_modules"
        )
    for path, layer in layers.items():
        module = adapter.modules[path]
        if (module.d_in, module.d_out) != (layer.in_features, layer.out_features):
            raise LordbaError(f"start_from: module {path} has another size in the adapter, made for another model")
        source = lora.modules.get(path) if lora else None
        if lora and (source is None or (source.d_in, source.d_out) != (module.d_in, module.d_out)):
            raise LordbaError(
                f"start_from: module {path} is missing from the LoRA or has another size there; give the LoRA that the "
                "adapter was made of, or none"
            )
        layer.set_latents(adapter_name, *to_latents(module, source))
    _describe(lordba_config(model, adapter_name), layers, adapter_name)


def use_packed(model: nn.Module, adapter: Adapter) -> None:
    """Let a PEFT model compute a packed adapter of the same modules in place of its latents."""
    for path, layer in lordba_layers(model).items():
        layer.add_packed("packed", adapter.modules[path])
        layer.set_adapter("packed")


def _load_packed(layers: dict[str, LordbaLayer], config: LordbaConfig, name: str, tensors: dict[str, Tensor]) -> None:
    """Give every layer its part of a packed adapter, frozen or as latents; target_modules may name more layers."""
    where = Path(f"adapter {name!r}")
    left = {key: value.cpu() for key, value in tensors.items()}
    for path, layer in layers.items():
        if name not in layer.scaling:
            continue
        key = PREFIX + path
        signs = left.get(f"{key}.lordba_A.signs")
        if signs is None:
            layer.drop(name)
            continue
        shape = {"d_in": layer.in_features, "d_out": layer.out_features, "r": signs.shape[0]}
        module = take_module(key, shape, ScaleCode(config.scale_code or ""), left, where)
        if name in layer.lordba_A:
            layer.set_latents(name, *to_latents(module))
        else:
            layer.add_packed(name, module)
    if left:
        raise LordbaError(f"{where}: {min(left)} belongs to no layer of this model; load it onto its own base")
    if not config.inference_mode:
        _describe(config, {path: layer for path, layer in layers.items() if name in layer.lordba_A}, name)


def _describe(config: LordbaConfig, layers: dict[str, LordbaLayer], name: str) -> None:
    """Make the configuration say what the latents became: their ranks, alpha = r, and no packed form."""
    ranks = {path: layer.latents(name)[0].shape[0] for path, layer in layers.items()}
    config.r = max(ranks.values())
    config.rank_pattern = {path: r for path, r in ranks.items() if r != config.r}
    config.lora_alpha, config.alpha_pattern = config.r, dict(config.rank_pattern)
    config.use_rslora = False
    config.target_modules = set(ranks)
    config.format_version = config.scale_code = None


def _register() -> None:
    """Make LORDBA known to PEFT, whose enumeration of methods is closed and whose registry takes its members alone."""
    member = str.__new__(PeftType, NAME.upper())
    member._name_ = member._value_ = NAME.upper()
    PeftType._member_map_[member.name] = PeftType._value2member_map_[member.value] = member
    PeftType._member_names_.append(member.name)
    type.__setattr__(PeftType, member.name, member)
    register_peft_method(name=NAME, config_cls=LordbaConfig, model_cls=LordbaModel)


_register()
