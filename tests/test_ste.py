"""The straight-through layer against plain autograd in float64, what it saves, and quantized frozen layers."""

import itertools

import pytest
import torch
from conftest import random_module, some_tokens, tiny_model
from loras import random_lora
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerGroup
from torchao.quantization.quant_api import Int8DynamicActivationIntxWeightConfig

from lordba.adapter import SignModule
from lordba.convert import convert_lora
from lordba.lora import LoraAdapter, LoraModule
from lordba.ops import sign_adapter
from lordba.signs import pack_signs, unpack_signs
from lordba.training.latents import SIZES, to_latents, to_module
from lordba.training.ste import add_signed, dense_weight, envelope, frozen_linear, is_quantized, with_signs
from lordba.training.tuner import LordbaConfig

T, D_IN, D_OUT, R, SCALING = 7, 20, 13, 5, 1.5


def straight_through(m: Tensor) -> Tensor:
    """env(m) with an identity gradient, in the plain way: an oracle that shares nothing with the product's code."""
    size = m.detach().abs()
    env = torch.sign(m.detach() + 1e-300) * torch.outer(size.mean(1), size.mean(0)) / size.mean()
    return env + (m - m.detach())


def problem(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """base, x, A, B that need gradients, and the gradient of the result."""
    g = torch.Generator().manual_seed(0)
    shapes = ((2, T, D_OUT), (2, T, D_IN), (R, D_IN), (D_OUT, R))
    leaves = [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]
    return *leaves, torch.randn(2, T, D_OUT, generator=g, dtype=torch.float64).to(dtype)


def naive(base: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return base + SCALING * (x @ straight_through(a).t() @ straight_through(b).t())


@pytest.mark.parametrize("exact", [True, False])
def test_values_and_gradients_are_those_of_plain_autograd(exact):
    *leaves, grad = problem()
    ours, plain = add_signed(*leaves, SCALING, exact), naive(*leaves)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    found, wanted = (torch.autograd.grad(y, leaves, grad) for y in (ours, plain))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    # Negative control: the gradient of a float LoRA with these latents is another one.
    base, x, a, b = leaves
    lora = torch.autograd.grad(base + SCALING * (x @ a.t() @ b.t()), leaves, grad)
    assert all((one - other).norm() > 0.1 * other.norm() for one, other in list(zip(found, lora, strict=True))[1:])


def test_the_gradient_of_x_passes_gradcheck():
    base, x, a, b, _ = problem()
    a, b = a.detach(), b.detach()
    assert torch.autograd.gradcheck(lambda base, x: add_signed(base, x, a, b, SCALING, True), (base, x))


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_lower_precision_comes_near(dtype, limit):
    *leaves, grad = problem()
    wanted = torch.autograd.grad(naive(*leaves), leaves, grad)
    *low, low_grad = problem(dtype)
    found = torch.autograd.grad(add_signed(*low, SCALING, False), low, low_grad)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == dtype and (one - other).norm() < limit * other.norm()


def test_only_x_is_saved():
    base, x, a, b, _ = problem(torch.float32)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        add_signed(base, x, a, b, SCALING, False)
    assert {t.data_ptr() for t in saved} == {x.data_ptr(), a.data_ptr(), b.data_ptr()}


def test_gradients_nobody_wants_are_not_computed():
    base, x, a, b, grad = problem()
    add_signed(base.detach(), x.detach(), a, b.detach(), SCALING, True).backward(grad)
    assert a.grad is not None and x.grad is None and b.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_op_repeats_the_layer_bit_for_bit(dtype):
    torch.manual_seed(0)
    x, a, b = torch.randn(9, 45).to(dtype), torch.randn(6, 45), torch.randn(33, 6)
    module = to_module(a, b, SCALING)
    scales = [s.values for s in module.scales]
    op = sign_adapter(x, module.a_signs, module.b_signs, *scales)
    base = torch.randn(9, 33).to(dtype)
    assert torch.equal(add_signed(base, x, a, b, SCALING, True), base + op)


def test_an_adapters_latents_compute_the_adapter():
    module = random_module(45, 33, 6)
    a, b = to_latents(module)
    again = to_module(a, b, 1.0)
    assert torch.equal(again.a_signs, module.a_signs) and torch.equal(again.b_signs, module.b_signs)
    found, wanted = (b @ a for b, a in (again.factors(), module.factors()))
    assert (found - wanted).norm() < 1e-6 * wanted.norm()
    torch.testing.assert_close(b.norm(dim=0), a.norm(dim=1))


def flip_costs(module: SignModule, target: Tensor) -> Tensor:
    """By how much the squared error to a target grows where one sign of B [d_out, r] alone flips, in float64."""
    b, a = module.factors()
    costs = torch.zeros_like(b)
    for i, k in itertools.product(range(b.shape[0]), range(b.shape[1])):
        flipped = b.clone()
        flipped[i, k] *= -1
        costs[i, k] = (target - flipped @ a).square().sum() - (target - b @ a).square().sum()
    return costs


def test_latents_that_know_the_lora_are_small_where_a_sign_costs_little():
    lora, other = random_lora(33, 45, 6), random_lora(33, 45, 6, seed=1)
    module = convert_lora(LoraAdapter({"x": lora}), scale_code="fp32")[0].modules["x"]
    a, b = to_latents(module, lora)
    again = to_module(a, b, 1.0)
    assert torch.equal(again.a_signs, module.a_signs) and torch.equal(again.b_signs, module.b_signs)
    found, wanted = (b @ a for b, a in (again.factors(), module.factors()))
    assert (found - wanted).norm() < 1e-5 * wanted.norm()

    def likeness(lora: LoraModule) -> float:
        size = to_latents(module, lora)[1] / to_latents(module)[1]
        return torch.corrcoef(torch.stack([size.flatten().double(), units.flatten()]))[0, 1].item()

    factors = module.factors()
    units = 4 * factors[0].square() * factors[1].square().sum(1)
    left, right = lora.factors()
    units = (flip_costs(module, left @ right) / units).clamp(*SIZES)
    assert likeness(lora) > 0.95 and abs(likeness(other)) < 0.3


def test_the_sign_of_zero_is_plus_in_training_as_in_files():
    m = torch.tensor([[-0.0, 0.0], [-1e-30, 2.0]])
    found = with_signs(torch.ones(2, 2), m)
    assert found.tolist() == unpack_signs(pack_signs(m), 2).tolist() == [[1, 1], [-1, 1]]


def test_zeros_are_no_update_and_have_a_gradient():
    p, q = envelope(torch.zeros(3, 4))
    assert not p.any() and not q.any()
    base, x, a, _, grad = problem()
    b = torch.zeros(D_OUT, R, dtype=torch.float64, requires_grad=True)
    y = add_signed(base, x, a, b, SCALING, True)
    assert torch.equal(y, base)
    grad_a, grad_b = torch.autograd.grad(y, (a, b), grad)
    assert not grad_a.any() and grad_b.abs().min() > 0


# Quantized frozen layers

QUANTIZATIONS = {
    "int8": Int8WeightOnlyConfig(),
    "int4": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
    "8da4w": Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(32)),
}


@pytest.mark.parametrize("how", QUANTIZATIONS)
def test_gradients_pass_a_quantized_layer(how):
    torch.manual_seed(0)
    layer = nn.Linear(64, 48).requires_grad_(False)
    quantize_(nn.Sequential(layer), QUANTIZATIONS[how])
    weight = layer.weight.dequantize()
    assert is_quantized(layer) and not is_quantized(nn.Linear(2, 2))
    x, grad = torch.randn(3, 5, 64, requires_grad=True), torch.randn(3, 5, 48)
    y = frozen_linear(x, layer)
    assert (y - nn.functional.linear(x, weight, layer.bias)).norm() < 0.02 * y.norm()
    torch.testing.assert_close(torch.autograd.grad(y, x, grad)[0], grad @ weight)


def test_a_layer_that_cannot_show_its_weight_is_asked():
    class Opaque(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, hidden, self.bias)

    def no_way() -> None:
        raise NotImplementedError

    layer, hidden = Opaque(20, 13), torch.randn(13, 20)
    layer.weight.dequantize = no_way
    torch.testing.assert_close(dense_weight(layer, torch.float32), hidden)


@pytest.mark.parametrize("how", QUANTIZATIONS)
def test_training_beside_a_quantized_base(how, tmp_path):
    """The latents' gradients are those beside the base's dequantized weights."""
    from peft import get_peft_model

    import lordba

    model = tiny_model(hidden_size=64)
    quantize_(model.model, QUANTIZATIONS[how])
    dense = tiny_model(hidden_size=64)
    for path, layer in model.named_modules():
        if is_quantized(layer):
            dense.get_submodule(path).weight.data = layer.weight.dequantize()
    ids = torch.tensor([some_tokens(16)])
    grads = []
    for base in (model, dense):
        torch.manual_seed(0)
        peft = get_peft_model(base, LordbaConfig(r=4, target_modules="all-linear")).train()
        for name, p in peft.named_parameters():
            if "lordba_B" in name:
                nn.init.normal_(p, std=0.05)
        loss = peft(input_ids=ids, labels=ids).loss
        torch.autograd.backward(loss)
        grads.append(torch.cat([p.grad.flatten() for p in peft.parameters() if p.requires_grad]))
        lordba.pack(peft, tmp_path / "packed", scales="fp32")
    limit = 0.1 if how == "8da4w" else 1e-4  # its activations are rounded
    assert (grads[0] - grads[1]).norm() < limit * grads[1].norm()
    assert grads[1].norm() > 0
