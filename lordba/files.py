"""Writing without ever leaving something half-written: write to a temporary name beside the target, then rename."""

import contextlib
import hashlib
import importlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lordba.errors import LordbaError


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path; rename it to `path` if the block succeeds, remove it otherwise."""
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def check_new_folder(path: Path, *, replaceable_if: str) -> None:
    """Raise if `new_folder` could not put a folder there; for commands to call before minutes of work.

    An existing folder is replaced only if it is empty or holds the file `replaceable_if`, so that a mistyped
    output path never costs anybody's files.
    """
    if path.is_dir():
        if any(path.iterdir()) and not (path / replaceable_if).is_file():
            raise LordbaError(
                f"{path}: the output folder exists and holds no {replaceable_if}, so it is not one of ours to replace; "
                "name another folder or empty this one"
            )
    elif path.exists():
        raise LordbaError(f"{path}: the output must be a folder, but a file of that name exists; name another folder")
    existing = next(parent for parent in path.absolute().parents if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise LordbaError(f"{path}: cannot be written, for {existing} is no folder that you may write to; name another")


@contextlib.contextmanager
def new_folder(path: Path, *, replaceable_if: str) -> Iterator[Path]:
    """Yield a temporary folder; it takes the place of `path` if the block succeeds, and is removed otherwise."""
    check_new_folder(path, replaceable_if=replaceable_if)
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            yield temporary
            temporary.chmod(0o777 & ~_umask())
            if path.is_dir():
                old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
                path.replace(old)
                temporary.replace(path)
                shutil.rmtree(old)
            else:
                temporary.replace(path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def write_safetensors(path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """Write tensors of PyTorch, or NumPy's arrays without importing it, always as the same bytes.

    safetensors' own writer puts the metadata in random order; it also makes its files readable by their owner alone,
    and raises an error of its own when the disk is full.
    """
    kind = "numpy" if all(isinstance(tensor, np.ndarray) for tensor in tensors.values()) else "torch"
    raw = importlib.import_module(f"safetensors.{kind}").save(dict(tensors), dict(metadata))
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the data stays aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.write(memoryview(raw)[start:])


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def sha256_of(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LordbaError(
            f"{path}: cannot be written ({error.strerror or error}); name an output on a disk with room, "
            "in a folder that you may write to"
        ) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
