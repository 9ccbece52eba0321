"""LoRDBA: LoRA adapters of packed signs, from PyTorch to phones (arXiv 2605.24058)."""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lordba.errors import LordbaError

if TYPE_CHECKING:
    from lordba.adapter import Adapter, SignModule, load_adapter, save_adapter
    from lordba.layers import LordbaLinear, attach, detach
    from lordba.runtime.bank import AdapterBank
    from lordba.scales import ScaleCode
    from lordba.training.packing import pack
    from lordba.training.tuner import LordbaConfig, start_from

# In a checkout, export/ and backends/ lie beside this folder; installed, they lie inside it.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "pyproject.toml").is_file() and (_checkout / "export" / "__main__.py").is_file():
    __path__.append(str(_checkout))

__version__ = "0.1.0"
__all__ = [
    "Adapter",
    "AdapterBank",
    "LordbaConfig",
    "LordbaError",
    "LordbaLinear",
    "ScaleCode",
    "SignModule",
    "attach",
    "detach",
    "load_adapter",
    "pack",
    "save_adapter",
    "start_from",
]
_LATE = {
    "Adapter": "lordba.adapter",
    "SignModule": "lordba.adapter",
    "load_adapter": "lordba.adapter",
    "save_adapter": "lordba.adapter",
    "LordbaLinear": "lordba.layers",
    "attach": "lordba.layers",
    "detach": "lordba.layers",
    "ScaleCode": "lordba.scales",
    "AdapterBank": "lordba.runtime.bank",
    "LordbaConfig": "lordba.training.tuner",
    "start_from": "lordba.training.tuner",
    "pack": "lordba.training.packing",
}


def __getattr__(name: str) -> Any:
    """The names whose modules are imported with their first use: training on a device needs no PyTorch, nor PEFT."""
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LATE[name]), name)
