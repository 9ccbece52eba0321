"""Quantizing the frozen base for XNNPACK: 4-bit (split), 8-bit, or none; embedding and head in 8 bit with either.

All linears run with int8 activations, quantized per token at run time. XNNPACK's 4-bit kernels know symmetric codes
only; asymmetric ones lose their zero points silently. `SplitInt4Linear` therefore carries the asymmetric part in a
small float layer beside them, which makes 4-bit weights with a minimum per group exact (Q4_1 GGUFs are such).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchao.quantization.quantize_.workflows.intx.intx_unpacked_to_int8_tensor import (
    IntxUnpackedToInt8Tensor,
    IntxUnpackedToInt8TensorActivationQuantization,
)
from torchao.utils import unwrap_tensor_subclass

from ..quantize import GROUP, Int8Rows, group_codes, replace_layers
from .adapted import AdaptedLinear
from .decoder import Decoder
from .generic import GenericDecoder

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
        n, k = source.weight.shape
        codes, scale, offset = split_int4(source.weight.detach())
        packed = IntxUnpackedToInt8Tensor(
            qdata=codes,
            scale=scale.clone(),
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


def split_int4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """weight [n, k] = scale * codes + offset: int8 codes in [-8, 7] [n, k]; scale and offset per group [n, k/32].

    Scales are float32 that bf16 holds; offsets take up, on average, what rounding them shifted.
    """
    n, k = weight.shape
    codes, step, _ = group_codes(weight)
    codes = codes - 8
    scale = step.to(torch.bfloat16).to(torch.float32)
    offset = (weight.view(n, k // GROUP, GROUP) - codes * scale).mean(-1)
    return codes.reshape(n, k).to(torch.int8), scale[..., 0], offset.contiguous()


def int8_weight(weight: Tensor) -> IntxUnpackedToInt8Tensor:
    """weight [n, k] as symmetric int8 codes with one scale per output channel."""
    return IntxUnpackedToInt8Tensor.from_hp(
        weight, (1, weight.shape[1]), torch.int8, activation_quantization=INT8_PER_TOKEN
    )


def int8_linear(source: nn.Linear) -> QuantizedLinear:
    """A linear layer with `int8_weight`."""
    return QuantizedLinear(int8_weight(source.weight.detach()), source.bias)


class Int8Embedding(Int8Rows):
    """The embedding in ExecuTorch's quantized operator."""

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


def head_of(module: Decoder | GenericDecoder) -> nn.Module:
    """The output layer of a captured decoder, which stays in 8 bit."""
    head = module.head if isinstance(module, Decoder) else module.model.get_output_embeddings()
    return head.linear if isinstance(head, AdaptedLinear) else head
