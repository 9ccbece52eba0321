"""LoRDBA: LoRA adapters of packed signs, from PyTorch to phones (arXiv 2605.24058)."""

from pathlib import Path

from lordba.adapter import Adapter, SignModule, load_adapter, save_adapter
from lordba.errors import LordbaError
from lordba.layers import LordbaLinear, attach, detach
from lordba.scales import ScaleCode

# In a checkout, export/ and backends/ lie beside this folder; installed, they lie inside it.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "pyproject.toml").is_file() and (_checkout / "export" / "__main__.py").is_file():
    __path__.append(str(_checkout))

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
