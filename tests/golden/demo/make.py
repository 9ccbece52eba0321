"""Writes what the Kotlin and Swift packages are tested against: `python tests/golden/demo/make.py`.

test_golden_demo.py holds the files to what this script writes today.
"""

import json
import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from lordba.adapter import Adapter, SignModule, load_adapter, save_adapter
from lordba.blob import make_blob
from lordba.layers import attach
from lordba.models import fingerprint
from lordba.profiling.record import Device, Series, profile_json
from lordba.runtime.bundle import BundleAdapter, Manifest, ParityCheck, write_manifest
from lordba.scales import ScaleCode, encode_scales
from lordba.signs import pack_signs

HERE = Path(__file__).parent
VOCABULARY = 400
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEXTS = (
    "",
    "Once upon a time, there was a little",
    "  two  spaces,\n\n\tlines and a tab \n",
    "It's 1984; they'll count 1234567890 sheep, won't they?",
    "naïve café, Ærøskøbing, 東京, 👩‍👩‍👧 and e\u0301",
    "<|im_start|>user\nHi!<|im_end|>\n<|im_start|>assistant\n",
    "a<|endoftext|>b <|im_end",
    "ALL CAPS, snake_case, x+=1; // ½ ² Ⅷ \u00a0\u3000end",
)


def tokenizer(digits: bool) -> Tokenizer:
    """A small tokenizer of SmolLM2's kind: byte-level BPE, in its own form each digit apart."""
    result = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    result.pre_tokenizer = (
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level]) if digits else byte_level
    )
    result.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    result.train_from_iterator([(files("lordba.export") / "parity_text.txt").read_text(), "1984 1984 1984"], trainer)
    return result


def cases(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    encoded = [(text, tokenizer.encode(text).ids) for text in TEXTS]
    return [{"text": t, "ids": i, "decoded": tokenizer.decode(i, skip_special_tokens=True)} for t, i in encoded]


def sample(logits: np.ndarray, temperature: float, top_k: int, top_p: float, uniform: float) -> int:
    """The sampler of the apps, in float64: `uniform` is a random number in [0, 1)."""
    if temperature == 0:
        return int(np.argmax(logits))
    scaled = logits.astype(np.float64) / temperature
    p = np.exp(scaled - scaled.max())
    order = np.argsort(-p, kind="stable")[: top_k or None]
    p = p[order] / p[order].sum()
    kept = int(np.searchsorted(np.cumsum(p), top_p)) + 1
    p = p[:kept] / p[:kept].sum()
    return int(order[min(int(np.searchsorted(np.cumsum(p), uniform, side="right")), len(p) - 1)])


def sampling() -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    rows = []
    for temperature, top_k, top_p in ((0.0, 0, 1.0), (1.0, 0, 1.0), (0.7, 5, 1.0), (1.3, 0, 0.8), (0.9, 8, 0.5)):
        for _ in range(8):
            logits = (3 * rng.standard_normal(20)).round(2)
            logits[7] = logits[3]  # a tie
            uniform = float(rng.random().__round__(6))
            token = sample(logits, temperature, top_k, top_p, uniform)
            row = {"logits": logits.tolist(), "temperature": temperature, "top_k": top_k, "top_p": top_p}
            rows.append(row | {"uniform": uniform, "token": token})
    return rows


def tiny_model(folder: Path) -> dict[str, Any]:
    """A random Llama and an adapter for all its linear layers; returns tokens and what eager PyTorch makes of them."""
    import transformers

    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=VOCABULARY,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            initializer_range=0.15,
            bos_token_id=0,
            eos_token_id=2,
        )
    ).eval()
    for weight in model.parameters():
        if weight.dim() == 1:
            weight.data += 0.1 * torch.randn(weight.shape)
    model.requires_grad_(False)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    generator = torch.Generator().manual_seed(1)

    def scales(n: int, size: float):
        return encode_scales((torch.rand(n, generator=generator) + 0.1) * size, ScaleCode.LOG4)

    modules = {
        path: SignModule(
            pack_signs(torch.randn(8, layer.in_features, generator=generator)),
            pack_signs(torch.randn(layer.out_features, 8, generator=generator)),
            scales(layer.in_features, 0.3),
            scales(8, 1.0),
            scales(layer.out_features, 0.3),
        )
        for path, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear) and path != "lm_head"
    }
    save_adapter(Adapter(modules, ScaleCode.LOG4, "tiny", fingerprint(model)), folder / "adapter")
    tokens = torch.randint(3, VOCABULARY, (1, 12), generator=generator)
    base = model(input_ids=tokens).logits[0, -1]
    attach(model, load_adapter(folder / "adapter"))
    adapted = model(input_ids=tokens).logits[0, -1]
    logits = {name: [float(f"{v:.7g}") for v in row.tolist()] for name, row in (("none", base), ("adapter", adapted))}
    return {"tokens": tokens[0].tolist(), "last_logits": logits}


