"""Hugging Face data sets as training records: a hub id, a saved folder, or a file, read by the `datasets` library."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lordba.errors import LordbaError

FORMATS = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv", ".tsv": "csv", ".json": "json"}
SAVED = ("dataset_info.json", "dataset_dict.json")
_NAME = re.compile(r"(?P<path>[^@]+?)(:(?P<subset>[^@:/]+))?(@(?P<split>.+))?")


@dataclass(frozen=True)
class Source:
    """Where records come from: PATH[:SUBSET][@SPLIT], the path a local one or a hub id like org/name."""

    path: str
    subset: str | None = None
    split: str = "train"

    @staticmethod
    def parse(text: str) -> "Source":
        """A path that exists is taken as it is, whatever characters it holds."""
        match = _NAME.fullmatch(text)
        if Path(text).exists() or match is None:
            return Source(text)
        return Source(match["path"], match["subset"], match["split"] or "train")

    def __str__(self) -> str:
        subset = f":{self.subset}" if self.subset else ""
        return f"{self.path}{subset}@{self.split}"


def read_records(source: Source, columns: tuple[str, ...] | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, record) of every row: {"text"}, or {"prompt", "completion"}; `columns` names these one or two columns.

    Without `columns` the data set must have columns of these names. The network is used only for a hub id.
    """
    data = _load(source)
    found = tuple(data.column_names)
    wanted = columns or (("text",) if "text" in found else ("prompt", "completion"))
    if missing := [name for name in wanted if name not in found]:
        raise LordbaError(
            f"{source}: has no column {missing[0]!r}, it has {', '.join(found)}; name the text's column, or those of "
            "prompt and completion, with --columns"
        )
    names = ("text",) if len(wanted) == 1 else ("prompt", "completion")
    for n, row in enumerate(data.select_columns(list(wanted))):
        yield f"{source}, row {n}", {name: row[column] for name, column in zip(names, wanted, strict=True)}


def _load(source: Source) -> Any:
    """The rows of a split."""
    path = Path(source.path)
    local = path.exists()
    if not local and (path.is_absolute() or source.path.count("/") != 1 or path.suffix in FORMATS):
        raise LordbaError(f"{source.path}: no such file or folder; give one, or a hub id like org/name")
    try:
        import datasets
    except ImportError as error:
        raise LordbaError(
            f"{source.path}: data sets need a library that cannot be imported ({error}): pip install 'lordba[data]'; "
            "or give a .txt or .jsonl file, which need none"
        ) from error
    datasets.disable_progress_bars()
    options = {"name": source.subset, "split": source.split}
    try:
        if path.is_file():
            if path.suffix not in FORMATS:
                raise LordbaError(f"{path}: is none of .txt, .jsonl, {', '.join(FORMATS)}")
            separator = {"sep": "\t"} if path.suffix == ".tsv" else {}
            return datasets.load_dataset(FORMATS[path.suffix], data_files=str(path), split=source.split, **separator)
        if local and any((path / name).is_file() for name in SAVED):
            saved = datasets.load_from_disk(str(path))
            if isinstance(saved, datasets.Dataset):
                return saved
            if source.split not in saved:
                raise LordbaError(f"{path}: has no split {source.split!r}, it has {', '.join(saved)}; name one: @SPLIT")
            return saved[source.split]
        return datasets.load_dataset(source.path, **options)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        hint = "" if local else "; a hub id needs the network, or a copy that an earlier run left in the cache"
        raise LordbaError(f"{source}: cannot be loaded as a data set ({error}){hint}") from error
