"""Training text as token ids and labels, without PyTorch: what lordba.train and lordba.train_on_device both read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from lordba.errors import LordbaError

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


def read_sequences(path: Path, encode: Encode, end: list[int], max_length: int) -> list[Sequence]:
    """Examples of a text file (windows of max_length tokens) or of a .jsonl file (one example a line, cut to it).

    A line is {"text": ...}, learned as a whole, or {"prompt": ..., "completion": ...}, whose completion alone is
    learned; both close with the `end` tokens.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LordbaError(f"{path}: cannot be read as UTF-8 text ({error}); give a .txt or .jsonl file") from error
    if path.suffix == ".jsonl":
        lines = [(n, line) for n, line in enumerate(content.splitlines(), 1) if line.strip()]
        found = [_parse(line, f"{path}:{n}", encode, end, max_length) for n, line in lines]
    else:
        ids = encode(content, True)
        whole = len(ids) // max_length * max_length or len(ids)
        windows = [ids[i : i + max_length] for i in range(0, whole, max_length)]
        found = [Sequence(window, window) for window in windows]
    found = [sequence for sequence in found if sequence.targets]
    if not found:
        raise LordbaError(f"{path}: holds no text to learn from (prompts longer than --max-length leave nothing)")
    return found


def _parse(line: str, where: str, encode: Encode, end: list[int], max_length: int) -> Sequence:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise LordbaError(f"{where}: is not JSON ({error}); every line must be one object") from error
    keys = ["text"] if isinstance(record, dict) and "text" in record else ["prompt", "completion"]
    if not isinstance(record, dict) or not all(isinstance(record.get(key), str) for key in keys):
        wanted = '{"text": ...} or {"prompt": ..., "completion": ...}'
        raise LordbaError(f"{where}: expected {wanted} with strings, found {line:.60}")
    if len(keys) == 1:
        read, learned = [], encode(record["text"], True)
    else:
        read, learned = encode(record["prompt"], True), encode(record["completion"], False)
    ids = [*read, *learned, *end]
    return Sequence(ids[:max_length], ([IGNORED] * len(read) + ids[len(read) :])[:max_length])
