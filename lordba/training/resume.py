"""Whether an interrupted run may go on, here and on a device."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lordba.errors import LordbaError


def check_same_run(checkpoint: Path, made_with: Mapping[str, Any], now: Mapping[str, Any], fresh_start: str) -> None:
    """Refuse a checkpoint of a run that something else decided; `fresh_start` says how to begin anew."""
    for key in sorted(made_with.keys() | now.keys()):
        was, found = made_with.get(key), now.get(key)
        if was != found:
            raise LordbaError(
                f"{checkpoint}: was made with {key} = {was!r}, now it is {found!r}; repeat the command as it was, "
                f"name another --output, or {fresh_start}"
            )
