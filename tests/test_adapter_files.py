"""Adapter folders and blobs: golden bytes, an independent reader of them, and what is done to damaged ones."""

import json
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_module
from golden.make import module_of
from safetensors import safe_open
from safetensors.torch import load_file

from lordba.adapter import CONFIG_NAME, WEIGHTS_NAME, Adapter, SignModule, load_adapter, save_adapter
from lordba.blob import make_blob, read_module
from lordba.errors import LordbaError
from lordba.files import new_file, new_folder, write_safetensors
from lordba.scales import ScaleCode, decode_scales
from lordba.signs import unpack_signs

GOLDEN = Path(__file__).parent / "golden"
VALUES = json.loads((GOLDEN / "values.json").read_text())
P = "base_model.model.layers.0.proj"


# An independent reader: it knows docs/format.md and shares no code with the package.


def bits(raw: bytes, rows: int, columns: int) -> list[str]:
    width = -(-columns // 8)
    assert len(raw) == rows * width
    signs = ["".join("+-"[raw[i * width + j // 8] >> j % 8 & 1] for j in range(8 * width)) for i in range(rows)]
    assert all("-" not in row[columns:] for row in signs), "padding"
    return [row[:columns] for row in signs]


def level(code: int, lo: float, hi: float, kind: str) -> float:
    if code == 0:
        return 0.0
    return lo * (hi / lo) ** ((code - 1) / 14) if kind == "log4" else lo + (hi - lo) * (code - 1) / 254


def nibbles(raw: bytes, n: int) -> list[int]:
    return [raw[i // 2] >> 4 * (i % 2) & 15 for i in range(n)]


def read_folder(folder: Path) -> dict:
    """{path: {"a", "b", "in", "mid", "out"}} of an adapter folder."""
    kind = json.loads((folder / "adapter_config.json").read_text())["scale_code"]
    raw = (folder / "adapter_model.safetensors").read_bytes()
    (size,) = struct.unpack_from("<Q", raw)
    header = json.loads(raw[8 : 8 + size])
    metadata = header.pop("__metadata__")
    assert metadata["format"] == "lordba" and metadata["format_version"] == "1"

    def data(name: str) -> bytes:
        start, end = header[name]["data_offsets"]
        return raw[8 + size + start : 8 + size + end]

    def scales(name: str, n: int) -> list[float]:
        if kind in ("fp32", "fp16"):
            return list(struct.unpack(f"<{n}{'f' if kind == 'fp32' else 'e'}", data(name)))
        lo, hi = struct.unpack("<2e", data(name + ".range"))
        return [level(c, lo, hi, kind) for c in (nibbles(data(name), n) if kind == "log4" else data(name))]

    return {
        key.removeprefix("base_model.model."): {
            "a": bits(data(f"{key}.lordba_A.signs"), s["r"], s["d_in"]),
            "b": bits(data(f"{key}.lordba_B.signs"), s["d_out"], s["r"]),
            "in": scales(f"{key}.lordba_scale_in", s["d_in"]),
            "mid": scales(f"{key}.lordba_scale_mid", s["r"]),
            "out": scales(f"{key}.lordba_scale_out", s["d_out"]),
        }
        for key, s in json.loads(metadata["shapes"]).items()
    }


def read_blob(raw: bytes) -> list[dict | None]:
    """The same of a blob's modules, in order; None where there is no adapter."""
    magic, version, count, total, _ = struct.unpack_from("<8sIIQQ", raw)
    assert (magic, version, total) == (b"LORDBA\0\0", 1, len(raw))

    def scales(at: int, n: int, kind: int) -> list[float]:
        if kind < 2:
            return list(struct.unpack_from(f"<{n}{'fe'[kind]}", raw, at))
        if kind == 2:
            lo, step = struct.unpack_from("<2f", raw, at)
            return [lo + step * (c - 1) if c else 0.0 for c in raw[at + 8 : at + 8 + n]]
        table = struct.unpack_from("<16f", raw, at)
        return [table[c] for c in nibbles(raw[at + 64 :], n)]

    modules: list[dict | None] = []
    for i in range(count):
        r, d_in, d_out, kind, a, b, s_in, s_mid, s_out, _ = struct.unpack_from("<4I6Q", raw, 32 + 64 * i)
        assert not any(offset % 4 for offset in (a, b, s_in, s_mid, s_out))
        modules.append(
            {
                "a": bits(raw[a : a + r * -(-d_in // 8)], r, d_in),
                "b": bits(raw[b : b + d_out * -(-r // 8)], d_out, r),
                "in": scales(s_in, d_in, kind),
                "mid": scales(s_mid, r, kind),
                "out": scales(s_out, d_out, kind),
            }
            if r
            else None
        )
    return modules


def assert_holds(found: dict, value: dict, code: str) -> None:
    assert (found["a"], found["b"]) == (value["a"], value["b"])
    for name, expected in value["stored"][code].items():
        np.testing.assert_allclose(found[name], expected, rtol=3e-7, err_msg=name)


# Golden bytes


@pytest.mark.parametrize("code", [c.value for c in ScaleCode])
def test_golden_files_say_what_values_json_says(code):
    folder = read_folder(GOLDEN / f"adapter-{code}")
    blob = read_blob((GOLDEN / f"blob-{code}.bin").read_bytes())
    assert folder.keys() == VALUES.keys() and len(blob) == len(VALUES) + 1 and blob[-1] is None
    for (path, value), module in zip(VALUES.items(), blob[:-1], strict=True):
        assert_holds(folder[path], value, code)
        assert module is not None
        assert_holds(module, value, code)


@pytest.mark.parametrize("code", ScaleCode)
def test_the_package_writes_the_golden_bytes(code, tmp_path):
    modules = {path: module_of(value, code) for path, value in VALUES.items()}
    save_adapter(Adapter(modules, code, "golden-base", "sha256:" + "0" * 64), tmp_path / "out")
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        golden = GOLDEN / f"adapter-{code.value}" / name
        assert (tmp_path / "out" / name).read_bytes() == golden.read_bytes(), name
    blob = (GOLDEN / f"blob-{code.value}.bin").read_bytes()
    assert make_blob([*modules.values(), None]).numpy().tobytes() == blob


@pytest.mark.parametrize("code", ScaleCode)
def test_the_package_reads_the_golden_bytes(code):
    adapter = load_adapter(GOLDEN / f"adapter-{code.value}")
    blob = torch.frombuffer(bytearray((GOLDEN / f"blob-{code.value}.bin").read_bytes()), dtype=torch.uint8)
    assert (adapter.scale_code, adapter.base_model_name_or_path) == (code, "golden-base")
    assert read_module(blob, len(VALUES)) is None
    for i, (path, value) in enumerate(VALUES.items()):
        module = adapter.modules[path]
        assert (module.d_in, module.d_out, module.r) == (value["d_in"], value["d_out"], value["r"])
        in_blob = read_module(blob, i)
        assert in_blob is not None
        from_folder = (module.a_signs, module.b_signs, *(decode_scales(s) for s in module.scales))
        for packed, width, key in zip(from_folder[:2], (module.d_in, module.r), "ab", strict=True):
            rows = ["".join("+-"[int(x < 0)] for x in row) for row in unpack_signs(packed, width)]
            assert rows == value[key]
        for mine, theirs, name in zip(from_folder[2:], in_blob[2:], ("in", "mid", "out"), strict=True):
            np.testing.assert_allclose(mine, value["stored"][code.value][name], rtol=3e-7)
            np.testing.assert_allclose(theirs, mine, rtol=3e-7)
        assert torch.equal(in_blob[0], module.a_signs) and torch.equal(in_blob[1], module.b_signs)


def test_the_independent_reader_notices_one_flipped_bit():
    raw = bytearray((GOLDEN / "blob-log4.bin").read_bytes())
    (offset,) = struct.unpack_from("<Q", raw, 32 + 16)
    raw[offset] ^= 1
    with pytest.raises(AssertionError):
        assert_holds(read_blob(bytes(raw))[0] or {}, next(iter(VALUES.values())), "log4")


# Folders


def make_adapter(code: ScaleCode = ScaleCode.LOG4) -> Adapter:
    modules = {"layers.0.proj": random_module(13, 10, 3, code), "head": random_module(8, 24, 5, code, seed=1)}
    return Adapter(modules, code, "some/base", "sha256:abc", {"task_type": "CAUSAL_LM"})


def same(a: SignModule, b: SignModule) -> bool:
    pairs = [(a.a_signs, b.a_signs), (a.b_signs, b.b_signs)]
    pairs += [(x.values, y.values) for x, y in zip(a.scales, b.scales, strict=True)]
    return all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("code", ScaleCode)
def test_a_folder_gives_back_what_was_saved_byte_for_byte(code, tmp_path):
    adapter = make_adapter(code)
    save_adapter(adapter, tmp_path / "one")
    loaded = load_adapter(tmp_path / "one")
    assert all(same(loaded.modules[path], module) for path, module in adapter.modules.items())
    assert replace(loaded, modules={}) == replace(adapter, modules={})
    save_adapter(loaded, tmp_path / "two")
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    stored = load_file(tmp_path / "one" / WEIGHTS_NAME)
    assert adapter.nbytes == sum(t.nbytes for t in stored.values())
    weights = 3 * (13 + 10) + 5 * (8 + 24)
    assert adapter.bits_per_weight == 8 * adapter.nbytes / weights and adapter.fp16_lora_bytes == 2 * weights


def test_an_adapter_is_replaced_only_once_the_new_one_is_complete(tmp_path, monkeypatch):
    save_adapter(make_adapter(), tmp_path / "out")
    before = (tmp_path / "out" / WEIGHTS_NAME).read_bytes()

    def interrupted(path: Path, *_: object) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("lordba.adapter_folder.write_safetensors", interrupted)
        save_adapter(make_adapter(ScaleCode.FP32), tmp_path / "out")
    assert (tmp_path / "out" / WEIGHTS_NAME).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    save_adapter(make_adapter(ScaleCode.FP32), tmp_path / "out")
    assert load_adapter(tmp_path / "out").scale_code is ScaleCode.FP32
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_other_peoples_folders_and_files_are_not_replaced(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    (tmp_path / "file").touch()
    for name, complaint in (("photos", "not one of ours"), ("file", "must be a folder"), ("file/below", "file")):
        with pytest.raises(LordbaError, match=complaint):
            save_adapter(make_adapter(), tmp_path / name)
    assert (tmp_path / "photos" / "cat.jpg").exists()


def test_temporary_files_do_not_survive_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), new_file(tmp_path / "file") as path:
        path.write_text("half")
        _ = 1 / 0
    with pytest.raises(LordbaError, match="disk"), new_folder(tmp_path / "folder", replaceable_if="x"):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


# Damaged folders: (tensor, what is done to it, what the message must name)


def tamper(folder: Path, change) -> None:
    path = folder / WEIGHTS_NAME
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors, metadata)
    write_safetensors(path, tensors, metadata)


def put(name: str, function):
    def change(tensors: dict, _: dict) -> None:
        tensors[f"{P}.{name}"] = function(tensors.get(f"{P}.{name}"))

    return change


def shape_entry(**changes: object):
    def change(_: dict, metadata: dict) -> None:
        shapes = json.loads(metadata["shapes"])
        shapes[P] |= changes
        metadata["shapes"] = json.dumps(shapes)

    return change


def fill(value: float):
    def function(tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([tensor[:1], torch.full_like(tensor[1:], value)])

    return function


DAMAGE = {
    "signs of other rank": ("log4", put("lordba_A.signs", lambda t: t[:-1]), "lordba_A.signs"),
    "signs of other dtype": ("log4", put("lordba_B.signs", lambda t: t.int()), "lordba_B.signs.*torch.int32"),
    "padding bits": ("log4", put("lordba_A.signs", lambda t: t | 128), "lordba_A.signs.*padding"),
    "padding bits of B": ("log4", put("lordba_B.signs", lambda t: t | 128), "lordba_B.signs.*padding"),
    "short codes": ("log4", put("lordba_scale_out", lambda t: t[:-1]), "lordba_scale_out"),
    "float codes": ("int8", put("lordba_scale_in", lambda t: t.float()), "lordba_scale_in"),
    "range of zero": ("int8", put("lordba_scale_in.range", lambda t: t * 0), "lordba_scale_in.*lo=0"),
    "range of NaN": ("log4", put("lordba_scale_mid.range", fill(float("nan"))), "lordba_scale_mid.*nan"),
    "range of fp32": ("log4", put("lordba_scale_mid.range", lambda t: t.float()), "lordba_scale_mid.*fp16"),
    "NaN scale": ("fp32", put("lordba_scale_in", fill(float("nan"))), "lordba_scale_in.*finite"),
    "infinite scale": ("fp16", put("lordba_scale_out", fill(float("inf"))), "lordba_scale_out.*finite"),
    "negative scale": ("fp16", put("lordba_scale_mid", fill(-1.0)), "lordba_scale_mid.*negative"),
    "scales of fp32 in an fp16 file": ("fp16", put("lordba_scale_in", lambda t: t.float()), "lordba_scale_in"),
    "missing tensor": ("log4", lambda t, _: t.pop(f"{P}.lordba_scale_mid"), "lordba_scale_mid is missing"),
    "missing range": ("log4", lambda t, _: t.pop(f"{P}.lordba_scale_mid.range"), "lordba_scale_mid.range is missing"),
    "extra tensor": ("log4", put("lordba_C.signs", lambda _: torch.zeros(1)), "unexpected.*lordba_C.signs"),
    "other d_in": ("log4", shape_entry(d_in=21), "lordba_A.signs"),
    "other d_out": ("log4", shape_entry(d_out=11), "lordba_B.signs"),
    "negative rank": ("log4", shape_entry(r=-3), "shapes"),
    "no rank": ("log4", shape_entry(r=None), "shapes"),
    "a rank that is no integer": ("log4", shape_entry(r=3.0), "shapes"),
    "shapes that are no JSON": ("log4", lambda _, m: m.update(shapes="{"), "shapes"),
    "no shapes": ("log4", lambda _, m: m.pop("shapes"), "shapes"),
    "no modules": ("log4", lambda _, m: m.update(shapes="{}"), "no modules"),
    "newer weights": ("log4", lambda _, m: m.update(format_version="2"), "format_version=1"),
    "plain LoRA weights": ("log4", lambda _, m: m.update(format="pt"), "format=lordba"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_an_error_that_names_it(name, tmp_path):
    code, change, complaint = DAMAGE[name]
    save_adapter(make_adapter(ScaleCode(code)), tmp_path / "a")
    load_adapter(tmp_path / "a")
    tamper(tmp_path / "a", change)
    with pytest.raises(LordbaError, match=f"(?s)adapter_model.safetensors.*{complaint}"):
        load_adapter(tmp_path / "a")


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_truncated_file_is_an_error_that_names_it(keep, tmp_path):
    save_adapter(make_adapter(), tmp_path / "a")
    weights = tmp_path / "a" / WEIGHTS_NAME
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(LordbaError, match=r"adapter_model.safetensors: cannot be read"):
        load_adapter(tmp_path / "a")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"format_version": 2}, "format_version 2"),
        ({"format_version": None}, "format_version None"),
        ({"scale_code": "log3"}, "log3"),
        ({"peft_type": "LORA"}, r"python -m lordba\.convert"),
        ({"peft_type": "IA3"}, "IA3"),
    ],
    ids=str,
)
def test_another_configuration_is_an_error_that_names_it(changes, complaint, tmp_path):
    save_adapter(make_adapter(), tmp_path / "a")
    path = tmp_path / "a" / CONFIG_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(LordbaError, match=f"adapter_config.json.*{complaint}"):
        load_adapter(tmp_path / "a")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\xff"])
def test_an_unreadable_configuration_is_an_error(text, tmp_path):
    save_adapter(make_adapter(), tmp_path / "a")
    (tmp_path / "a" / CONFIG_NAME).write_bytes(text.encode("latin-1"))
    with pytest.raises(LordbaError, match=r"adapter_config.json"):
        load_adapter(tmp_path / "a")


@pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME])
def test_a_missing_file_is_an_error(name, tmp_path):
    save_adapter(make_adapter(), tmp_path / "a")
    (tmp_path / "a" / name).unlink()
    with pytest.raises(LordbaError, match=f"{name}: not found"):
        load_adapter(tmp_path / "a")


def test_a_damaged_blob_is_an_error():
    blob = make_blob([random_module(13, 10, 3)])
    for damaged, index, complaint in (
        (blob[:20], 0, "shorter than its header"),
        (blob[:-1], 0, "truncated"),
        (blob.flip(0), 0, "not an adapter blob"),
        (blob, 1, "holds 1 modules"),
    ):
        with pytest.raises(LordbaError, match=complaint):
            read_module(damaged, index)
    with pytest.raises(LordbaError, match="does not fit"):
        make_blob([random_module(13, 10, 3)], size=blob.numel() - 1)
