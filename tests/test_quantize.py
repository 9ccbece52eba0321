"""Quantizing the base: integer layers against torchao and float64, exact on grids that 4 and 8 bit hold exactly."""

import pytest
import torch
from conftest import MAX_SEQ_LEN, VOCABULARY, random_adapter, random_module, tiny_model
from torch import Tensor, nn
from torchao.quantization.quantize_.workflows.intx import intx_unpacked_to_int8_tensor as intx

from lordba.adapter import Adapter
from lordba.errors import LordbaError
from lordba.export.executorch.adapted import AdaptedLinear
from lordba.export.executorch.capture import capture
from lordba.export.executorch.quantize import (
    Int8Embedding,
    QuantizedLinear,
    SplitInt4Linear,
    fake_quantize,
    int8_linear,
    quantize_base,
)
from lordba.export.quantize import GROUP
from lordba.scales import ScaleCode

N, K = 24, 96


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight.data = weight
    if bias is not None:
        layer.bias.data = bias
    return layer.requires_grad_(False)


def q4_1_grid(generator: torch.Generator) -> Tensor:
    """float64 weights [N, K] of Q4_1's form d * q + m with q in 0..15 (both ends taken) and d a bf16 number."""
    q = torch.randint(0, 16, (N, K // GROUP, GROUP), generator=generator).double()
    q[..., 3], q[..., 17] = 0, 15
    d = (torch.rand(N, K // GROUP, 1, generator=generator) * 0.02 + 0.01).to(torch.bfloat16).double()
    m = torch.randn(N, K // GROUP, 1, generator=generator).double() * 0.1
    return (d * q + m).reshape(N, K)


def split_weight(layer: SplitInt4Linear) -> Tensor:
    """The float64 weight that a split layer stands for: codes with their scales, plus the offsets of the groups."""
    codes = layer.codes.packed.weight.dequantize().double()
    return codes + layer.offset.weight.double() @ layer.group_sums.weight.double()


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def x(generator) -> Tensor:
    return torch.randn(2, 7, K, generator=generator) * torch.logspace(-2, 2, 7)[:, None]


def test_activations_are_rounded_as_torchao_does(x):
    x[0, 0] = x[0, 0].abs()  # a token without negative values, one without positive ones, one of zeros
    x[0, 1] = -x[0, 1].abs()
    x[0, 2] = 0
    torch.testing.assert_close(fake_quantize(x), intx._apply_int8_act_asym_per_token_quant_dequant(x))
    step = (x.amax(-1, keepdim=True).clamp_min(0) - x.amin(-1, keepdim=True).clamp_max(0)) / 255
    assert ((fake_quantize(x) - x).abs() <= 1.01 * step).all()


@pytest.mark.parametrize("bias", [True, False])
def test_int8_layer_computes_what_torchao_does(generator, x, bias):
    source = linear(torch.randn(N, K, generator=generator), torch.randn(N, generator=generator) if bias else None)
    layer = int8_linear(source)
    torch.testing.assert_close(layer(x), layer.packed(x))
    dense = fake_quantize(x).double() @ source.weight.double().T + (source.bias.double() if bias else 0)
    error = (layer(x) - dense).norm() / dense.norm()
    assert 0 < error < 0.01


@pytest.mark.parametrize("bias", [True, False])
def test_split_layer_is_exact_on_q4_1_weights(generator, x, bias):
    weight = q4_1_grid(generator)
    source = linear(weight.float(), torch.randn(N, generator=generator) if bias else None)
    layer = SplitInt4Linear(source)
    torch.testing.assert_close(split_weight(layer), weight, atol=1e-6, rtol=0)
    torch.testing.assert_close(layer.codes(x), layer.codes.packed(x))
    # The codes meet activations in 8 bit, the group offsets (minimum plus eight steps) meet them in float.
    groups = weight.view(N, -1, GROUP)
    middle = groups.amin(-1) + 8 * (groups.amax(-1) - groups.amin(-1)) / 15
    codes = (groups - middle[..., None]).view(N, K)
    expected = fake_quantize(x).double() @ codes.T + x.double().view(2, 7, -1, GROUP).sum(-1) @ middle.T
    expected += source.bias.double() if bias else 0
    error = (layer(x) - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.max() < 2e-6


def test_split_layer_beats_symmetric_rounding(generator):
    weight = torch.randn(N, K, generator=generator)
    symmetric = intx.IntxUnpackedToInt8Tensor.from_hp(weight, (1, GROUP), torch.int4).dequantize()
    ours = split_weight(SplitInt4Linear(linear(weight)))
    assert (ours - weight).norm() < 0.9 * (symmetric - weight).norm()


@pytest.mark.parametrize("weight", [torch.zeros(N, K), torch.full((N, K), 0.3)])
def test_split_layer_takes_flat_groups(weight, x):
    torch.testing.assert_close(split_weight(SplitInt4Linear(linear(weight))), weight.double(), atol=1e-6, rtol=0)
    assert SplitInt4Linear(linear(weight))(x).isfinite().all()


def test_embedding_is_exact_on_q8_0_weights(generator):
    codes = torch.randint(-127, 128, (50, K // GROUP, GROUP), generator=generator)
    codes[..., 5] = 127
    scales = (torch.rand(50, K // GROUP, 1, generator=generator) * 0.01 + 1e-3).half().float()
    source = nn.Embedding(50, K)
    source.weight.data = (codes * scales).view(50, K)
    tokens = torch.tensor([[3, 49, 0, 3]])
    assert torch.equal(quantized_embedding(source, tokens), source(tokens))


def test_embedding_of_any_width(generator):
    source = nn.Embedding(50, 45)
    tokens = torch.arange(50)[None]
    error = (quantized_embedding(source, tokens) - source(tokens)).abs()
    assert (error <= source.weight.abs().amax(-1, keepdim=True) / 254 * 1.001).all() and error.max() > 0


def quantized_embedding(source: nn.Embedding, tokens: Tensor) -> Tensor:
    import executorch.exir.passes._quant_patterns_and_replacements  # noqa: F401 (registers embedding_byte)

    return Int8Embedding(source)(tokens)


def kinds(module: nn.Module) -> dict[str, str]:
    """What stands in for every layer of a captured decoder, by the name of its place."""
    result = {}
    for name, layer in module.named_modules():
        if isinstance(layer, SplitInt4Linear):
            result[name] = "int4"
        elif isinstance(layer, QuantizedLinear) and not name.endswith(".codes"):
            result[name] = "int8"
        elif isinstance(layer, Int8Embedding):
            result[name] = "embedding"
    return result


@pytest.mark.parametrize("route", ["fast", "generic"])
@pytest.mark.parametrize("base_quant", ["int4", "int8"])
def test_every_layer_is_replaced_and_the_head_stays_in_8_bit(route, base_quant):
    model = tiny_model(vocab_size=100)  # fewer tokens than gate and up have channels together
    captured = capture(model, {"a": random_adapter(model)}, MAX_SEQ_LEN, route)
    quantize_base(captured.module, base_quant)
    found = kinds(captured.module)
    head = "head.linear" if route == "fast" else "model.lm_head"
    embedding = "embedding" if route == "fast" else "model.model.embed_tokens"
    assert found.pop(head) == "int8" and found.pop(embedding) == "embedding"
    assert len(found) == 2 * (4 if route == "fast" else 7) and set(found.values()) == {base_quant}
    assert not any(isinstance(layer, nn.Embedding) for layer in captured.module.modules())


@pytest.mark.parametrize("route", ["fast", "generic"])
def test_an_adapted_head_stays_in_8_bit_too(route):
    model = tiny_model()
    adapter = Adapter({"lm_head": random_module(64, VOCABULARY, 4)}, ScaleCode.LOG4)
    captured = capture(model, {"a": adapter}, MAX_SEQ_LEN, route)
    quantize_base(captured.module, "int4")
    (head,) = [m for m in captured.module.modules() if isinstance(m, AdaptedLinear) and m._slot is not None]
    assert isinstance(head.linear, QuantizedLinear)


def test_widths_that_no_group_divides_go_to_8_bit():
    model = tiny_model(hidden_size=48)
    captured = capture(model, {}, MAX_SEQ_LEN)
    quantize_base(captured.module, "int4")
    layer = captured.module.layers[0]
    assert isinstance(layer.attention.qkv.linear, QuantizedLinear)
    assert isinstance(layer.gate_up.linear, QuantizedLinear)
    assert isinstance(layer.down.linear, SplitInt4Linear)


def test_none_changes_nothing():
    captured = capture(tiny_model(), {}, MAX_SEQ_LEN)
    before = dict(captured.module.named_modules())
    quantize_base(captured.module, "none")
    assert all(module is before[name] for name, module in captured.module.named_modules())


def test_unknown_quantization_is_refused():
    with pytest.raises(LordbaError, match=r"int4, int8, none.*'int3'"):
        quantize_base(capture(tiny_model(), {}, MAX_SEQ_LEN).module, "int3")
