"""The base's quantized layers for ONNX Runtime: exact on grids that 4 and 8 bit hold exactly."""

import pytest
import torch
from conftest import random_adapter, tiny_model
from torch import Tensor, nn

from lordba.errors import LordbaError
from lordba.export.onnx.decoder import AdapterNode, OnnxDecoder
from lordba.export.onnx.quantize import Int8Embedding, Int8Linear, NBitsLinear, SplitInt4Linear, quantize_base
from lordba.export.quantize import GROUP
from lordba.scales import ScaleCode

N, K = 24, 96


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def q4_1(generator: torch.Generator) -> Tensor:
    """Weights [N, K] of Q4_1's form d * q + m with q in 0..15, both ends taken."""
    q = torch.randint(0, 16, (N, K // GROUP, GROUP), generator=generator).float()
    q[..., 3], q[..., 17] = 0, 15
    d = (torch.rand(N, K // GROUP, 1, generator=generator) * 0.02 + 0.01).half().float()
    m = (torch.randn(N, K // GROUP, 1, generator=generator) * 0.1).half().float()
    return (d * q + m).reshape(N, K)


def q8_0(generator: torch.Generator, rows: int = N) -> Tensor:
    """Weights [rows, K] of Q8_0's form d * q with q in -127..127, an end taken."""
    q = torch.randint(-127, 128, (rows, K // GROUP, GROUP), generator=generator).float()
    q[..., 5] = 127
    d = (torch.rand(rows, K // GROUP, 1, generator=generator) * 0.02 + 0.01).half().float()
    return (d * q).reshape(rows, K)


def linear(weight: Tensor, bias: bool) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias)
    layer.weight.data = weight
    return layer.requires_grad_(False)


def off_by(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("bias", [True, False])
def test_split_4_bit_loses_nothing_of_q4_1(generator, bias):
    x = torch.randn(2, 7, K, generator=generator)
    source = linear(q4_1(generator), bias)
    expected = nn.functional.linear(x.double(), source.weight.double(), source.bias.double() if bias else None)
    layer = SplitInt4Linear(source, 4)
    assert off_by(layer(x), expected) < 1e-6
    assert layer.codes.packed.shape == (N, K // GROUP, GROUP // 2) and layer.codes.packed.dtype == torch.uint8
    layer.offset += 0.01
    assert off_by(layer(x), expected) > 1e-3


@pytest.mark.parametrize("bias", [True, False])
def test_8_bit_loses_nothing_of_q8_0(generator, bias):
    x = torch.randn(2, 7, K, generator=generator)
    source = linear(q8_0(generator), bias)
    expected = nn.functional.linear(x.double(), source.weight.double(), source.bias.double() if bias else None)
    assert off_by(Int8Linear(source, 4)(x), expected) < 1e-6
    assert 1e-4 < off_by(SplitInt4Linear(source, 4)(x), expected) < 0.1


def test_embedding_loses_nothing_of_q8_0(generator):
    source = nn.Embedding(50, K).requires_grad_(False)
    source.weight.data = q8_0(generator, 50)
    tokens = torch.randint(0, 50, (2, 5), generator=generator)
    assert off_by(Int8Embedding(source)(tokens), source(tokens).double()) < 1e-6


@pytest.mark.parametrize("base_quant, bits", [("int4", 4), ("int8", 8)])
def test_every_linear_but_the_head_which_stays_in_8_bit(base_quant, bits):
    model = tiny_model()
    decoder = OnnxDecoder(model, {*random_adapter(model, only=("q_proj",)).modules, "lm_head"}, ScaleCode.LOG4)
    quantize_base(decoder, base_quant, 4)
    layers = {path: layer for path, layer in decoder.named_modules() if isinstance(layer, NBitsLinear)}
    found = {path: layer.attributes["bits"] for path, layer in layers.items()}
    head = {path: found.pop(path) for path in list(found) if "lm_head" in path}
    assert len(found) == 14 and set(found.values()) == {bits} and list(head.values()) == [8]
    assert isinstance(decoder.model.get_output_embeddings(), AdapterNode)
    assert isinstance(decoder.model.get_input_embeddings(), Int8Embedding)


def test_a_width_that_groups_do_not_divide_stays_float():
    decoder = OnnxDecoder(tiny_model(intermediate_size=90), set(), ScaleCode.LOG4)
    quantize_base(decoder, "int4", 4)
    layers = decoder.model.model.layers
    assert isinstance(layers[0].mlp.down_proj, nn.Linear) and isinstance(layers[0].mlp.up_proj, SplitInt4Linear)


def test_an_unknown_quantization():
    with pytest.raises(LordbaError, match="--base-quant must be one of int4, int8, none, found 'int3'"):
        quantize_base(OnnxDecoder(tiny_model(), set(), ScaleCode.LOG4), "int3", 4)
