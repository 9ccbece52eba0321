"""`ai.lordba::SignAdapter`: the kernel, the body in ONNX Runtime and in onnx's own evaluator, against float64."""

import ctypes
import dataclasses
import os
import subprocess
import sys
import threading

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import random_module
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from lordba.adapter import SignModule
from lordba.backends.onnxruntime import library, native_calls
from lordba.blob import HEADER, RECORD, make_blob, read_record
from lordba.export.onnx.op import DOMAIN, NAME, VERSION, register_schema
from lordba.export.onnx.probe import node_model
from lordba.runtime.onnx_adapter import INPUT, no_adapter
from lordba.scales import ScaleCode, encode_scales

CODES = list(ScaleCode)
SHAPES = [(64, 96, 8, 1), (37, 21, 5, 3), (576, 192, 16, 1), (576, 192, 16, 70), (192, 576, 64, 7), (33, 9, 1, 2)]
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3}


def session(model: onnx.ModelProto, native: bool, threads: int = 1) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    if native:
        options.register_custom_ops_library(str(library()))
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


def inputs(module: SignModule, tokens: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, np.ndarray]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, tokens, module.d_in, generator=generator).to(dtype)
    base = torch.randn(1, tokens, module.d_out, generator=generator).to(dtype)
    return {"x": x.numpy(), "base": base.numpy(), **given(module)}


def given(*modules: SignModule | None) -> dict[str, np.ndarray]:
    """The adapter of these modules, of which `node_model`'s node reads the first."""
    return {INPUT: make_blob(modules).numpy()}


def expected(module: SignModule, feeds: dict[str, np.ndarray]) -> Tensor:
    b, a = module.factors()
    x, base = (torch.from_numpy(feeds[name]).double() for name in ("x", "base"))
    return base + x @ a.T @ b.T


def error(module: SignModule, feeds: dict[str, np.ndarray], found: np.ndarray) -> float:
    reference = expected(module, feeds)
    return ((torch.from_numpy(found).double() - reference).abs().max() / reference.abs().max()).item()


def flipped(feeds: dict[str, np.ndarray], matrix: str) -> dict[str, np.ndarray]:
    """With another first sign in A or B."""
    adapter = feeds[INPUT].copy()
    adapter[read_record(torch.from_numpy(adapter), 0).offsets["AB".index(matrix)]] ^= 1
    return {**feeds, INPUT: adapter}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("native", [True, False])
def test_equals_float64_and_sees_one_flipped_sign(native, code, dtype):
    model = node_model(code, dtype)
    onnx.checker.check_model(model)
    running = session(model, native)
    for d_in, d_out, r, tokens in SHAPES:
        module = random_module(d_in, d_out, r, code)
        feeds = inputs(module, tokens, dtype)
        before = native_calls()
        (y,) = running.run(None, feeds)
        assert native_calls() - before == native
        off = error(module, feeds, y)
        assert y.dtype == feeds["x"].dtype and off <= TOLERANCE[dtype]
        for matrix in "AB":
            assert error(module, feeds, running.run(None, flipped(feeds, matrix))[0]) > max(4 * off, 1e-4)


@pytest.mark.parametrize("code", CODES)
def test_the_body_in_onnxs_own_evaluator(code):
    """A second implementation of the standard operators, with no part of ONNX Runtime's."""
    register_schema()
    model = node_model(code)
    onnx.checker.check_model(model, full_check=True)
    evaluator = ReferenceEvaluator(model)
    for d_in, d_out, r, tokens in SHAPES[:2]:
        module = random_module(d_in, d_out, r, code)
        feeds = inputs(module, tokens)
        assert error(module, feeds, evaluator.run(None, feeds)[0]) <= TOLERANCE[torch.float32]
        assert error(module, feeds, evaluator.run(None, flipped(feeds, "A"))[0]) > 1e-4


def test_the_schema_is_registered():
    register_schema()
    register_schema()
    schema = onnx.defs.get_schema(NAME, VERSION, DOMAIN)
    assert [parameter.name for parameter in schema.inputs] == ["x", "base", "adapter"]
    broken = node_model(ScaleCode.LOG4)
    del broken.graph.node[0].input[2:]
    with pytest.raises(onnx.checker.ValidationError):
        onnx.checker.check_model(broken)


