"""Our kernel for ONNX Runtime: `library()` is what `SessionOptions.register_custom_ops_library` takes."""

import ctypes
import functools
from pathlib import Path

from lordba.backends import built_library

_LIBRARY = "liblordba_onnxruntime.so"


@functools.cache
def library() -> Path:
    """The built library; raises LordbaError if there is none. LORDBA_ISA forces an instruction set."""
    return built_library(_LIBRARY, __path__)


def native_calls() -> int:
    """How often the kernel has run in this process."""
    loaded = ctypes.CDLL(str(library()))
    loaded.lordba_native_calls.restype = ctypes.c_uint64
    return loaded.lordba_native_calls()
