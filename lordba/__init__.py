"""LoRDBA: 1-bit LoRA adapters, from PyTorch to phones (arXiv 2605.24058)."""

from lordba.adapter import Adapter, SignModule, load_adapter, save_adapter
from lordba.errors import LordbaError
from lordba.layers import LordbaLinear, attach, detach
from lordba.scales import ScaleCode

__version__ = "0.1.0"
__all__ = [
    "Adapter",
    "LordbaError",
    "LordbaLinear",
    "ScaleCode",
    "SignModule",
    "attach",
    "detach",
    "load_adapter",
    "save_adapter",
]
