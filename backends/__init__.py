"""What runs on the device: kernels in C, and their registration with each runtime."""

import contextlib
import importlib.metadata
from collections.abc import Iterable
from pathlib import Path

from lordba.errors import LordbaError


def built_library(name: str, folders: Iterable[str]) -> Path:
    """The native library that pip built for a package here, whose path is `folders`; LordbaError if there is none.

    Imported from a checkout, by an editable install or because Python ran in it, the package's sources lie apart from
    the library: it is looked for where the package was imported from, then among the installed files.
    """
    for folder in folders:
        if (path := Path(folder) / name).is_file():
            return path
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for file in importlib.metadata.files("lordba") or []:
            if file.name == name and (path := Path(str(file.locate()))).is_file():
                return path
    raise LordbaError(
        f"{name} is not built: lordba was imported from its sources; build it with: pip install -e . "
        "(or pip install .), which needs a C/C++ compiler"
    )
