"""Runs LoRDBA programs in ExecuTorch: `load()` registers the native kernels with its runtime."""

import contextlib
import ctypes
import functools
import importlib.metadata
import os
from pathlib import Path

from lordba.errors import LordbaError

_LIBRARY = "liblordba_executorch.so"


@functools.cache
def load() -> str:
    """Register lordba's kernels with the ExecuTorch runtime of this process and return the instruction set they use.

    Repeated calls do nothing. The environment variable LORDBA_ISA (scalar, avx2, avx512, neon, i8mm)
    forces an instruction set.
    Raises LordbaError if the library was not built or the forced instruction set is not available here.
    """
    path = _find()
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise LordbaError(
            f"{path}: cannot be loaded ({error}); it was built for another executorch, "
            "install lordba again: pip install --force-reinstall --no-deps lordba"
        ) from error
    library.lordba_active_isa.restype = ctypes.c_char_p
    isa = library.lordba_active_isa()
    if isa is None:
        raise LordbaError(
            f"LORDBA_ISA={os.environ.get('LORDBA_ISA')}: this CPU or build has no such kernels; "
            "use scalar, avx2, avx512, neon or i8mm, or unset it to use the fastest"
        )
    return isa.decode()


def _find() -> Path:
    # Imported from a checkout, by an editable install or because Python ran in it, the package's sources lie apart
    # from the library that pip built: look where we were imported from, then among the installed files.
    for folder in __path__:
        if (path := Path(folder) / _LIBRARY).is_file():
            return path
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for file in importlib.metadata.files("lordba") or []:
            if file.name == _LIBRARY and (path := Path(str(file.locate()))).is_file():
                return path
    raise LordbaError(
        f"{_LIBRARY} is not built: lordba was imported from its sources; build it with: pip install -e . "
        "(or pip install .), which needs a C/C++ compiler"
    )
