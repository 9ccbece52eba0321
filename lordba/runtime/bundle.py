"""A bundle: a folder with the program, its adapters, the tokenizer, and `manifest.json`, which is checked first."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lordba.errors import LordbaError
from lordba.files import new_file, sha256_of

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
COMPARISON_MODES = ("none", "lora-fp32", "lora-fp16")
"""Adapter modes of programs to compare with: the base alone, or one dense LoRA that is always on."""


@dataclass(frozen=True)
class BundleFile:
    """A file of the bundle, relative to its folder."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class BundleAdapter:
    """An adapter of the bundle: `bytes` are signs and scales as stored, `file_bytes` the runtime's file.

    An adapter that is a function of the program has the program as its file; `file_bytes` is what it adds to it.
    """

    name: str
    file: str
    r: int
    scale_code: str
    modules: int
    bytes: int
    fp16_lora_bytes: int
    file_bytes: int
    function: str | None = None
    """The program's function that holds this adapter, where adapters are functions."""


@dataclass(frozen=True)
class ParityCheck:
    """One measured figure with its limit; `adapter` is None for the base alone or for the whole program."""

    check: str
    adapter: str | None
    metric: str
    value: float
    limit: float
    passed: bool


@dataclass(frozen=True)
class Manifest:
    """What manifest.json says (format version 1); keys are fixed, further ones may be added."""

    target: str
    program: str
    base: dict[str, str]
    base_quant: str
    toolchain: dict[str, str]
    requires: list[str]
    adapter_mode: str
    max_seq_len: int
    eos_ids: list[int]
    modules: list[str | None]
    """Paths of the adapted modules in the order of the program's blob; None stands for a layer never adapted."""
    files: list[BundleFile] = field(default_factory=list)
    adapters: list[BundleAdapter] = field(default_factory=list)
    parity: list[ParityCheck] = field(default_factory=list)
    tokenizer: str | None = None
    no_adapter: str | None = None
    """The file that stands for "no adapter", where the program needs one."""
    training: dict[str, Any] | None = None
    """What trains adapters for this bundle: program, form, max_seq_len, requires; None if it cannot train."""
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True)
class Bundle:
    """A bundle that was found complete and undamaged."""

    folder: Path
    manifest: Manifest

    @property
    def program(self) -> Path:
        return self.folder / self.manifest.program

    def adapter_file(self, name: str | None) -> Path | None:
        """The runtime's file of an adapter; None means the base alone, which may need a file too."""
        if name is None:
            return self.folder / self.manifest.no_adapter if self.manifest.no_adapter else None
        return self.folder / self.adapter(name).file

    def adapter(self, name: str) -> BundleAdapter:
        """What the manifest says of an adapter."""
        for adapter in self.manifest.adapters:
            if adapter.name == name:
                return adapter
        known = ", ".join([*(a.name for a in self.manifest.adapters), "none"])
        raise LordbaError(f"{self.folder}: holds no adapter {name!r}; it holds {known}")


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json into a bundle that is being made, with the size and hash of every file in it."""
    files = [
        BundleFile(str(path.relative_to(folder)), path.stat().st_size, sha256_of(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST_NAME
    ]
    record = asdict(manifest) | {"files": [asdict(file) for file in files]}
    _write_record(folder, record if manifest.training else {key: record[key] for key in record if key != "training"})


def change_adapters(bundle: Bundle, adapters: Sequence[BundleAdapter], files: Sequence[BundleFile]) -> Bundle:
    """Give a bundle other adapters and files by a new manifest, in one step; what else it says stays."""
    record = json.loads((bundle.folder / MANIFEST_NAME).read_text())
    changes = {"adapters": [asdict(adapter) for adapter in adapters], "files": [asdict(file) for file in files]}
    _write_record(bundle.folder, record | changes)
    return Bundle(bundle.folder, replace(bundle.manifest, adapters=list(adapters), files=list(files)))


def is_adapter_name(name: str) -> bool:
    """Whether an adapter may be called so: it does as a file's name, and does not stand for the base alone."""
    return name != "none" and name[0:1].isalnum() and name.translate(str.maketrans("-_.", "aaa")).isalnum()


def _write_record(folder: Path, record: dict[str, Any]) -> None:
    with new_file(folder / MANIFEST_NAME) as path:
        path.write_text(json.dumps(record, indent=2) + "\n")


def read_bundle(folder: Path, target: str | None = None) -> Bundle:
    """Read a bundle and check every file of it before anything runs."""
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise LordbaError(f"{path}: not found; a bundle is made by: python -m lordba.export --output {folder}")
    try:
        record = json.loads(path.read_text())
        version = record["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise LordbaError(f"{path}: is not a readable manifest ({error!r}); export the bundle again") from error
    if version != FORMAT_VERSION:
        raise LordbaError(
            f"{path}: format_version {version!r} is not known here (this lordba reads {FORMAT_VERSION}); "
            "install a newer lordba or export the bundle again"
        )
    try:
        known = {name: record[name] for name in Manifest.__dataclass_fields__ if name != "training"}
        training = record.get("training")
        manifest = Manifest(
            **known
            | {
                "training": None if training is None else {**training, "program": str(training["program"])},
                "files": [BundleFile(**f) for f in record["files"]],
                "adapters": [BundleAdapter(**a) for a in record["adapters"]],
                "parity": [ParityCheck(**p) for p in record["parity"]],
            }
        )
    except (KeyError, TypeError) as error:
        raise LordbaError(f"{path}: lacks or misspells a key ({error}); export the bundle again") from error
    if target and manifest.target != target:
        raise LordbaError(
            f"{path}: the bundle is for {manifest.target}, not for {target}; export it with --target {target}"
        )
    trains = manifest.training["program"] if manifest.training else None
    used = [manifest.program, manifest.tokenizer, manifest.no_adapter, trains, *(a.file for a in manifest.adapters)]
    listed = {str(part) for file in manifest.files for part in (Path(file.path), *Path(file.path).parents)}
    if unlisted := {name for name in used if name} - listed:
        raise LordbaError(f"{path}: uses {min(unlisted)}, which its files do not list; export the bundle again")
    for file in manifest.files:
        _check_file(folder, file)
    return Bundle(folder, manifest)


def _check_file(folder: Path, file: BundleFile) -> None:
    path = folder / file.path
    if folder.resolve() not in path.resolve().parents:
        raise LordbaError(f"{folder / MANIFEST_NAME}: names a file outside the bundle: {file.path}")
    if not path.is_file():
        raise LordbaError(f"{path}: is missing although the manifest lists it; copy or export the bundle again")
    found = path.stat().st_size
    if found != file.bytes:
        raise LordbaError(f"{path}: expected {file.bytes} bytes, found {found}; copy or export the bundle again")
    if sha256_of(path) != file.sha256:
        raise LordbaError(f"{path}: its contents do not match the manifest's sha256; copy or export the bundle again")
