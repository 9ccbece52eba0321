"""Plain PEFT LoRA folders of linear layers: read with every setting that changes the maths, and written back."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lordba.adapter import CONFIG_NAME, PREFIX, WEIGHTS_NAME, Adapter
from lordba.errors import LordbaError
from lordba.files import new_folder, write_safetensors

# Settings that make an adapter something else than y += alpha/r B A x beside an untouched base; refused where set.
_REFUSED_SETTINGS = {
    "use_dora": "DoRA also rescales the base weights",
    "lora_bias": "it adds a bias to lora_B",
    "modules_to_save": "it replaces whole modules of the base",
    "trainable_token_indices": "it replaces rows of the embedding",
    "target_parameters": "it adapts bare parameters instead of linear layers",
    "layer_replication": "it changes the base's layers",
    "alora_invocation_tokens": "activated LoRA depends on the tokens",
    "use_qalora": "QA-LoRA pools the input",
    "use_bdlora": "BD-LoRA has block-diagonal factors",
    "arrow_config": "Arrow routes between several adapters",
    "kasa_config": "KaSA truncates the base weights",
    "monteclora_config": "MonteCLoRA adds sampled factors",
    "velora_config": "VeLoRA keeps tensors of its own",
}
# Settings without influence on a trained adapter's function, or that are read below.
_KNOWN_SETTINGS = {
    "peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "lora_dropout", "bias", "fan_in_fan_out",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights", "loftq_config",
    "eva_config", "corda_config", "lora_ga_config", "megatron_config", "megatron_core", "runtime_config",
    "qalora_group_size", "ensure_weight_tying",
}  # fmt: skip
# The other initialisations (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) subtract the initial factors from the base weights.
_HARMLESS_INIT = {"true", "false", "none", "gaussian", "eva", "orthogonal", "mica"}
_REFUSED_TENSORS = {
    "lora_magnitude_vector": "belongs to DoRA",
    "lora_embedding_": "adapts an embedding",
    ".lora_B.bias": "is a bias of lora_B (lora_bias)",
    ".lora_A.bias": "is a bias of lora_A (lora_bias)",
    ".lora_diag": "belongs to KaSA",
}
_CARRIED = ("task_type", "auto_mapping", "revision", "inference_mode", "fan_in_fan_out")
_FACTOR = re.compile(rf"{re.escape(PREFIX)}(?P<path>.+)\.lora_(?P<factor>[AB])\.weight")


@dataclass(frozen=True)
class LoraModule:
    """The LoRA of one linear layer, y += scaling * B (A x): a [r, d_in] and b [d_out, r] in their stored dtype."""

    a: Tensor
    b: Tensor
    scaling: float

    @property
    def r(self) -> int:
        return self.a.shape[0]

    @property
    def d_in(self) -> int:
        return self.a.shape[1]

    @property
    def d_out(self) -> int:
        return self.b.shape[0]

    @property
    def nbytes(self) -> int:
        """Stored bytes of both factors."""
        return self.a.nbytes + self.b.nbytes

    def factors(self) -> tuple[Tensor, Tensor]:
        """B [d_out, r] with the scaling in it, and A [r, d_in], float64."""
        return self.b.double() * self.scaling, self.a.double()


@dataclass(frozen=True)
class LoraAdapter:
    """LoRA modules by their path in the base model. `peft_config`: further keys, carried through unchanged."""

    modules: Mapping[str, LoraModule]
    base_model_name_or_path: str | None = None
    peft_config: Mapping[str, object] = field(default_factory=dict)


def find_adapter(folder: Path) -> Path:
    """The folder itself if it holds an adapter, else its one subfolder that does (PEFT's <folder>/<adapter name>)."""
    if (folder / CONFIG_NAME).is_file():
        return folder
    if not folder.is_dir():
        raise LordbaError(f"{folder}: no such folder; give the folder that holds {CONFIG_NAME}")
    found = sorted(path.parent for path in folder.glob(f"*/{CONFIG_NAME}"))
    if not found:
        raise LordbaError(f"{folder}: neither it nor a folder in it holds {CONFIG_NAME}; give an adapter's folder")
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise LordbaError(f"{folder}: holds {len(found)} adapters ({names}); give the folder of one of them")
    return found[0]


def read_config(folder: Path) -> dict[str, object]:
    """The adapter's configuration as a mapping, of whatever peft_type."""
    path = folder / CONFIG_NAME
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise LordbaError(f"{path}: is not readable JSON ({error}); copy the adapter anew") from error
    if not isinstance(config, dict):
        raise LordbaError(f"{path}: expected a JSON object with a peft_type, found {type(config).__name__}")
    return config


def read_lora(folder: Path) -> LoraAdapter:
    """Read a PEFT LoRA folder (or the one adapter in a subfolder of it).

    fp32, fp16 and bf16 tensors; lora_alpha, use_rslora, rank_pattern and alpha_pattern give each module's scaling.
    LoRA factors of GPT-2's Conv1D (fan_in_fan_out) are stored as those of any linear layer. Whatever is not a linear
    LoRA beside an untouched base raises a LordbaError that names the setting or tensor.
    """
    folder = find_adapter(folder)
    config = read_config(folder)
    _refuse_unfit(config, folder / CONFIG_NAME)
    weights = folder / WEIGHTS_NAME
    pairs = _pair_factors(_read_tensors(weights), weights)
    modules = {
        path: LoraModule(a, b, _scaling(config, path, a.shape[0], folder / CONFIG_NAME))
        for path, (a, b) in sorted(pairs.items())
    }
    base = config.get("base_model_name_or_path")
    carried = {key: config[key] for key in _CARRIED if config.get(key) is not None}
    return LoraAdapter(modules, base if isinstance(base, str) else None, carried)


def to_lora(adapter: Adapter) -> LoraAdapter:
    """The plain LoRA, float64 with scaling 1, that computes the same function as a LoRDBA adapter."""
    modules = {path: LoraModule(a, b, 1.0) for path, m in adapter.modules.items() for b, a in [m.factors()]}
    carried = {key: adapter.peft_config[key] for key in _CARRIED if key in adapter.peft_config}
    return LoraAdapter(modules, adapter.base_model_name_or_path, carried)


def write_lora(lora: LoraAdapter, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a PEFT folder whose alpha equals its rank, so that the two factors alone define the update."""
    tensors: dict[str, Tensor] = {}
    for path, module in lora.modules.items():
        b, a = (factor.to(dtype).contiguous() for factor in module.factors())
        if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
            raise LordbaError(
                f"module {path}: its factors exceed the range of {dtype}; use --dtype float32 or bfloat16"
            )
        tensors[f"{PREFIX}{path}.lora_A.weight"], tensors[f"{PREFIX}{path}.lora_B.weight"] = a, b
    r = max(module.r for module in lora.modules.values())
    # Patterns match from the end of a path, first hit wins: a longer path must precede one that it ends in.
    other = sorted((path for path, module in lora.modules.items() if module.r != r), key=len, reverse=True)
    ranks = {path: lora.modules[path].r for path in other}
    config = {
        **lora.peft_config,
        "peft_type": "LORA",
        "base_model_name_or_path": lora.base_model_name_or_path,
        "r": r,
        "lora_alpha": r,
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "use_rslora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(lora.modules),
    }
    with new_folder(folder, replaceable_if=CONFIG_NAME) as out:
        write_safetensors(out / WEIGHTS_NAME, tensors, {"format": "pt"})
        (out / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")


def _refuse_unfit(config: Mapping[str, object], path: Path) -> None:
    peft_type = config.get("peft_type")
    if peft_type == "LORDBA":
        raise LordbaError(f"{path}: is a LoRDBA adapter already; to get a plain LoRA from it, add --to lora")
    if peft_type != "LORA":
        raise LordbaError(f"{path}: expected peft_type LORA, found {peft_type!r}; only linear LoRA can be converted")
    for key, why in _REFUSED_SETTINGS.items():
        if config.get(key):
            raise LordbaError(f"{path}: {key} is set: {why}, so this is no linear LoRA; train without {key}")
    if config.get("bias", "none") != "none":
        raise LordbaError(f"{path}: bias is {config['bias']!r}: it trains biases of the base; train with bias='none'")
    init = str(config.get("init_lora_weights", True)).lower()
    if init not in _HARMLESS_INIT:
        raise LordbaError(
            f"{path}: init_lora_weights is {init!r}, which changes the base weights; save it as a plain LoRA first: "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    unknown = [key for key, value in config.items() if value and key not in _KNOWN_SETTINGS]
    if unknown:
        raise LordbaError(f"{path}: {unknown[0]} is set, which is not known here and may change what the LoRA computes")


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        pickled = path.with_suffix(".bin")
        hint = (
            f"; {pickled.name} is a pickle, which can run code and is not read: load the adapter with PEFT once and "
            "save_pretrained(..., safe_serialization=True)"
            if pickled.is_file()
            else ""
        )
        raise LordbaError(f"{path}: not found{hint}")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise LordbaError(f"{path}: cannot be read ({error}); it is truncated or damaged, copy it anew") from error


def _pair_factors(tensors: Mapping[str, Tensor], file: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """(A, B) by module path; anything that is not one of two fitting, finite factors is an error."""
    factors: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _FACTOR.fullmatch(name)
        if not match:
            why = next((why for part, why in _REFUSED_TENSORS.items() if part in name), "is no factor of a linear LoRA")
            raise LordbaError(f"{file}: tensor {name} {why}; only lora_A and lora_B of linear layers can be converted")
        if tensor.dim() != 2:
            raise LordbaError(
                f"{file}: tensor {name} is {list(tensor.shape)}, the factor of a convolution; only linear layers "
                "can be converted"
            )
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16) or 0 in tensor.shape:
            raise LordbaError(
                f"{file}: tensor {name} must be a float32, float16 or bfloat16 matrix, "
                f"found {tensor.dtype} {list(tensor.shape)}"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise LordbaError(f"{file}: tensor {name} holds NaN or infinity; the training that made it diverged")
        factors.setdefault(match["path"], {})[match["factor"]] = tensor
    for path, pair in factors.items():
        missing = {"A", "B"} - pair.keys()
        if missing:
            raise LordbaError(f"{file}: module {path} lacks lora_{missing.pop()}; the file is incomplete, copy it anew")
        if pair["A"].shape[0] != pair["B"].shape[1]:
            raise LordbaError(
                f"{file}: module {path} has lora_A {list(pair['A'].shape)} and lora_B {list(pair['B'].shape)}, "
                "whose ranks differ"
            )
    if not factors:
        raise LordbaError(f"{file}: holds no LoRA of a linear layer; there is nothing to convert")
    return {path: (pair["A"], pair["B"]) for path, pair in factors.items()}


def _scaling(config: Mapping[str, object], path: str, rank: int, file: Path) -> float:
    """alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA, each from the first pattern that the path ends in."""
    try:
        r = _pattern_value(config.get("rank_pattern"), path, config["r"])
        alpha = float(str(_pattern_value(config.get("alpha_pattern"), path, config["lora_alpha"])))
    except KeyError as error:
        raise LordbaError(f"{file}: {error.args[0]} is missing, without it the LoRA's scaling is unknown") from error
    except (TypeError, ValueError, AttributeError, re.error) as error:
        raise LordbaError(f"{file}: r, lora_alpha, rank_pattern or alpha_pattern is not usable ({error})") from error
    if r != rank:
        raise LordbaError(
            f"{file}: gives module {path} rank {r}, but its tensors have rank {rank}; "
            "configuration and weights belong to different adapters"
        )
    if not math.isfinite(alpha):
        raise LordbaError(f"{file}: lora_alpha of module {path} is {alpha}; it must be finite")
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _pattern_value(patterns: object, path: str, default: object) -> object:
    if not patterns:
        return default
    if not isinstance(patterns, Mapping):
        raise TypeError(f"a pattern table must be a mapping, found {type(patterns).__name__}")
    return next((v for pattern, v in patterns.items() if re.match(rf"(.*\.)?({pattern})$", path)), default)