def bundle(folder: Path) -> None:
    """A bundle as loaders meet it; its program is no program."""
    (folder / "adapters").mkdir(parents=True)
    (folder / "model.bin").write_bytes(bytes(range(64)))
    shutil.copy(HERE / "tokenizer" / "tokenizer.json", folder / "tokenizer.json")
    adapter = load_adapter(HERE.parent / "adapter-log4")
    blob = make_blob(list(adapter.modules.values())).numpy().tobytes()
    (folder / "adapters" / "golden.bin").write_bytes(blob)
    entry = BundleAdapter(
        "golden", "adapters/golden.bin", adapter.r, "log4", len(adapter.modules), adapter.nbytes,
        adapter.fp16_lora_bytes, len(blob),
    )  # fmt: skip
    write_manifest(
        folder,
        Manifest(
            target="executorch",
            program="model.bin",
            base={"name": "golden-base", "fingerprint": "sha256:" + "0" * 64},
            base_quant="int4",
            toolchain={"torch": "2.13.0", "executorch": "1.5.1"},
            requires=["lordba::sign_adapter.out"],
            adapter_mode="input",
            max_seq_len=64,
            eos_ids=[0, 2],
            modules=[*adapter.modules],
            adapters=[entry],
            parity=[ParityCheck("program", "golden", "mean_kl", 0.01, 0.035, True)],
            tokenizer="tokenizer.json",
        ),
    )


DAMAGES = [
    {"kind": "flip_byte", "file": "model.bin", "error": ["model.bin", "sha256"]},
    {"kind": "truncate", "file": "adapters/golden.bin", "error": ["golden.bin", "expected", "found"]},
    {"kind": "remove", "file": "tokenizer.json", "error": ["tokenizer.json", "missing"]},
    {"kind": "manifest", "set": {"format_version": 2}, "error": ["manifest.json", "format_version 2"]},
    {"kind": "manifest", "set": {"program": "../model.bin"}, "error": ["manifest.json", "../model.bin"]},
    {"kind": "manifest", "remove": "eos_ids", "error": ["manifest.json", "eos_ids"]},
]
"""How a copy of the bundle is damaged, and the words that every loader's message holds."""


def profile() -> tuple[dict[str, Any], str]:
    """Samples, and the profile file they give."""
    rng = np.random.default_rng(0)
    adapters: tuple[tuple[str, float, dict[str, Any]], ...] = (
        ("none", 1.0, {}),
        ("dense_lora", 1.2, {"adapter_name": "shakespeare", "rank": 16, "bits": 16.0}),
        ("lordba", 1.04, {"adapter_name": "shakespeare", "rank": 16, "bits": 1.257, "scale_code": "log4"}),
    )
    phases = (("load", 0, 150.0, 3), ("prefill", 128, 100.0, 9), ("decode", 1, 4.2, 40))
    series = []
    for phase, tokens, size, count in phases:
        for adapter, factor, about in adapters:
            samples = (size * factor * (1 + 0.02 * rng.random(count))).round(4).tolist()
            series.append(Series("onnx", "SmolLM2-135M", "int4", adapter, phase, tokens, 2, samples, **about))
    series.append(Series("onnx", "SmolLM2-135M", "int4", "lordba", "decode", 1, 2, [4.2, 4.9, 5.4], "noisy", 16))
    series.append(Series("onnx", "SmolLM2-135M", "int4", "lordba", "swap", 0, 2, [0.1234, 0.5], "shakespeare", 16))
    device = Device("Pixel 9", "arm64-v8a", "Android 16", 12_000_000_000, 6_000_000_000)
    machine, conditions = {"cpu": "Tensor G4", "cores": 8}, {"warm_up": 2, "interleaved": True, "note": "naïve ½"}
    given = {"device": vars(device), "machine": machine, "conditions": conditions, "series": [vars(s) for s in series]}
    return given, profile_json(series, device, machine, conditions)


def write(folder: Path) -> None:
    """Write all golden files of the apps into a folder."""
    for name, digits in (("tokenizer", True), ("tokenizer-plain", False)):
        (folder / name).mkdir(parents=True)
        made = tokenizer(digits)
        (folder / name / "tokenizer.json").write_text(made.to_str(pretty=True) + "\n")
        _json(folder / name / "cases.json", cases(made))
    _json(folder / "sampling.json", sampling())
    _json(folder / "model" / "logits.json", tiny_model(folder / "model"))
    bundle(folder / "bundle")
    _json(folder / "bundle-damaged.json", DAMAGES)
    given, text = profile()
    (folder / "profile").mkdir()
    _json(folder / "profile" / "samples.json", given)
    (folder / "profile" / "profile.json").write_text(text)


def _json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    for path in HERE.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
    write(HERE)
