"""Runs LoRDBA programs in ExecuTorch: `load()` registers the native kernels with its runtime."""

import ctypes
import functools
import os

from lordba.backends import built_library
from lordba.errors import LordbaError

LIBRARY = "liblordba_executorch.so"


@functools.cache
def library() -> ctypes.CDLL:
    """The native library, which registers lordba's kernels with the ExecuTorch runtime of this process as it loads.

    Raises LordbaError if it was not built.
    """
    path = built_library(LIBRARY, __path__)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise LordbaError(
            f"{path}: cannot be loaded ({error}); it was built for another executorch, "
            "install lordba again: pip install --force-reinstall --no-deps lordba"
        ) from error


@functools.cache
def load() -> str:
    """Register lordba's kernels with the ExecuTorch runtime of this process and return the instruction set they use.

    Repeated calls do nothing. The environment variable LORDBA_ISA (scalar, avx2, avx512, neon, i8mm)
    forces an instruction set.
    Raises LordbaError if the library was not built or the forced instruction set is not available here.
    """
    active = library().lordba_active_isa
    active.restype = ctypes.c_char_p
    isa = active()
    if isa is None:
        raise LordbaError(
            f"LORDBA_ISA={os.environ.get('LORDBA_ISA')}: this CPU or build has no such kernels; "
            "use scalar, avx2, avx512, neon or i8mm, or unset it to use the fastest"
        )
    return isa.decode()
