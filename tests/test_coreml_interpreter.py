"""Reading and running saved Core ML packages: functions, states, precision, sizes, and files that are wrong."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mil_programs import ct, mb, save_functions, state, tensor, types

from lordba.backends.coreml.interpreter import Function, load
from lordba.backends.coreml.protobuf import proto
from lordba.errors import LordbaError

RNG = np.random.default_rng(0)
WEIGHTS = Path("Data/com.apple.CoreML/weights/weight.bin")
MODEL = Path("Data/com.apple.CoreML/model.mlmodel")


def add_row(x: Any, at: Any, cache: Any) -> Any:
    """A cache of 4 rows with x [1, 3] in place of row `at`, summed over the rows."""
    begin = mb.concat(values=[at, np.int32([0])], axis=0)
    end = mb.concat(values=[mb.add(x=at, y=np.int32([1])), np.int32([3])], axis=0)
    new = mb.slice_update(x=mb.read_state(input=cache), update=x, begin=begin, end=end)
    return mb.reduce_sum(x=mb.coreml_update_state(state=cache, value=new), axes=[0], name="total")


def sum_rows(cache: Any) -> Any:
    return mb.reduce_sum(x=mb.read_state(input=cache), axes=[0], name="total")


def test_states_last_from_run_to_run_and_functions_share_them(tmp_path: Path) -> None:
    inputs = {"x": tensor(1, 3, dtype=np.float16), "at": tensor(1, dtype=np.int32), "cache": state(4, 3)}
    path = save_functions(
        tmp_path / "m.mlpackage", {"add": (inputs, add_row), "sum": ({"cache": state(4, 3)}, sum_rows)}
    )
    package = load(path)
    assert package.functions == ("add", "sum") and package.default_function == "add"
    add, total = package.function("add"), package.function("sum")
    assert list(add.inputs) == ["x", "at"] and list(add.states) == ["cache"] and add.op_counts["write_state"] == 1
    first, second = add.new_state(), add.new_state()
    assert first is not None and second is not None
    rows = RNG.standard_normal((3, 1, 3)).astype(np.float16)
    for i, row in enumerate(rows):
        add.run({"x": row, "at": np.int32([i])}, first)
    np.testing.assert_array_equal(first.read("cache"), np.concatenate([*rows, np.zeros((1, 3))]))
    assert first.read("cache").dtype == np.float16
    np.testing.assert_array_equal(second.read("cache"), 0)
    second.write("cache", first.read("cache"))
    np.testing.assert_array_equal(total.run({}, first)["total"], total.run({}, second)["total"])
    with pytest.raises(LordbaError, match=r"function add: needs a state with cache, but was given none; .*new_state"):
        add.run({"x": rows[0], "at": np.int32([0])})
    with pytest.raises(LordbaError, match=r"the state cache takes float16 \[4, 3\], but was given float32 \[4, 3\]"):
        first.write("cache", np.zeros((4, 3), np.float32))


def test_functions_decode_what_they_share_once(tmp_path: Path) -> None:
    weight, own = RNG.standard_normal((2, 32, 32)).astype(np.float32)
    sharing = {
        "base": ({"x": tensor(1, 32)}, lambda x: mb.linear(x=x, weight=weight)),
        "north": ({"x": tensor(1, 32)}, lambda x: mb.linear(x=mb.linear(x=x, weight=own), weight=weight)),
    }
    for name, one in sharing.items():
        save_functions(tmp_path / f"{name}.mlpackage", {"main": one})
    both = ct.utils.MultiFunctionDescriptor()
    for name in sharing:
        both.add_function(str(tmp_path / f"{name}.mlpackage"), "main", name)
    both.default_function_name = "north"
    ct.utils.save_multifunction(both, str(tmp_path / "both.mlpackage"))
    package = load(tmp_path / "both.mlpackage")
    assert package.default_function == "north"
    x = RNG.standard_normal((1, 32)).astype(np.float32)
    for name, expected in (("base", x @ weight.T), ("north", x @ own.T @ weight.T)):
        np.testing.assert_allclose(*package.function(name).run({"x": x}).values(), expected, rtol=1e-5, atol=1e-5)
    values = {f: [c.value for c in package.function(f).constants() if c.value.shape == (32, 32)] for f in sharing}
    assert [any(value is shared for shared in values["base"]) for value in values["north"]].count(True) == 1
    with pytest.raises(LordbaError, match="has no function south, but base, north"):
        package.function("south")


def test_fp16_is_rounded_after_every_operation_unless_exact(tmp_path: Path) -> None:
    path = save_functions(
        tmp_path / "m.mlpackage",
        {"main": ({"x": tensor(64, dtype=np.float16)}, lambda x: mb.sub(x=mb.exp(x=x), y=mb.square(x=x)))},
    )
    x = RNG.standard_normal(64).astype(np.float16)
    (found,) = load(path).function().run({"x": x}).values()
    e, s = np.exp(x.astype(np.float32)).astype(np.float16), np.square(x.astype(np.float32)).astype(np.float16)
    np.testing.assert_array_equal(found, e - s)
    (exact,) = load(path, exact=True).function().run({"x": x}).values()
    double = x.astype(np.float64)
    np.testing.assert_array_equal(exact, (np.exp(double) - np.square(double)).astype(np.float16))
    assert found.dtype == exact.dtype == np.float16 and (found != exact).any()


def test_flexible_sizes(tmp_path: Path) -> None:
    def converted(shape: Any) -> Function:
        import torch

        model = torch.jit.trace(torch.nn.Softmax(-1), torch.zeros(1, 4))
        package = ct.convert(
            model,
            inputs=[ct.TensorType("x", shape, dtype=np.float32)],
            minimum_deployment_target=ct.target.iOS18,
            compute_precision=ct.precision.FLOAT32,
            skip_model_load=True,
        )
        package.save(str(tmp_path / "m.mlpackage"))
        return load(tmp_path / "m.mlpackage").function()

    ranged = converted((1, ct.RangeDim(2, 6, default=4)))
    assert ranged.inputs["x"].shape == (1, None) and next(iter(ranged.outputs.values())).shape == (1, None)
    for n in (2, 6):
        (found,) = ranged.run({"x": np.zeros((1, n), np.float32)}).values()
        np.testing.assert_allclose(found, np.full((1, n), 1 / n), rtol=1e-6)
    with pytest.raises(LordbaError, match=r"the input x takes float32 \[1, 2\.\.6\], but was given float32 \[1, 7\]"):
        ranged.run({"x": np.zeros((1, 7), np.float32)})
    listed = converted(ct.EnumeratedShapes([(1, 4), (1, 8)]))
    listed.run({"x": np.zeros((1, 8), np.float32)})
    with pytest.raises(LordbaError, match=r"takes float32 one of \(1, 4\), \(1, 8\), but was given float32 \[1, 5\]"):
        listed.run({"x": np.zeros((1, 5), np.float32)})


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """y = x by 16 x 24 signs; what the tests below break copies of."""
    bits = np.random.default_rng(1).integers(0, 2, (16, 24)).astype(np.uint8)

    def build(x: Any) -> Any:
        lut = np.float32([-1, 1]).reshape(1, 1, 2, 1)
        signs = mb.constexpr_lut_to_dense(indices=bits.astype(types.np_uint1_dtype), lut=lut)
        return mb.linear(x=x, weight=signs, bias=np.arange(16, dtype=np.float32), name="y")

    return save_functions(tmp_path_factory.mktemp("good") / "m.mlpackage", {"main": ({"x": tensor(2, 24)}, build)})


@pytest.fixture
def copy(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "m.mlpackage"))


X = np.random.default_rng(2).standard_normal((2, 24)).astype(np.float32)


def test_one_flipped_sign_is_seen_in_the_codes_and_in_the_result(good: Path, copy: Path) -> None:
    weights = bytearray((copy / WEIGHTS).read_bytes())
    signs = next(c for c in load(good).function().constants() if c.op == "constexpr_lut_to_dense").codes["indices"]
    begin = weights.index(np.packbits(signs.reshape(-1), bitorder="little").tobytes())
    weights[begin + 7] ^= 1 << 3
    (copy / WEIGHTS).write_bytes(weights)
    before, after = load(good).function(), load(copy).function()
    flipped = next(c for c in after.constants() if c.op == "constexpr_lut_to_dense").codes["indices"]
    assert np.argwhere(flipped != signs).tolist() == [[59 // 24, 59 % 24]]
    difference = after.run({"x": X})["y"] != before.run({"x": X})["y"]
    assert difference[:, 59 // 24].all() and difference.sum() == 2


@pytest.mark.parametrize(
    "inputs, message",
    [
        ({}, "takes the inputs x, but was given none"),
        ({"z": X}, "takes the inputs x, but was given z"),
        ({"x": X, "z": X}, "takes the inputs x, but was given x, z"),
        ({"x": X[:1]}, r"the input x takes float32 \[2, 24\], but was given float32 \[1, 24\]"),
        ({"x": X.astype(np.float64)}, r"takes float32 \[2, 24\], but was given float64"),
        ({"x": X.tolist()}, "takes an array, .* not a list"),
    ],
)
def test_wrong_inputs_are_explained(good: Path, inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(LordbaError, match=message):
        load(good).function().run(inputs)


def rewrite(package: Path, change: Callable[[Any], object]) -> None:
    """Change the model of a package as a protobuf."""
    from coremltools.proto import Model_pb2

    model = Model_pb2.Model.FromString((package / MODEL).read_bytes())
    change(model)
    (package / MODEL).write_bytes(model.SerializeToString())


def operations(model: Any, op: str) -> list[Any]:
    function = model.mlProgram.functions["main"]
    return [one for one in function.block_specializations[function.opset].operations if one.type == op]


def table(model: Any) -> Any:
    """The operation that decodes the signs."""
    return operations(model, "constexpr_lut_to_dense")[0]


def indices_of(model: Any) -> Any:
    """The value that it reads from the weight file."""
    return table(model).inputs["indices"].arguments[0].value


def truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def rename_model(package: Path) -> None:
    manifest = json.loads((package / "Manifest.json").read_text())
    manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"] = "../../outside.mlmodel"
    (package / "Manifest.json").write_text(json.dumps(manifest))


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (lambda p: (p / "Manifest.json").unlink(), "is no Core ML package"),
    "manifest is no JSON": (lambda p: (p / "Manifest.json").write_text("{"), "is no Core ML package"),
    "model outside": (rename_model, "which is not in the package"),
    "model is noise": (lambda p: (p / MODEL).write_bytes(b"\xff" * 99), "cannot be read as a model"),
    "model is empty": (lambda p: (p / MODEL).write_bytes(b""), "is no ML program"),
    "no weights": (lambda p: (p / WEIGHTS).unlink(), "weight.bin: cannot be read"),
    "weights are empty": (lambda p: (p / WEIGHTS).write_bytes(b""), "weight.bin: cannot be read"),
    "header cut off": (lambda p: truncate(p / WEIGHTS, 20), "is no weight file of version 2"),
    "metadata cut off": (lambda p: truncate(p / WEIGHTS, 100), "has no metadata"),
    "data cut off": (lambda p: truncate(p / WEIGHTS, 130), "it is truncated"),
    "another offset": (
        lambda p: rewrite(p, lambda m: setattr(indices_of(m).blobFileValue, "offset", 128)),
        "has no metadata",
    ),
    "another type": (
        lambda p: rewrite(p, lambda m: setattr(indices_of(m).type.tensorType, "dataType", 10)),
        "but the program declares FLOAT16",
    ),
    "another shape": (
        lambda p: rewrite(p, lambda m: setattr(indices_of(m).type.tensorType.dimensions[0].constant, "size", 17)),
        r"has 48 bytes, but its shape \(17, 24\) takes 51",
    ),
    "weights outside": (
        lambda p: rewrite(p, lambda m: setattr(indices_of(m).blobFileValue, "fileName", "@model_path/../../x")),
        "outside of the package",
    ),
    "unknown operations": (
        lambda p: rewrite(p, lambda m: setattr(operations(m, "linear")[0], "type", "conv_of_tomorrow")),
        r"function main: uses operations .* know: conv_of_tomorrow \(output y\)",
    ),
    "unknown parameter": (
        lambda p: rewrite(p, lambda m: operations(m, "linear")[0].inputs["z"].arguments.add().__setattr__("name", "x")),
        r"function main: linear \(output y\) of .*unexpected keyword argument 'z'",
    ),
    "unknown constant": (
        lambda p: rewrite(p, lambda m: setattr(table(m).inputs["indices"].arguments[0], "name", "w")),
        r"function main: constexpr_lut_to_dense \(output .*\): 'w'",
    ),
    "immediate cut off": (
        lambda p: rewrite(
            p,
            lambda m: setattr(
                table(m).inputs["lut"].arguments[0].value.type.tensorType.dimensions[2].constant, "size", 4
            ),
        ),
        r"constexpr_lut_to_dense .*: an immediate value should have 4 elements and has 2",
    ),
    "no output": (
        lambda p: rewrite(p, lambda m: table(m).outputs.pop()),
        "constexpr_lut_to_dense .*: not enough values",
    ),
    "unknown value": (
        lambda p: rewrite(p, lambda m: setattr(operations(m, "linear")[0].inputs["x"].arguments[0], "name", "w")),
        "linear needs w, which nothing makes",
    ),
    "unknown output": (
        lambda p: rewrite(p, lambda m: setattr(m.description.output[0], "name", "w")),
        "describes w, which the program has not",
    ),
    "another output type": (
        lambda p: rewrite(p, lambda m: setattr(operations(m, "linear")[0].outputs[0].type.tensorType, "dataType", 10)),
        "describes y as float32, the program as FLOAT16",
    ),
    "another output shape": (
        lambda p: rewrite(
            p,
            lambda m: setattr(operations(m, "linear")[0].outputs[0].type.tensorType.dimensions[1].constant, "size", 9),
        ),
        r"linear \(output y\) of .*: gives float32 \[2, 16\], but is declared FLOAT32 \[2, 9\]",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_packages_are_explained(copy: Path, what: str) -> None:
    load(copy).function().run({"x": X})  # it was whole
    change, message = BROKEN[what]
    change(copy)
    with pytest.raises(LordbaError, match=message):
        load(copy).function().run({"x": X})


def test_a_missing_coremltools_is_explained(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "coremltools", None)
    proto.cache_clear()
    with pytest.raises(LordbaError, match=r"pip install 'lordba\[coreml\]'"):
        load(good)
