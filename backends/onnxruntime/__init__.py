"""Our kernel for ONNX Runtime: `library()` is what `SessionOptions.register_custom_ops_library` takes."""

import contextlib
import ctypes
import functools
import importlib.metadata
from pathlib import Path

from lordba.errors import LordbaError

_LIBRARY = "liblordba_onnxruntime.so"


@functools.cache
def library() -> Path:
    """The built library; raises LordbaError if there is none. LORDBA_ISA forces an instruction set."""
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


def native_calls() -> int:
    """How often the kernel has run in this process."""
    loaded = ctypes.CDLL(str(library()))
    loaded.lordba_native_calls.restype = ctypes.c_uint64
    return loaded.lordba_native_calls()
