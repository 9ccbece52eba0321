"""Training programs of tiny models, and the eager training that they are compared with: transformers and autograd."""

import functools
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from conftest import MAX_SEQ_LEN, tiny_model
from torch import Tensor, nn

from lordba.export.executorch.capture import capture
from lordba.export.executorch.decoder import Decoder
from lordba.export.executorch.quantize import QuantizedLinear, SplitInt4Linear, quantize_base
from lordba.export.executorch.train_program import TRAINING_NAME, training_program
from lordba.files import sha256_of
from lordba.layers import linear_size
from lordba.runtime.bundle import MANIFEST_NAME, Bundle, BundleFile, read_bundle
from lordba.runtime.device_trainer import DeviceTrainer, Optimizer
from lordba.training.ste import add_signed

R = 4
NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class StraightThrough(nn.Module):
    """A linear layer with latents of scaling 1, whose gradients autograd gets from lordba.training.ste."""

    def __init__(self, base: nn.Linear, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.base, self.a, self.b = base, nn.Parameter(a.clone()), nn.Parameter(b.clone())

    def forward(self, x: Tensor) -> Tensor:
        return add_signed(self.base(x), x, self.a, self.b, 1.0, exact=True)


def adapted_paths(model: nn.Module) -> list[str]:
    return [path for path, layer in model.named_modules() if linear_size(layer) and path.endswith(NAMES)]


@functools.cache
def program(family: str, base_quant: str, layers: int = 2) -> tuple[bytes, tuple[str, ...]]:
    """The training program of a tiny model, every linear adapted; and the modules in the program's order."""
    model = tiny_model(family, num_hidden_layers=layers)
    order = Decoder(model, set(adapted_paths(model)), MAX_SEQ_LEN).slot.paths
    paths = [path for path in order if path]
    made = training_program(model, "fused", paths, R, base_quant, MAX_SEQ_LEN, "sha256:ab")
    return made.pte, tuple(paths)


def trainer_of(folder: Path, pte: bytes, optimizer: Optimizer | None = None, seed: int = 0) -> DeviceTrainer:
    file = folder / TRAINING_NAME
    file.write_bytes(pte)
    return DeviceTrainer(file, optimizer, seed)


def dense_weight(layer: nn.Module) -> Tensor:
    """The weight with which a layer of the inference program computes."""
    if isinstance(layer, SplitInt4Linear):
        return layer.codes._weight + layer.offset.weight.repeat_interleave(32, 1)
    return layer._weight if isinstance(layer, QuantizedLinear) else layer.weight  # type: ignore[return-value]


def inference_base(family: str, base_quant: str, layers: int) -> Any:
    """The transformers model with the weights of the inference program, float32."""
    model = tiny_model(family, num_hidden_layers=layers)
    decoder = capture(model, {}, MAX_SEQ_LEN, "fast").module
    assert isinstance(decoder, Decoder)
    if base_quant != "none":
        quantize_base(decoder, base_quant)
    for source, made in zip(model.model.layers, decoder.layers, strict=True):
        attention, mlp = source.self_attn, source.mlp
        groups: list[tuple[Any, list[Any]]] = [
            (made.attention.qkv, [attention.q_proj, attention.k_proj, attention.v_proj]),
            (made.attention.o, [attention.o_proj]),
            (made.gate_up, [mlp.gate_proj, mlp.up_proj]),
            (made.down, [mlp.down_proj]),
        ]
        for joined, parts in groups:
            weights = dense_weight(joined.linear).split([part.out_features for part in parts])
            for part, weight in zip(parts, weights, strict=True):
                part.weight = nn.Parameter(weight.clone(), requires_grad=False)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(dense_weight(decoder.head.linear).clone(), requires_grad=False)
    if base_quant != "none":
        rows = decoder.embedding
        dense = rows.codes.float().unflatten(-1, (rows.scales.shape[-1], -1)) * rows.scales[..., None]
        model.model.embed_tokens.weight = nn.Parameter(dense.flatten(-2), requires_grad=False)
    return model


def with_latents(model: Any, paths: Sequence[str], trainer: DeviceTrainer) -> dict[str, StraightThrough]:
    """Put eager layers with the trainer's latents into the model."""
    layers = {}
    for i, path in enumerate(paths):
        a, b = (torch.from_numpy(factor.copy()) for factor in trainer.factors(i))
        layers[path] = StraightThrough(model.get_submodule(path), a, b)
        model.set_submodule(path, layers[path])
    return layers


def eager_loss(model: Any, tokens: Sequence[int], targets: Sequence[int], weight: float) -> Tensor:
    logits = model(input_ids=torch.tensor([list(tokens)])).logits[0]
    return F.cross_entropy(logits, torch.tensor(list(targets)), ignore_index=-100, reduction="sum") * weight


def add_training(bundle: Bundle, folder: Path, pte: bytes, r: int) -> Bundle:
    """A copy of a bundle that can train, as the export writes it."""
    shutil.copytree(bundle.folder, folder)
    file = folder / TRAINING_NAME
    file.write_bytes(pte)
    record = json.loads((folder / MANIFEST_NAME).read_text())
    record["files"].append(asdict(BundleFile(TRAINING_NAME, len(pte), sha256_of(file))))
    record["training"] = {"program": TRAINING_NAME, "form": "fused", "max_seq_len": MAX_SEQ_LEN, "r": r, "requires": []}
    (folder / MANIFEST_NAME).write_text(json.dumps(record))
    return read_bundle(folder)
