"""Quantizing the frozen base for XNNPACK: 4-bit (split), 8-bit, or none; embedding and head in 8 bit with either.

All linears run with int8 activations, quantized per token at run time. XNNPACK's 4-bit kernels know symmetric codes
only; asymmetric ones lose their zero points silently. `SplitInt4Linear` therefore carries the asymmetric part in a
small float layer beside them, which makes 4-bit weights with a minimum per group exact (Q4_1 GGUFs are such).
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchao.quantization.quantize_.workflows.intx.intx_unpacked_to_int8_tensor import (
    IntxUnpackedToInt8Tensor,
    IntxUnpackedToInt8TensorActivationQuantization,
)
from torchao.utils import unwrap_tensor_subclass

from lordba.errors import LordbaError

from .adapted import AdaptedLinear
from .decoder import Decoder
from .generic import GenericDecoder

BASE_QUANTS = ("int4", "int8", "none")
GROUP = 32
INT8_PER_TOKEN = IntxUnpackedToInt8TensorActivationQuantization.INT8_ASYM_PER_TOKEN


class QuantizedLinear(nn.Module):
    """A linear layer of integer weights and int8 activations, in torchao's form for export.

    Eager, it computes the same with the weights dequantized once: torchao would do so again at every call.
    """

    def __init__(self, weight: IntxUnpackedToInt8Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.packed = bare_linear(weight)
        self.packed.bias = bias  # type: ignore[assignment]
        self._weight = weight.dequantize()  # no buffer: it must not reach the program

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_exporting():
            return self.packed(x)
        return F.linear(fake_quantize(x), self._weight, self.packed.bias)


def fake_quantize(x: Tensor) -> Tensor:
    """x [..., k] through asymmetric int8 and back, one scale and zero point per token, as XNNPACK and torchao do it."""
    low, high = x.amin(-1, keepdim=True).clamp_max(0), x.amax(-1, keepdim=True).clamp_min(0)
    scale = ((high - low) / 255).clamp_min(torch.finfo(torch.float32).eps)
    zero = (-128 - (low / scale).round()).clamp(-128, 127)
    codes = ((x / scale).round() + zero).clamp(-128, 127)
    return (codes - zero) * scale


class SplitInt4Linear(nn.Module):
    """x W^T with W = scale * codes + offset per group of 32 inputs: int4 codes on XNNPACK, offsets in a float layer.

    W [n, k] -> codes in [-8, 7] with a bf16 scale per group (XNNPACK rounds scales to bf16), offset fp32 [n, k/32];
    x W^T = x (scale * codes)^T + (group sums of x) offset^T.
    """

    def __init__(self, source: nn.Linear) -> None:
        super().__init__()
        weight = source.weight.detach()
        n, k = weight.shape
        codes, step, _ = group_codes(weight)
        codes = codes - 8
        groups = weight.view(n, k // GROUP, GROUP)
        scale = step.to(torch.bfloat16).to(torch.float32)
        offset = (groups - codes * scale).mean(-1)  # takes up what rounding the scale to bf16 shifted
        packed = IntxUnpackedToInt8Tensor(
            qdata=codes.reshape(n, k).to(torch.int8),
            scale=scale[..., 0].clone(),
            zero_point=torch.zeros(n, k // GROUP, dtype=torch.int8),
            target_dtype=torch.int4,  # type: ignore[attr-defined]
            block_size=(1, GROUP),
            dtype=torch.float32,
            activation_quantization=INT8_PER_TOKEN,
        )
        self.codes = QuantizedLinear(packed, source.bias)
        self.group_sums = bare_linear(torch.eye(k // GROUP).repeat_interleave(GROUP, dim=1).contiguous())
        self.offset = bare_linear(offset.contiguous())

    def forward(self, x: Tensor) -> Tensor:
        return self.codes(x) + self.offset(self.group_sums(x))


def group_codes(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """weight [n, k] as codes 0..15 (float) [n, k/32, 32], step and lowest value of each group [n, k/32, 1].

    weight = step * code + low; exact for weights that were made so, like those of Q4_1 GGUFs.
    """
    n, k = weight.shape
    groups = weight.reshape(n, k // GROUP, GROUP)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = ((high - low) / 15).clamp_min(torch.finfo(torch.bfloat16).tiny)
    return ((groups - low) / step).round(), step, low


def int8_linear(source: nn.Linear) -> QuantizedLinear:
    """Symmetric int8 weights with one scale per output channel."""
    weight = IntxUnpackedToInt8Tensor.from_hp(
        source.weight.detach(), (1, source.in_features), torch.int8, activation_quantization=INT8_PER_TOKEN
    )
    return QuantizedLinear(weight, source.bias)


class Int8Embedding(nn.Module):
    """Rows of int8 codes with a float scale per group of 32 (exact for Q8_0 GGUFs) or per row."""

    codes: Tensor
    scales: Tensor

    def __init__(self, source: nn.Embedding) -> None:
        super().__init__()
        weight = source.weight.detach()
        rows, width = weight.shape
        group = GROUP if width % GROUP == 0 else width
        groups = weight.reshape(rows, width // group, group)
        scales = (groups.abs().amax(-1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
        self.register_buffer("codes", (groups / scales[..., None]).round().reshape(rows, width).to(torch.int8))
        self.register_buffer("scales", scales)

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.ops.quantized_decomposed.embedding_byte.dtype(
            self.codes, self.scales, None, -128, 127, tokens, dtype=torch.float32
        )


def bare_linear(weight: Tensor) -> nn.Linear:
    """A bias-free linear layer with this weight, frozen."""
    n, k = weight.shape
    layer = nn.Linear(k, n, bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def quantize_base(module: Decoder | GenericDecoder, base_quant: str) -> None:
    """Quantize every linear and embedding of a captured decoder, in place; its adapters are not touched."""
    import executorch.exir.passes._quant_patterns_and_replacements  # noqa: F401 (registers embedding_byte)

    def linear(layer: nn.Linear, bits: int) -> nn.Module:
        return SplitInt4Linear(layer) if bits == 4 and layer.in_features % GROUP == 0 else int8_linear(layer)

    replace_layers(module, head_of(module), base_quant, linear, Int8Embedding)
    unwrap_tensor_subclass(module)


def replace_layers(
    module: nn.Module,
    head: nn.Module,
    base_quant: str,
    linear: Callable[[nn.Linear, int], nn.Module],
    embedding: Callable[[nn.Embedding], nn.Module],
) -> None:
    """Put a target's quantized layers into a captured decoder: linears in 4 or 8 bit, the head and embeddings in 8."""
    if base_quant not in BASE_QUANTS:
        raise LordbaError(f"--base-quant must be one of {', '.join(BASE_QUANTS)}, found {base_quant!r}")
    if base_quant == "none":
        return
    for path, layer in list(replaceable(module)):
        if isinstance(layer, nn.Embedding):
            module.set_submodule(path, embedding(layer))
        else:
            module.set_submodule(path, linear(layer, 4 if base_quant == "int4" and layer is not head else 8))


def head_of(module: Decoder | GenericDecoder) -> nn.Module:
    """The output layer of a captured decoder, which stays in 8 bit."""
    head = module.head if isinstance(module, Decoder) else module.model.get_output_embeddings()
    return head.linear if isinstance(head, AdaptedLinear) else head


def replaceable(module: nn.Module) -> Iterator[tuple[str, nn.Linear | nn.Embedding]]:
    for path, layer in module.named_modules():
        if isinstance(layer, nn.Linear | nn.Embedding):
            yield path, layer
