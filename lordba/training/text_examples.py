"""Training text as token ids and labels, without PyTorch: what lordba.train and lordba.train_on_device both read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from lordba.errors import LordbaError
from lordba.training.data_sets import FORMATS, Source, read_records

IGNORED = -100  # the label of tokens that are read but not learned
Encode = Callable[[str, bool], list[int]]
"""Text to token ids, with or without special tokens."""


class Sequence(NamedTuple):
    """Token ids and labels of equal length; labels are the ids or IGNORED."""

    ids: list[int]
    labels: list[int]

    @property
    def targets(self) -> int:
        """How many tokens are predicted: labels, but never the first token."""
        return sum(label != IGNORED for label in self.labels[1:])


def read_sequences(
    source: str | Path, encode: Encode, end: list[int], max_length: int, columns: tuple[str, ...] | None = None
) -> list[Sequence]:
    """Examples of a text file (windows of max_length tokens), or of records (one example each, cut to it).

    Records are the lines of a .jsonl file or the rows of a data set (data_sets.py): {"text": ...}, learned as a
    whole, or {"prompt": ..., "completion": ...}, whose completion alone is learned; both close with the `end` tokens.
    `columns` names the one or two columns that are meant.
    """
    path = Path(source)
    if path.suffix in (".txt", ".jsonl") or (path.is_file() and path.suffix not in FORMATS):
        if columns is not None and path.suffix != ".jsonl":
            raise LordbaError(f"{path}: is text and has no columns; --columns is for data sets and .jsonl files")
        found = _of_file(path, encode, end, max_length, columns)
    else:
        records = read_records(Source.parse(str(source)), columns)
        found = [_sequence(record, where, encode, end, max_length) for where, record in records]
    found = [sequence for sequence in found if sequence.targets]
    if not found:
        raise LordbaError(f"{source}: holds no text to learn from (prompts longer than --max-length leave nothing)")
    return found


def _of_file(
    path: Path, encode: Encode, end: list[int], max_length: int, columns: tuple[str, ...] | None
) -> list[Sequence]:
    try:
        content = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise LordbaError(f"{path}: no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise LordbaError(f"{path}: cannot be read as UTF-8 text ({error}); give a .txt or .jsonl file") from error
    if path.suffix == ".jsonl":
        lines = [(f"{path}:{n}", line) for n, line in enumerate(content.splitlines(), 1) if line.strip()]
        return [_sequence(_parse(line, where, columns), where, encode, end, max_length) for where, line in lines]
    ids = encode(content, True)
    whole = len(ids) // max_length * max_length or len(ids)
    windows = [ids[i : i + max_length] for i in range(0, whole, max_length)]
    return [Sequence(window, window) for window in windows]


def _parse(line: str, where: str, columns: tuple[str, ...] | None) -> object:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise LordbaError(f"{where}: is not JSON ({error}); every line must be one object") from error
    if columns is not None and isinstance(record, dict):
        names = ("text",) if len(columns) == 1 else ("prompt", "completion")
        record = {name: record.get(column) for name, column in zip(names, columns, strict=True)}
    return record


def _sequence(record: object, where: str, encode: Encode, end: list[int], max_length: int) -> Sequence:
    keys = ["text"] if isinstance(record, dict) and "text" in record else ["prompt", "completion"]
    if not isinstance(record, dict) or not all(isinstance(record.get(key), str) for key in keys):
        wanted = '{"text": ...} or {"prompt": ..., "completion": ...}'
        raise LordbaError(f"{where}: expected {wanted} with strings, found {json.dumps(record, default=str):.60}")
    if len(keys) == 1:
        read, learned = [], encode(record["text"], True)
    else:
        read, learned = encode(record["prompt"], True), encode(record["completion"], False)
    ids = [*read, *learned, *end]
    return Sequence(ids[:max_length], ([IGNORED] * len(read) + ids[len(read) :])[:max_length])
