"""Data sets as training data: what their rows become, whichever way they are stored, and what is refused."""

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lordba import train
from lordba.errors import LordbaError
from lordba.training.batches import digest, read_examples
from lordba.training.data_sets import Source

datasets = pytest.importorskip("datasets", reason="the optional library is not installed: pip install datasets")

QUESTIONS = [f"Question {i}: what is {i} and {i}?" for i in range(12)]
ANSWERS = [f" it is {2 * i}" for i in range(12)]
COLUMNS = ("question", "answer")


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same rows in every form, the library's cache beside them; `splits`: with a validation split of three."""
    folder = tmp_path_factory.mktemp("rows")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        data = datasets.Dataset.from_dict({"question": QUESTIONS, "answer": ANSWERS, "id": list(range(12))})
        data.to_parquet(folder / "rows.parquet")
        with (folder / "rows.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("question", "answer"), *zip(QUESTIONS, ANSWERS, strict=True)])
        records = [{"question": q, "answer": a} for q, a in zip(QUESTIONS, ANSWERS, strict=True)]
        (folder / "rows.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        data.save_to_disk(folder / "disk")
        splits = datasets.DatasetDict({"train": data, "validation": data.select(range(3))})
        splits.save_to_disk(folder / "splits")
        (folder / "files").mkdir()
        data.to_parquet(folder / "files" / "train-0.parquet")
        data.select(range(3)).to_parquet(folder / "files" / "validation-0.parquet")
        yield {path.name: path for path in folder.iterdir()}


def test_every_form_gives_the_same_examples(stored, tiny_base):
    """Against the .jsonl file, which the library has no part in."""
    wanted = read_examples(stored["rows.jsonl"], tiny_base.tokenizer, 64, COLUMNS)
    tokenizer: Any = tiny_base.tokenizer
    assert tokenizer.decode(wanted[5].ids) == QUESTIONS[5] + ANSWERS[5] + "</s>"
    forms = ["rows.parquet", "rows.csv", "disk", "splits", "files"]
    sources = [str(stored[name]) for name in forms] + [str(next(stored["disk"].glob("*.arrow")))]
    for source in sources:
        assert digest(read_examples(source, tokenizer, 64, COLUMNS)) == digest(wanted), source
    swapped = read_examples(stored["rows.parquet"], tokenizer, 64, COLUMNS[::-1])
    assert digest(swapped) != digest(wanted)  # the negative control


def test_splits_and_slices(stored, tiny_base):
    tokenizer: Any = tiny_base.tokenizer
    whole = read_examples(stored["disk"], tokenizer, 64, COLUMNS)
    for name in ("splits", "files"):
        held_out = read_examples(f"{stored[name]}@validation", tokenizer, 64, COLUMNS)
        assert digest(held_out) == digest(whole[:3])
        with pytest.raises(LordbaError, match=r"nope.*train.*validation"):
            read_examples(f"{stored[name]}@nope", tokenizer, 64, COLUMNS)
    assert digest(read_examples(f"{stored['rows.parquet']}@train[2:5]", tokenizer, 64, COLUMNS)) == digest(whole[2:5])
    one = read_examples(stored["rows.parquet"], tokenizer, 64, ("question",))
    assert tokenizer.decode(one[0].ids) == QUESTIONS[0] + "</s>" and torch.equal(one[0].ids, one[0].labels)


def test_names_of_the_hub():
    assert Source.parse("org/name") == Source("org/name")
    assert Source.parse("org/name:main@train[:10%]") == Source("org/name", "main", "train[:10%]")
    assert Source.parse("org/name@test").split == "test"


def test_a_path_that_exists_is_no_name(tmp_path):
    (odd := tmp_path / "a:b@c.parquet").touch()
    assert Source.parse(str(odd)) == Source(str(odd))


def test_the_command_learns_from_a_data_set(stored, tiny_folder, tmp_path, monkeypatch):
    words = ["--model", tiny_folder, "--data", stored["splits"], "--eval-data", f"{stored['splits']}@validation"]
    words += ["--columns", "question,answer", "--output", tmp_path / "out", "--rank", 4, "--lr", 0.01]
    words += ["--dtype", "float32", "--steps", 12, "--batch-size", 4, "--max-length", 64]
    monkeypatch.setattr(sys, "argv", ["train", *map(str, words)])
    train.main()
    report = json.loads((tmp_path / "out" / train.REPORT_NAME).read_text())
    assert report["losses"]["packed"] < report["losses"]["start"] - 0.1
    monkeypatch.setattr(sys, "argv", ["train", *map(str, words), "--eval-data", str(stored["splits"])])
    with pytest.raises(LordbaError, match="was made with eval_data"):
        train.main()


def test_mistakes_are_named(stored, tiny_base, tmp_path, monkeypatch):
    def read(source: object, columns: tuple[str, ...] | None = None) -> None:
        read_examples(str(source), tiny_base.tokenizer, 64, columns)

    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    (tmp_path / "empty").mkdir()
    for source, columns, said in [
        (stored["disk"], None, "no column 'prompt', it has question, answer, id"),
        (stored["rows.parquet"], ("question", "reply"), "no column 'reply'"),
        (stored["disk"], ("id",), "row 0.*with strings"),
        (stored["rows.jsonl"], None, "expected"),
        (tmp_path / "none.parquet", None, "no such file"),
        ("/no/where", None, "no such file"),
        (tmp_path / "broken.parquet", None, "cannot be loaded"),
        (tmp_path / "empty", None, "cannot be loaded"),
    ]:
        with pytest.raises(LordbaError, match=said):
            read(source, columns)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(LordbaError, match="needs the network"):
        read("nobody/nothing")


def test_without_the_library(tiny_base, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "rows.parquet").touch()
    with pytest.raises(LordbaError, match=r"pip install .lordba.data."):
        read_examples(tmp_path / "rows.parquet", tiny_base.tokenizer, 64)
