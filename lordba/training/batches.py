"""Training text: files and data sets to tokenized examples, and which of them a step sees: by seed and step alone."""

import functools
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lordba.training.text_examples import IGNORED, read_sequences

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Example:
    """Token ids and labels, both [n]; labels are the ids or IGNORED."""

    ids: Tensor
    labels: Tensor

    @property
    def targets(self) -> int:
        """How many tokens are predicted: labels, but never the first token."""
        return int((self.labels[1:] != IGNORED).sum())


def read_examples(
    source: str | Path, tokenizer: "PreTrainedTokenizerBase", max_length: int, columns: tuple[str, ...] | None = None
) -> list[Example]:
    """Examples of a text file, of a .jsonl file or of a data set: see text_examples.read_sequences."""

    def encode(text: str, special: bool) -> list[int]:
        return tokenizer(text, add_special_tokens=special).input_ids

    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    found = read_sequences(source, encode, end, max_length, columns)
    return [Example(torch.tensor(sequence.ids), torch.tensor(sequence.labels)) for sequence in found]


def digest(examples: Sequence[Example]) -> str:
    """sha256 of all ids and labels, by which a run knows its data again wherever they came from."""
    result = hashlib.sha256()
    for example in examples:
        for values in (example.ids, example.labels):
            result.update(f"{values.numel()} ".encode())
            result.update(values.numpy().tobytes())
    return result.hexdigest()


def split(examples: Sequence[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """(training, held out), the latter that fraction of all, drawn by the seed."""
    held_out = round(fraction * len(examples))
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    return [examples[i] for i in sorted(order[held_out:])], [examples[i] for i in sorted(order[:held_out])]


def batch_of(examples: Sequence[Example], size: int, step: int, seed: int) -> list[Example]:
    """The examples of a step: every epoch is another permutation, and batches run on from one into the next."""
    places = range(step * size, (step + 1) * size)
    return [examples[_permutation(len(examples), seed, at // len(examples))[at % len(examples)]] for at in places]


@functools.lru_cache(maxsize=2)
def _permutation(n: int, seed: int, epoch: int) -> list[int]:
    return torch.randperm(n, generator=torch.Generator().manual_seed(1_000_003 * seed + epoch)).tolist()


def micro_batches(examples: Sequence[Example], size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """ids, labels and attention mask [at most size, longest], padded on the right."""
    for begin in range(0, len(examples), size):
        part = examples[begin : begin + size]
        shape = (len(part), max(example.ids.numel() for example in part))
        ids, labels, mask = (torch.full(shape, value) for value in (0, IGNORED, 0))
        for row, example in enumerate(part):
            n = example.ids.numel()
            ids[row, :n], labels[row, :n], mask[row, :n] = example.ids, example.labels, 1
        yield ids, labels, mask
