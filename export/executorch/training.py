"""The training program: one step of a Llama-like decoder, forward and backward, over a frozen, quantized base.

The backward pass is written out here, layer by layer, instead of being left to autograd: what a step keeps is then a
matter of these lines (the residual stream, q/k/v rows, attention outputs and gate/up rows of every layer), and the
program consists of the ops of lordba.backends.training.ops alone. docs/on-device-training.md.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lordba.backends.training import ops  # noqa: F401 (registers the ops)
from lordba.backends.training.ops import pack_int4
from lordba.errors import LordbaError

from ..quantize import GROUP, Int8Rows
from .adapted import AdaptedLinear
from .decoder import Attention, Decoder, Layer
from .quantize import int8_weight, split_int4

BLOCK = 256
"""Elements to which the latents of an op are padded: LORDBA_BLOCK of backends/training/optimizer.h."""


class FrozenWeight(nn.Module):
    """A weight [n, k] as the ops of training read it: the codes with which the inference program computes."""

    codes: Tensor
    scales: Tensor | None
    offsets: Tensor | None
    bias: Tensor | None

    def __init__(self, source: nn.Linear | nn.Embedding, bits: int | None) -> None:
        super().__init__()
        weight = source.weight.detach()
        scales: Tensor | None = None
        offsets: Tensor | None = None
        if bits is None:
            codes = weight
        elif isinstance(source, nn.Embedding):
            rows = Int8Rows(source)
            codes, scales = rows.codes, rows.scales
        elif bits == 4 and weight.shape[1] % GROUP == 0:
            codes, scales, offsets = split_int4(weight)
            codes, scales = pack_int4(codes + 8), scales.to(torch.bfloat16)
        else:
            packed = int8_weight(weight)
            codes, scales = packed.qdata, packed.scale.reshape(len(weight), -1)
        for name, value in (("codes", codes), ("scales", scales), ("offsets", offsets)):
            self.register_buffer(name, value)
        bias = getattr(source, "bias", None)
        self.register_buffer("bias", None if bias is None else bias.detach())

    @property
    def weight(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Codes, scales and offsets, as ops take them."""
        return self.codes, self.scales, self.offsets


class TrainLinear(nn.Module):
    """Linear layers that share x, frozen, with their adapters' places in the flat latents."""

    def __init__(self, source: AdaptedLinear, ranks: Mapping[str, int], bits: int | None, offset: int) -> None:
        super().__init__()
        assert isinstance(source.linear, nn.Linear)
        self.frozen = FrozenWeight(source.linear, bits)
        self.d_in, self.d_outs, self.offset = source.d_in, source.d_outs, offset
        paths = source._slot.paths[source._first :][: len(self.d_outs)] if source._slot else []
        self.ranks = [ranks.get(path or "", 0) for path in paths]

    @property
    def size(self) -> int:
        """Elements of this op's latents: A [r, d_in] and B [d_out, r] of each adapted layer."""
        return sum(r * (self.d_in + d_out) for r, d_out in zip(self.ranks, self.d_outs, strict=bool(self.ranks)))

    def forward(self, x: Tensor, latents: Tensor, residual: Tensor | None = None) -> Tensor:
        y = torch.ops.lordba.frozen_linear(x, *self.frozen.weight, self.frozen.bias, residual)
        if not self.size:
            return y
        return torch.ops.lordba.latent_adapter(x, latents, self.offset, self.ranks, self.d_outs, y)

    def backward(self, g: Tensor, x: Tensor, latents: Tensor, gradients: list[Tensor]) -> Tensor:
        """The gradient of x; that of the latents is appended."""
        through = torch.ops.lordba.frozen_linear_backward(g, *self.frozen.weight)
        if not self.size:
            return through
        gx, gl = torch.ops.lordba.latent_adapter_backward(g, x, latents, self.offset, self.ranks, self.d_outs, through)
        gradients.append(gl)
        return gx


class Kept(NamedTuple):
    """What a layer's backward pass needs of its forward pass."""

    x: Tensor
    qkv: Tensor
    attended: Tensor
    middle: Tensor
    gate_up: Tensor


