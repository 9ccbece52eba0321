"""Core ML's protobuf classes (FeatureTypes_pb2, MIL_pb2, Model_pb2), which coremltools brings along."""

import functools
import logging
from types import ModuleType

from lordba.errors import LordbaError


@functools.cache
def proto() -> ModuleType:
    """The module coremltools.proto, imported without coremltools' remarks on versions and on what only macOS has."""
    loggers = [logging.getLogger(name) for name in ("coremltools", "torchao")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        from coremltools import proto
        from coremltools.proto import FeatureTypes_pb2, MIL_pb2, Model_pb2  # noqa: F401 (makes them attributes)
    except ImportError as error:
        raise LordbaError(
            f"Core ML packages are read with coremltools, which cannot be imported ({error}): "
            "pip install 'lordba[coreml]'"
        ) from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
    return proto