@pytest.mark.parametrize("native", [True, False])
def test_one_session_takes_every_rank(native):
    running = session(node_model(ScaleCode.LOG4), native)
    for r in (8, 16, 32, 5, 1):
        module = random_module(48, 40, r)
        feeds = inputs(module, 3)
        assert error(module, feeds, running.run(None, feeds)[0]) <= 1e-6


def test_zero_scales_are_no_adapter():
    module = random_module(48, 40, 8)
    nothing = encode_scales(torch.zeros(40), ScaleCode.LOG4)
    feeds = inputs(module, 3)
    feeds |= {"x": np.full_like(feeds["x"], np.inf)}
    for none in (dataclasses.replace(module, s_out=nothing), no_adapter(48, 40, ScaleCode.LOG4), None):
        (y,) = session(node_model(ScaleCode.LOG4), native=True).run(None, feeds | given(none))
        assert np.array_equal(y, feeds["base"])


def test_a_node_reads_the_module_that_its_attribute_names():
    model = node_model(ScaleCode.LOG4)
    modules = [random_module(48, 40, r, seed=r) for r in (8, 3, 16)]
    for native in (True, False):
        for index, module in enumerate(modules):
            model.graph.node[0].attribute[0].i = index
            feeds = inputs(module, 3) | given(*modules)
            (y,) = session(model, native).run(None, feeds)
            assert [error(other, feeds, y) <= 1e-6 for other in modules] == [other is module for other in modules]


@pytest.mark.parametrize("read_again", [False, True])
def test_y_lies_where_base_lay_only_if_nothing_else_reads_base(read_again):
    model = node_model(ScaleCode.LOG4)
    graph = model.graph
    graph.node[0].input[1], graph.node[0].output[0] = "made", "inner"
    graph.node.insert(0, onnx.helper.make_node("Neg", ["base"], ["made"]))
    graph.node.append(onnx.helper.make_node("Neg", ["inner"], ["y"]))
    if read_again:
        graph.node.append(onnx.helper.make_node("Neg", ["made"], ["base_again"]))
        graph.output.append(onnx.helper.make_tensor_value_info("base_again", onnx.TensorProto.FLOAT, None))
    module = random_module(48, 40, 8)
    feeds = inputs(module, 3)
    y, *base_again = session(model, native=True).run(None, feeds)
    assert error(module, feeds | {"base": -feeds["base"]}, -y) <= 1e-6
    assert all(np.array_equal(found, feeds["base"]) for found in base_again)


@pytest.mark.parametrize("code", [ScaleCode.LOG4, ScaleCode.INT8])
def test_every_code_means_the_same_as_in_python(code):
    """A rank-1 adapter of +1 signs whose s_in is each level in turn: y is the level itself, to the last bit."""
    count = 16 if code is ScaleCode.LOG4 else 256
    levels = torch.logspace(-2, 0, 15) if code is ScaleCode.LOG4 else torch.linspace(0.01, 1, 255)
    s_in = encode_scales(torch.cat([torch.zeros(1), levels]), code)
    one = encode_scales(torch.ones(1), code)
    signs = torch.zeros(1, count // 8, dtype=torch.uint8), torch.zeros(1, 1, dtype=torch.uint8)
    module = SignModule(*signs, s_in, one, one)
    feeds = given(module) | {
        "x": np.eye(count, dtype=np.float32)[None],
        "base": np.zeros((1, count, 1), np.float32),
    }
    wanted = torch.diagonal(torch.diag(module.factors()[1][0])).float().numpy()
    for native in (True, False):
        (y,) = session(node_model(code), native).run(None, feeds)
        np.testing.assert_allclose(y[0, :, 0], wanted, rtol=2e-7, atol=0)


def test_no_tokens():
    feeds = inputs(random_module(48, 40, 8), 0)
    assert session(node_model(ScaleCode.LOG4), native=True).run(None, feeds)[0].shape == (1, 0, 40)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"x": (1, 3, 40)}, "module 0 of the adapter maps 48 to 40 channels, the node 40 to 40"),
        ({"base": (1, 2, 40)}, "maps 48 to 40 channels, the node 72 to 40"),
        ({"base": (1, 5, 40)}, "agree in all dimensions"),
        ({"base": (1, 3, 41)}, "the node 48 to 41"),
        ({"adapter": (96,)}, "not an adapter blob"),
        ({"adapter": (0,)}, "not an adapter blob"),
        ({"x": (1, 3, 48, 1)}, "Invalid rank|same number"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change, said):
    feeds = inputs(random_module(48, 40, 8), 3)
    feeds |= {name: np.ones(shape, feeds[name].dtype) for name, shape in change.items()}
    with pytest.raises(Exception, match=said):
        session(node_model(ScaleCode.LOG4), native=True).run(None, feeds)


