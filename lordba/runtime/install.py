"""Adapters that come to a bundle after its export, and leave it.

What counts is the manifest: renaming it into place is the one step in which an adapter appears or disappears. Its file
is written before under a name that nothing uses yet, and the file of one that left is deleted after.
"""

import contextlib
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from lordba.errors import LordbaError
from lordba.files import new_file, sha256_of
from lordba.runtime.bundle import Bundle, BundleAdapter, BundleFile, change_adapters, is_adapter_name

if TYPE_CHECKING:
    from torch import Tensor

    from lordba.adapter import Adapter

MAGIC = b"LORDBA\0\0"  # of a blob; this module works without PyTorch, which lordba.blob needs


class Installable(Protocol):
    """What the manifest says of an adapter: an Adapter, or one that was packed on a device."""

    @property
    def modules(self) -> Mapping[str, Any]: ...
    @property
    def scale_code(self) -> str: ...
    @property
    def base_model_name_or_path(self) -> str | None: ...
    @property
    def base_fingerprint(self) -> str | None: ...
    @property
    def r(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def fp16_lora_bytes(self) -> int: ...


Given = TypeVar("Given", bound=Installable)
Write = Callable[[Given, Path], None]
"""Writes an adapter as a program's runtime reads it, or raises LordbaError: see session.Runner."""


def install(bundle: Bundle, name: str, adapter: Given, write: Write[Given]) -> Bundle:
    """Add an adapter to a bundle, or replace the one of this name; returns the bundle as it is then.

    Raises LordbaError, and changes nothing, where the adapter is not one for this base and program.
    """
    _check(bundle, name, adapter)
    file = _unused_file(bundle, name)
    with new_file(bundle.folder / file) as path:
        write(adapter, path)
    path = bundle.folder / file
    entry = BundleAdapter(
        name=name,
        file=file,
        r=adapter.r,
        scale_code=str(adapter.scale_code),
        modules=len(adapter.modules),
        bytes=adapter.nbytes,
        fp16_lora_bytes=adapter.fp16_lora_bytes,
        file_bytes=path.stat().st_size,
    )
    try:
        return _changed(bundle, name, entry, BundleFile(file, entry.file_bytes, sha256_of(path)))
    except LordbaError:
        path.unlink()
        raise


def remove(bundle: Bundle, name: str) -> Bundle:
    """Take an adapter out of a bundle and delete its file; returns the bundle as it is then."""
    bundle.adapter(name)
    return _changed(bundle, name)


def _changed(bundle: Bundle, name: str, entry: BundleAdapter | None = None, file: BundleFile | None = None) -> Bundle:
    old = [adapter for adapter in bundle.manifest.adapters if adapter.name == name]
    adapters = [adapter for adapter in bundle.manifest.adapters if adapter.name != name]
    kept = {adapter.file for adapter in adapters}
    unused = [adapter.file for adapter in old if adapter.file not in kept]
    files = [listed for listed in bundle.manifest.files if listed.path not in unused]
    changed = change_adapters(bundle, [*adapters, *([entry] if entry else [])], [*files, *([file] if file else [])])
    for path in unused:
        with contextlib.suppress(OSError):  # nothing lists it any more: it only takes room
            (bundle.folder / path).unlink()
    return changed


def _check(bundle: Bundle, name: str, adapter: Installable) -> None:
    if not is_adapter_name(name):
        raise LordbaError(f"the adapter's name {name!r} is no usable file name; take letters, digits, - _ and .")
    expected = bundle.manifest.base["fingerprint"]
    if adapter.base_fingerprint not in (None, expected):
        raise LordbaError(
            f"adapter {name}: was made for the base {adapter.base_model_name_or_path} with fingerprint "
            f"{adapter.base_fingerprint}, but {bundle.folder} holds {bundle.manifest.base['name']} with {expected}; "
            "install it into a bundle of its own base"
        )
    if unknown := sorted(set(adapter.modules) - set(bundle.manifest.modules)):
        raise LordbaError(
            f"adapter {name}: adapts {unknown[0]}, for which the program of {bundle.folder} has no place; "
            "export a bundle with this adapter"
        )


def _unused_file(bundle: Bundle, name: str) -> str:
    folder = bundle.folder / "adapters"
    return next(f"adapters/{name}.{i}" for i in itertools.count(1) if not (folder / f"{name}.{i}").exists())


def write_blob(bundle: Bundle, adapter: "Adapter", path: Path) -> None:
    """An adapter as a program with blobs reads it; what install.Write is."""
    from lordba.blob import make_blob

    mode, modules = bundle.manifest.adapter_mode, bundle.manifest.modules
    arranged = [adapter.modules.get(module) if module else None for module in modules]
    if mode in ("input", "inputs"):
        path.write_bytes(make_blob(arranged).numpy().tobytes())
    elif mode == "ptd":
        # The data files of a program differ in the blob alone, which ends them and has one size.
        template = bundle.adapter_file(None)
        assert template is not None
        raw = template.read_bytes()
        start = raw.index(MAGIC)
        path.write_bytes(raw[:start] + make_blob(arranged, len(raw) - start).numpy().tobytes())
    else:
        raise LordbaError(
            f"{bundle.folder}: its adapters are {mode}, parts of its program, which only an export can change; "
            "export it with the adapters that you want"
        )
    _check_shapes(bundle, path)


def _check_shapes(bundle: Bundle, path: Path) -> None:
    """Refuse an adapter whose modules have other sizes than those of an adapter that came with the program."""
    blobs = [_blob_of(bundle.folder / adapter.file) for adapter in bundle.manifest.adapters]
    new = _blob_of(path)
    for i, module in enumerate(bundle.manifest.modules):
        found = _sizes(new, i)
        known = next((sizes for blob in blobs if (sizes := _sizes(blob, i))), None)
        if found and known and found != known:
            raise LordbaError(
                f"the adapter maps {found[0]} to {found[1]} channels in {module}, the program "
                f"{known[0]} to {known[1]}; it is for another model"
            )


def _blob_of(path: Path) -> "Tensor":
    import torch

    raw = path.read_bytes()
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=raw.index(MAGIC)).copy())


def _sizes(blob: "Tensor", index: int) -> tuple[int, int] | None:
    from lordba.blob import read_record

    record = read_record(blob, index)
    return (record.d_in, record.d_out) if record.r else None
