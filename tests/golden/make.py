"""Writes the golden files beside it: `python tests/golden/make.py`. Run it only when the format version changes.

values.json says in plain numbers what the other files hold; the numbers come from the formulas here, with numpy alone.
"""

import json
from pathlib import Path

import numpy as np
import torch

from lordba.adapter import Adapter, SignModule, save_adapter
from lordba.blob import make_blob
from lordba.scales import ScaleCode, encode_scales
from lordba.signs import pack_signs

HERE = Path(__file__).parent
SHAPES = {"layers.0.proj": (13, 10, 3), "layers.1.proj": (8, 9, 17)}  # d_in, d_out, r: ragged, and r beyond two bytes


def meaning(scales: np.ndarray, code: str) -> np.ndarray:
    """What a reader must get back for scales written in a code, float32."""
    if code == "fp32":
        return scales.astype(np.float32)
    if code == "fp16":
        return scales.astype(np.float16).astype(np.float32)
    lo, hi = (np.float64(np.float16(f(scales[scales > 0]))) for f in (np.min, np.max))
    n = 15 if code == "log4" else 255
    steps = np.arange(n) / (n - 1)
    levels = lo * (hi / lo) ** steps if code == "log4" else lo + (hi - lo) * steps
    by = np.log if code == "log4" else np.asarray
    nearest = np.abs(by(np.maximum(scales, 1e-30))[:, None] - by(levels)).argmin(1)
    return np.where(scales > 0, levels[nearest], 0).astype(np.float32)


def main() -> None:
    values = {}
    for seed, (path, (d_in, d_out, r)) in enumerate(SHAPES.items(), start=3):
        a = [["-" if (i * i + seed * j * j + i * j) % 7 < 3 else "+" for j in range(d_in)] for i in range(r)]
        b = [["-" if (seed * i * i + j * j + i) % 5 < 2 else "+" for j in range(r)] for i in range(d_out)]
        scales = {n: (np.arange(k) * seed % 11) ** 1.5 / 16 for n, k in (("in", d_in), ("mid", r), ("out", d_out))}
        values[path] = {
            "d_in": d_in,
            "d_out": d_out,
            "r": r,
            "a": ["".join(row) for row in a],
            "b": ["".join(row) for row in b],
            "scales": {n: s.tolist() for n, s in scales.items()},
            "stored": {c.value: {n: meaning(s, c.value).tolist() for n, s in scales.items()} for c in ScaleCode},
        }
    (HERE / "values.json").write_text(json.dumps(values, indent=1) + "\n")
    for code in ScaleCode:
        modules = {path: module_of(value, code) for path, value in values.items()}
        save_adapter(Adapter(modules, code, "golden-base", "sha256:" + "0" * 64), HERE / f"adapter-{code.value}")
        (HERE / f"blob-{code.value}.bin").write_bytes(make_blob([*modules.values(), None]).numpy().tobytes())


def module_of(value: dict, code: ScaleCode) -> SignModule:
    """The module that an entry of values.json describes."""
    a, b = (torch.tensor([[{"+": 1.0, "-": -1.0}[c] for c in row] for row in value[key]]) for key in ("a", "b"))
    encoded = (encode_scales(torch.tensor(value["scales"][n], dtype=torch.float64), code) for n in ("in", "mid", "out"))
    return SignModule(pack_signs(a), pack_signs(b), *encoded)


if __name__ == "__main__":
    main()