def test_a_damaged_adapter_is_refused():
    feeds = inputs(random_module(48, 40, 8), 3)
    running = session(node_model(ScaleCode.LOG4), native=True)
    for kept, said in ((-1, "truncated"), (HEADER.size + RECORD.size - 1, "truncated"), (8, "not an adapter blob")):
        with pytest.raises(Exception, match=said):
            running.run(None, feeds | {INPUT: feeds[INPUT][:kept]})
    beyond = node_model(ScaleCode.LOG4)
    beyond.graph.node[0].attribute[0].i = 1
    with pytest.raises(Exception, match="fewer modules than the program"):
        session(beyond, native=True).run(None, feeds)


def test_a_module_number_that_cannot_be_is_refused():
    model = node_model(ScaleCode.LOG4)
    del model.functions[:]
    model.graph.node[0].attribute[0].i = -1
    with pytest.raises(Exception, match="must not be negative"):
        session(model, native=True)


def test_threads_and_cuts_change_no_bit():
    module = random_module(576, 1536, 32)
    feeds = inputs(module, 130)
    one, four = (session(node_model(ScaleCode.LOG4), True, threads).run(None, feeds)[0] for threads in (1, 4))
    assert np.array_equal(one, four)


def test_one_session_on_several_threads():
    running = session(node_model(ScaleCode.LOG4), native=True)
    modules = [random_module(96, 80, r, seed=r) for r in (4, 8, 16, 32)]
    wrong: list[int] = []

    def work(i: int) -> None:
        for tokens in range(1, 20):
            feeds = inputs(modules[i], tokens)
            if error(modules[i], feeds, running.run(None, feeds)[0]) > 1e-6:
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def isolated(isa: str) -> subprocess.CompletedProcess[str]:
    code = (
        "import onnxruntime\nfrom lordba.backends.onnxruntime import library\n"
        "onnxruntime.SessionOptions().register_custom_ops_library(str(library()))"
    )
    environment = {**os.environ, "LORDBA_ISA": isa}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_the_instruction_set_can_be_forced():
    assert isolated("scalar").returncode == 0
    refused = isolated("mmx")
    assert refused.returncode != 0 and "LORDBA_ISA" in refused.stderr


def test_a_runtime_that_is_too_old_is_told_once_and_left_alone(capfd):
    """A stand-in for its entry point: it knows API versions below 17 only."""
    asked = []
    get_api = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)(lambda version: asked.append(version))
    get_version = ctypes.CFUNCTYPE(ctypes.c_char_p)(lambda: b"1.16.3")
    base = (ctypes.c_void_p * 2)(*(ctypes.cast(f, ctypes.c_void_p) for f in (get_api, get_version)))
    register = ctypes.CDLL(str(library())).RegisterCustomOps
    register.argtypes, register.restype = [ctypes.c_void_p, ctypes.c_void_p], ctypes.c_void_p
    assert register(None, ctypes.addressof(base)) is None
    assert register(None, ctypes.addressof(base)) is None
    assert asked == [17, 17]
    assert capfd.readouterr().err.count("ONNX Runtime 1.16.3 is older than 1.17") == 1
