"""Lowering to Core ML: torch.export, coremltools, functions of one package that share the base's weights."""

import contextlib
import logging
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from lordba.errors import LordbaError

from .coreml_decoder import CoremlDecoder

EXAMPLE_LENGTH = 8


@dataclass(frozen=True)
class CoremlOptions:
    """How a program is to be, beside what its decoder is; `ios` 16, 17 or 18."""

    ios: int = 18
    sign_storage: str = "lut1"
    as_inputs: bool = False


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep coremltools' remarks on versions and its progress bars off the screen."""
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    from coremltools.converters.mil.frontend.torch import ops
    from coremltools.converters.mil.mil.passes import pass_pipeline

    def without_bar(items: Iterable[Any], **_: object) -> Iterable[Any]:
        return items

    with (
        warnings.catch_warnings(),
        patch.object(ops, "_tqdm", without_bar),
        patch.object(pass_pipeline, "tqdm", without_bar),
    ):
        warnings.simplefilter("ignore")
        yield


def export_program(decoder: CoremlDecoder, as_inputs: bool) -> torch.export.ExportedProgram:
    """The decoder, with what it has in use, as torch.export sees it; T is dynamic."""
    kwargs: dict[str, Any] = {"tokens": torch.zeros(1, EXAMPLE_LENGTH, dtype=torch.int32)}
    dynamic: dict[str, Any] = {"tokens": {1: torch.export.Dim("length", min=1, max=decoder.max_seq_len)}}
    if decoder.caches is not None:
        kwargs["start"] = torch.zeros(1, dtype=torch.int32)
        dynamic["start"] = None
    if as_inputs:
        kwargs["adapter"] = {name: torch.zeros(shape) for name, shape in decoder.adapter_inputs.shapes.items()}
        dynamic["adapter"] = dict.fromkeys(kwargs["adapter"])
    with torch.no_grad():
        try:
            program = torch.export.export(decoder, (), kwargs, dynamic_shapes=dynamic, strict=False)
        except LordbaError:
            raise
        except Exception as error:  # torch.export raises what the model's own code and its guards raise
            raise LordbaError(
                f"the model cannot be captured by torch.export for Core ML "
                f"({type(error).__name__}: {error!s:.200}); this architecture is not supported"
            ) from error
        return program.run_decompositions({})


def convert(decoder: CoremlDecoder, options: CoremlOptions) -> Any:
    """The decoder, with the adapter that it has in use, as a coremltools MLModel of one function, `main`."""
    with quiet():
        import coremltools as ct

        from .coreml_lowering import sign_storage

        half = decoder.precision == "fp16"
        real = np.float16 if half else np.float32
        length = ct.RangeDim(1, decoder.max_seq_len, default=EXAMPLE_LENGTH)
        inputs = [ct.TensorType("tokens", (1, length), dtype=np.int32)]
        if decoder.caches is not None:
            inputs.append(ct.TensorType("start", (1,), dtype=np.int32))
        if options.as_inputs:
            shapes = decoder.adapter_inputs.shapes
            inputs += [ct.TensorType(name, shape, dtype=real) for name, shape in shapes.items()]
        program = export_program(decoder, options.as_inputs)
        try:
            with sign_storage(options.sign_storage):
                return ct.convert(
                    program,
                    inputs=inputs,
                    outputs=[ct.TensorType("logits", dtype=np.float32)],
                    minimum_deployment_target=getattr(ct.target, f"iOS{options.ios}"),
                    compute_precision=ct.precision.FLOAT16 if half else ct.precision.FLOAT32,
                    skip_model_load=True,
                )
        except LordbaError:
            raise
        except Exception as error:  # coremltools' converters raise whatever they meet
            raise LordbaError(
                f"coremltools {ct.__version__} cannot convert this model ({type(error).__name__}: {error!s:.300}); "
                "this architecture is not supported by the Core ML target"
            ) from error