class TrainLayer(nn.Module):
    """One transformer block, forward and backward; `tables` are the rotation's cos and sin [max_len, head_dim]."""

    def __init__(self, source: Layer, ranks: Mapping[str, int], bits: int | None, offset: int) -> None:
        super().__init__()
        attention: Attention = source.attention
        self.attention_norm, self.mlp_norm = source.attention_norm, source.mlp_norm
        self.q_norm, self.k_norm = attention.q_norm, attention.k_norm
        self.heads, self.kv_heads, self.scale = attention.heads, attention.kv_heads, attention.scale
        linears = []
        for linear in (attention.qkv, attention.o, source.gate_up, source.down):
            linears.append(TrainLinear(linear, ranks, bits, offset))
            offset = padded(offset + linears[-1].size)
        self.qkv, self.o, self.gate_up, self.down = linears
        self.end = offset

    @property
    def linears(self) -> list[TrainLinear]:
        """In the order of the program's modules."""
        return [self.qkv, self.o, self.gate_up, self.down]

    def forward(self, x: Tensor, latents: Tensor, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Kept]:
        qkv = self.qkv(_norm(x, self.attention_norm), latents)
        attended = torch.ops.lordba.causal_attention(qkv, *self._attention(tables))
        middle = self.o(attended, latents, x)
        gate_up = self.gate_up(_norm(middle, self.mlp_norm), latents)
        y = self.down(torch.ops.lordba.swiglu(gate_up), latents, middle)
        return y, Kept(x, qkv, attended, middle, gate_up)

    def backward(
        self, g: Tensor, kept: Kept, latents: Tensor, tables: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Gradients of the layer's input and of its latents, the latter in the order of `linears`."""
        found: list[Tensor] = []
        act = self.down.backward(g, torch.ops.lordba.swiglu(kept.gate_up), latents, found)
        act = torch.ops.lordba.swiglu_backward(act, kept.gate_up)
        act = self.gate_up.backward(act, _norm(kept.middle, self.mlp_norm), latents, found)
        g = _norm_backward(act, kept.middle, self.mlp_norm, g)
        act = self.o.backward(g, kept.attended, latents, found)
        act = torch.ops.lordba.causal_attention_backward(act, kept.qkv, *self._attention(tables))
        act = self.qkv.backward(act, _norm(kept.x, self.attention_norm), latents, found)
        return _norm_backward(act, kept.x, self.attention_norm, g), found[::-1]

    def _attention(self, tables: tuple[Tensor, Tensor]) -> tuple:
        norms = [None if norm is None else norm.weight for norm in (self.q_norm, self.k_norm)]
        eps = 0.0 if self.q_norm is None else self.q_norm.eps
        return *tables, *norms, self.heads, self.kv_heads, self.scale, eps


class TrainStep(nn.Module):
    """tokens, targets int64 [1, T], weight [1], latents [n] -> loss [1], and the latents' gradients op by op.

    The loss is weight * the sum of the cross-entropies of targets that are not -100; targets[i] follows tokens[i].
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, decoder: Decoder, ranks: Mapping[str, int], base_quant: str) -> None:
        super().__init__()
        if decoder.head._slot is not None:
            raise LordbaError("--train: training programs do not train lm_head; export with adapters that leave it out")
        bits = {"int4": 4, "int8": 8, "none": None}[base_quant]
        eight = None if bits is None else 8
        self.embedding = FrozenWeight(decoder.embedding, eight)
        layers: list[TrainLayer] = []
        offset = 0
        for layer in decoder.layers:
            assert isinstance(layer, Layer)
            layers.append(TrainLayer(layer, ranks, bits, offset))
            offset = layers[-1].end
        self.layers = nn.ModuleList(layers)
        self.size = offset
        self.norm = decoder.norm
        assert isinstance(decoder.head.linear, nn.Linear)
        self.head = FrozenWeight(decoder.head.linear, eight)
        self.register_buffer("cos", decoder.cos)
        self.register_buffer("sin", decoder.sin)

    @property
    def adapted(self) -> list[TrainLinear]:
        """The linears with adapters, in the order of the gradients and of the program's modules."""
        return [linear for layer in self._layers() for linear in layer.linears if linear.size]

    def _layers(self) -> list["TrainLayer"]:
        return [layer for layer in self.layers if isinstance(layer, TrainLayer)]

    @property
    def layout(self) -> list[int]:
        """For each of `adapted`: its modules, d_in, and r and d_out of each module (backends/training/trainer.cpp)."""
        return [
            number
            for linear in self.adapted
            for number in (
                len(linear.ranks),
                linear.d_in,
                *(n for pair in zip(linear.ranks, linear.d_outs, strict=True) for n in pair),
            )
        ]

    def forward(self, tokens: Tensor, targets: Tensor, weight: Tensor, latents: Tensor) -> tuple[Tensor, ...]:
        x = torch.ops.lordba.frozen_rows(tokens, self.embedding.codes, self.embedding.scales)
        kept = []
        for layer in self._layers():
            x, of_layer = layer(x, latents, (self.cos, self.sin))
            kept.append(of_layer)
        head = self.head
        loss, g = torch.ops.lordba.head_loss(_norm(x, self.norm), head.codes, head.scales, head.bias, targets, weight)
        g = _norm_backward(g, x, self.norm, None)
        gradients: list[Tensor] = []
        for layer, of_layer in zip(self._layers()[::-1], kept[::-1], strict=True):
            g, found = layer.backward(g, of_layer, latents, (self.cos, self.sin))
            gradients = found + gradients
        return (loss, *gradients)


def padded(offset: int) -> int:
    """The next offset at which the latents of an op may begin."""
    return -(-offset // BLOCK) * BLOCK


def _norm(x: Tensor, norm) -> Tensor:
    return torch.ops.lordba.rms_norm(x, norm.weight, norm.eps)


def _norm_backward(g: Tensor, x: Tensor, norm, add: Tensor | None) -> Tensor:
    return torch.ops.lordba.rms_norm_backward(g, x, norm.weight, norm.eps, add)


@torch.no_grad()
def lower_training(step: TrainStep, max_seq_len: int, fingerprint: str) -> tuple[bytes, list[str]]:
    """The program's bytes and the operators that it needs; the sequence length is dynamic up to max_seq_len.

    `fingerprint` is the base's, by which a checkpoint knows its program.
    """
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge
    from executorch.exir.passes import MemoryPlanningPass

    length = torch.export.Dim("length", min=1, max=max_seq_len)
    ids = torch.zeros(1, 8, dtype=torch.long)
    program = torch.export.export(
        step.eval().requires_grad_(False),
        (ids, ids.clone(), torch.ones(1), torch.zeros(step.size)),
        dynamic_shapes=({1: length}, {1: length}, None, None),
        strict=False,
    )
    edge = to_edge(
        program,
        compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
        constant_methods={
            "get_max_seq_len": max_seq_len,
            "get_training_layout": step.layout,
            "get_base_fingerprint": [int(digit, 16) for digit in fingerprint.removeprefix("sha256:")],
        },
    )
    config = ExecutorchBackendConfig(memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False))
    executorch = edge.to_executorch(config)
    plan = next(plan for plan in executorch.executorch_program.execution_plan if plan.name == "forward")
    operators = sorted(f"{op.name}.{op.overload}" if op.overload else op.name for op in plan.operators)
    return executorch.buffer, operators
