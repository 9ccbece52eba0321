"""What base, LoRA and LoRDBA reach on the same held-out data, and what they say to the same prompt."""

import copy
import platform
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from demo_data import ANSWERS, IGNORED, Example, collate
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lordba.adapter import Adapter
from lordba.layers import attach
from lordba.models import BaseModel

BATCH_SIZE = 8


def labelled_logits(model: PreTrainedModel, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Float32 logits [n, vocabulary] that predict the n tokens whose loss counts, and those tokens [n]."""
    hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    counted = labels[:, 1:] != IGNORED
    return model.get_output_embeddings()(hidden[counted]).float(), labels[:, 1:][counted]


def with_lora(base: BaseModel, folder: Path) -> PreTrainedModel:
    """A copy of the base with a PEFT LoRA, merged in float32."""
    return PeftModel.from_pretrained(copy.deepcopy(base.model), str(folder)).merge_and_unload()


def with_adapter(base: BaseModel, adapter: Adapter) -> PreTrainedModel:
    """A copy of the base with a LoRDBA adapter, unmerged, through the eager op."""
    model = copy.deepcopy(base.model)
    attach(model, adapter)
    return model


@torch.no_grad()
def evaluate(
    models: Mapping[str, PreTrainedModel],
    examples: list[Example],
    answers: Tensor | None,
    advance: Callable[[], object],
) -> dict[str, dict[str, float]]:
    """Per model: nll (nats per counted token), kl_to_lora = KL(models["lora"] || model), and, if the two answer
    tokens [2] are given, accuracy of the likelier answer."""
    examples = sorted(examples, key=lambda e: len(e.ids))
    scores = {name: {"nll": 0.0, "kl_to_lora": 0.0} | ({} if answers is None else {"accuracy": 0.0}) for name in models}
    count = 0
    for start in range(0, len(examples), BATCH_SIZE):
        ids, labels = collate(examples[start : start + BATCH_SIZE])
        reference, targets = labelled_logits(models["lora"], ids, labels)
        count += len(targets)
        for name, model in models.items():
            logits = reference if name == "lora" else labelled_logits(model, ids, labels)[0]
            score = scores[name]
            score["nll"] += cross_entropy(logits, targets, reduction="sum").item()
            score["kl_to_lora"] += kl_div(
                log_softmax(logits, -1), log_softmax(reference, -1), reduction="sum", log_target=True
            ).item()
            if answers is not None:
                score["accuracy"] += (answers[logits[:, answers].argmax(-1)] == targets).sum().item()
        advance()
    return {name: {metric: total / count for metric, total in score.items()} for name, score in scores.items()}


def answer_tokens(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The token ids of ANSWERS [2]; each is a single token."""
    return torch.tensor([tokenizer(answer, add_special_tokens=False).input_ids for answer in ANSWERS]).flatten()


def majority_baseline(examples: list[Example], answers: Tensor) -> float:
    """The accuracy of always giving the more frequent answer."""
    targets = torch.cat([e.labels[e.labels != IGNORED] for e in examples])
    return max((targets == answer).float().mean().item() for answer in answers)


def continuation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, length: int = 60) -> str:
    """What greedy decoding adds to the prompt, special tokens left out."""
    inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=length, do_sample=False)  # type: ignore[operator]
    return str(tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True))


def machine() -> dict[str, str | int]:
    """Where the numbers were measured."""
    return {
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
