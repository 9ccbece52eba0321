"""Training text: files and data sets to tokenized examples, and which of them a step sees: by seed and step alone."""

import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lordba.data_sets import FORMATS, Source, read_records
from lordba.errors import LordbaError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label of tokens that are read but not learned


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
    """Examples of a text file (windows of max_length tokens), or of records (one example each, cut to it).

    Records are the lines of a .jsonl file or the rows of a data set (lordba.data_sets): {"text": ...}, learned as a
    whole, or {"prompt": ..., "completion": ...}, whose completion alone is learned; both end with the end token.
    """
    path = Path(source)
    if path.suffix in (".txt", ".jsonl") or (path.is_file() and path.suffix not in FORMATS):
        if columns is not None and path.suffix != ".jsonl":
            raise LordbaError(f"{path}: is text and has no columns; --columns is for data sets and .jsonl files")
        examples = _of_file(path, tokenizer, max_length, columns)
    else:
        records = read_records(Source.parse(str(source)), columns)
        examples = [_example(record, where, tokenizer, max_length) for where, record in records]
    examples = [example for example in examples if example.targets]
    if not examples:
        raise LordbaError(f"{source}: holds no text to learn from (prompts longer than --max-length leave nothing)")
    return examples


def _of_file(
    path: Path, tokenizer: "PreTrainedTokenizerBase", max_length: int, columns: tuple[str, ...] | None
) -> list[Example]:
    try:
        content = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise LordbaError(f"{path}: no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise LordbaError(f"{path}: cannot be read as UTF-8 text ({error}); give a .txt or .jsonl file") from error
    if path.suffix == ".jsonl":
        lines = [(n, line) for n, line in enumerate(content.splitlines(), 1) if line.strip()]
        return [_parse(line, f"{path}:{n}", tokenizer, max_length, columns) for n, line in lines]
    ids = torch.tensor(tokenizer(content).input_ids, dtype=torch.long)
    whole = ids.numel() // max_length * max_length or ids.numel()
    return [Example(window, window) for window in ids[:whole].split(max_length)]


def _parse(
    line: str,
    where: str,
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    columns: tuple[str, ...] | None,
) -> Example:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise LordbaError(f"{where}: is not JSON ({error}); every line must be one object") from error
    if columns is not None and isinstance(record, dict):
        names = ("text",) if len(columns) == 1 else ("prompt", "completion")
        record = {name: record.get(column) for name, column in zip(names, columns, strict=True)}
    return _example(record, where, tokenizer, max_length)


def _example(record: object, where: str, tokenizer: "PreTrainedTokenizerBase", max_length: int) -> Example:
    keys = ["text"] if isinstance(record, dict) and "text" in record else ["prompt", "completion"]
    if not isinstance(record, dict) or not all(isinstance(record.get(key), str) for key in keys):
        wanted = '{"text": ...} or {"prompt": ..., "completion": ...}'
        raise LordbaError(f"{where}: expected {wanted} with strings, found {json.dumps(record, default=str):.60}")
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    if len(keys) == 1:
        read, learned = [], tokenizer(record["text"]).input_ids
    else:
        read = tokenizer(record["prompt"]).input_ids
        learned = tokenizer(record["completion"], add_special_tokens=False).input_ids
    ids = torch.tensor([*read, *learned, *end], dtype=torch.long)
    labels = torch.cat([torch.full((len(read),), IGNORED), ids[len(read) :]])
    return Example(ids[:max_length], labels[:max_length])


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
