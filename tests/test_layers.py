"""The unmerged layer and attaching adapters to a model, against dense float64 updates."""

import pytest
import torch
from conftest import random_adapter, random_module, some_tokens, tiny_model, transformers_logits
from torch import nn

from lordba.adapter import Adapter, SignModule
from lordba.errors import LordbaError
from lordba.layers import LordbaLinear, attach, check_fits, detach, linear_size
from lordba.scales import ScaleCode, encode_scales


def linear(d_in: int, d_out: int) -> nn.Linear:
    torch.manual_seed(d_in)
    return nn.Linear(d_in, d_out).requires_grad_(False)


@pytest.mark.parametrize("code", list(ScaleCode))
@pytest.mark.parametrize("d_in, d_out, r", [(32, 48, 8), (45, 7, 3), (1, 1, 1)])
def test_layer_adds_the_dense_update(d_in, d_out, r, code):
    base, module = linear(d_in, d_out), random_module(d_in, d_out, r, code)
    x = torch.randn(2, 5, d_in)
    b, a = module.factors()
    dense = base.weight.double() + b @ a
    torch.testing.assert_close(
        LordbaLinear(base, module)(x).double(), x.double() @ dense.T + base.bias.double(), atol=1e-5, rtol=1e-5
    )


def test_zero_output_scales_give_exactly_the_base():
    module = random_module(32, 48, 8)
    off = SignModule(
        module.a_signs, module.b_signs, module.s_in, module.s_mid, encode_scales(torch.zeros(48), ScaleCode.LOG4)
    )
    base, x = linear(32, 48), torch.randn(3, 32)
    assert torch.equal(LordbaLinear(base, off)(x), base(x))
    assert not torch.equal(LordbaLinear(base, module)(x), base(x))


def test_layer_is_exportable():
    layer, x = LordbaLinear(linear(32, 48), random_module(32, 48, 8)), torch.randn(6, 32)
    rows = torch.export.Dim("rows", min=1, max=64)
    program = torch.export.export(layer, (torch.randn(4, 32),), dynamic_shapes=({0: rows},))
    torch.testing.assert_close(program.module()(x), layer(x))
    assert any(node.target is torch.ops.lordba.sign_adapter.default for node in program.graph.nodes)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_attach_replace_detach(family):
    model, tokens = tiny_model(family), some_tokens(9)
    before = transformers_logits(model, tokens)
    first, second = random_adapter(model, seed=1), random_adapter(model, r=3, seed=2, only=("_proj", "c_attn"))
    merged = tiny_model(family)
    for path, module in second.modules.items():
        b, a = module.factors()
        layer = merged.get_submodule(path)
        layer.weight += (b @ a if isinstance(layer, nn.Linear) else (b @ a).T).float()
    expected = transformers_logits(merged, tokens)
    attach(model, first)
    attach(model, second)  # replaces the first
    torch.testing.assert_close(transformers_logits(model, tokens), expected, atol=2e-5, rtol=0)
    assert (expected - before).abs().max() > 0.1
    detach(model)
    assert torch.equal(transformers_logits(model, tokens), before)
    assert not any(isinstance(module, LordbaLinear) for module in model.modules())


@pytest.mark.parametrize(
    "path, size, said",
    [
        ("model.layers.7.mlp.up_proj", (64, 96), "lacks"),
        ("model.layers.0.mlp.up_proj", (96, 64), "maps 64 to 96"),
        ("model.norm", (64, 64), "no linear layer"),
    ],
)
def test_a_misfit_names_the_module_and_changes_nothing(path, size, said):
    model, tokens = tiny_model(), some_tokens(5)
    before = transformers_logits(model, tokens)
    good = random_adapter(model, only=("q_proj",)).modules
    adapter = Adapter({**good, path: random_module(*size, 4)}, ScaleCode.LOG4)
    with pytest.raises(LordbaError, match=said) as raised:
        attach(model, adapter, "adapter pirate")
    assert path in str(raised.value) and "adapter pirate" in str(raised.value)
    assert torch.equal(transformers_logits(model, tokens), before)


def test_check_fits_sees_through_an_attached_adapter():
    model = tiny_model()
    adapter = random_adapter(model)
    attach(model, adapter)
    check_fits(adapter, model, "adapter")


def test_linear_size():
    assert linear_size(nn.Linear(3, 5)) == (3, 5)
    assert linear_size(tiny_model("gpt2").transformer.h[0].attn.c_attn) == (64, 192)
    assert linear_size(nn.LayerNorm(3)) is None
