"""The portable training program: standard operators alone, joint forward and backward graph, named parameters.

For ExecuTorch's own TrainingModule, as in the stock Android AAR, and for any transformers decoder. Frozen weights are
int8 codes (also those of 4 bits, which standard operators cannot unpack), made dense where they are used: the backward
pass does it again, or every dense weight of the model would be kept from one pass to the other.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model import check_plain_attention, with_attention
from ..quantize import GROUP, Int8Rows, replace_layers
from .quantize import int8_weight, split_int4

ATTENTION_NAME = "lordba_training"
IGNORED = -100


class DenseLinear(nn.Module):
    """A frozen linear layer whose codes become a dense weight at every call."""

    codes: Tensor
    scales: Tensor
    offsets: Tensor | None
    bias: Tensor | None

    def __init__(self, source: nn.Linear, bits: int) -> None:
        super().__init__()
        weight = source.weight.detach()
        self.in_features, self.out_features = source.in_features, source.out_features
        offsets: Tensor | None = None
        if bits == 4 and source.in_features % GROUP == 0:
            codes, scales, offsets = split_int4(weight)
        else:
            packed = int8_weight(weight)
            codes, scales = packed.qdata, packed.scale.reshape(len(weight), -1)
        for name, value in (("codes", codes), ("scales", scales), ("offsets", offsets), ("bias", source.bias)):
            self.register_buffer(name, None if value is None else value.detach())

    @property
    def weight(self) -> Tensor:
        """The weight [n, k] with which the inference program computes."""
        n, groups = self.scales.shape
        dense = self.codes.to(torch.float32).view(n, groups, -1) * self.scales[..., None]
        return (dense if self.offsets is None else dense + self.offsets[..., None]).view(n, -1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class DenseRows(Int8Rows):
    """An embedding of int8 codes."""

    def forward(self, tokens: Tensor) -> Tensor:
        codes, scales = self.codes[tokens].to(torch.float32), self.scales[tokens]
        return (codes.unflatten(-1, (scales.shape[-1], -1)) * scales[..., None]).flatten(-2)


class PortableAdapter(nn.Module):
    """A linear layer and its latents, the straight-through maths of lordba/training/ste.py left to autograd."""

    def __init__(self, base: nn.Module, d_in: int, d_out: int, r: int, generator: torch.Generator) -> None:
        super().__init__()
        self.base = base
        bound = 1 / math.sqrt(d_in)
        self.lordba_A = nn.Parameter((2 * torch.rand(r, d_in, generator=generator) - 1) * bound)
        self.lordba_B = nn.Parameter(torch.zeros(d_out, r))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(F.linear(x, envelope(self.lordba_A)), envelope(self.lordba_B))


def envelope(latent: Tensor) -> Tensor:
    """sign(M) * p q^T / mean|M| with the identity as its gradient."""
    with torch.no_grad():
        size = latent.abs()
        scale = size.mean(1, keepdim=True) * size.mean(0, keepdim=True)
        value = torch.where(latent >= 0, 1.0, -1.0) * scale / size.mean().clamp_min(torch.finfo(torch.float32).tiny)
    return value.detach() + (latent - latent.detach())


def eager_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, scaling=None, **unsupported: object
) -> tuple[Tensor, None]:
    """transformers' attention interface, causal, in standard operators: [1, heads, T, D] -> [1, T, heads, D]."""
    check_plain_attention(unsupported, "the training program")
    group = query.shape[1] // key.shape[1]
    key, value = (t[:, :, None].expand(-1, -1, group, -1, -1).flatten(1, 2) for t in (key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    at = torch.arange(query.shape[2])
    hidden = torch.where(at[None, :] > at[:, None], -torch.inf, 0.0)
    return ((scores + hidden).softmax(-1) @ value).transpose(1, 2), None


class PortableStep(nn.Module):
    """tokens, labels int64 [1, T] -> the mean cross-entropy of labels that are not -100; labels[i] follows tokens[i]"""

    def __init__(self, model: Any, ranks: Mapping[str, int], base_quant: str) -> None:
        super().__init__()
        self.model = with_attention(model, ATTENTION_NAME, eager_attention)
        self.model.requires_grad_(False)
        sizes = {path: self.model.get_submodule(path) for path in ranks}
        shapes = {path: (layer.in_features, layer.out_features) for path, layer in sizes.items()}
        replace_layers(self.model, self.model.get_output_embeddings(), base_quant, DenseLinear, DenseRows)
        generator = torch.Generator().manual_seed(0)
        for path, r in ranks.items():
            adapter = PortableAdapter(self.model.get_submodule(path), *shapes[path], r, generator)
            self.model.set_submodule(path, adapter)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1])[None]
        logits = self.model(input_ids=tokens, position_ids=positions, use_cache=False).logits
        return F.cross_entropy(logits[0], labels[0], ignore_index=IGNORED)


def portable_program(
    model: Any, ranks: Mapping[str, int], base_quant: str, max_seq_len: int
) -> tuple[bytes, list[str]]:
    """The program's bytes and the operators beyond ExecuTorch's standard ones that it needs: none."""
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge
    from torch.export.experimental import _export_forward_backward

    step = PortableStep(model, ranks, base_quant).train()
    ids = torch.zeros(1, 8, dtype=torch.long)
    length = torch.export.Dim("length", min=2, max=max_seq_len)
    program = torch.export.export(step, (ids, ids.clone()), dynamic_shapes=({1: length}, {1: length}), strict=False)
    joint = _export_forward_backward(program)
    make_dense_again(joint.graph_module, joint.graph_signature)
    edge = to_edge(joint, compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True))
    executorch = edge.to_executorch(ExecutorchBackendConfig())
    plan = next(plan for plan in executorch.executorch_program.execution_plan if plan.name == "forward")
    foreign = sorted(op.name for op in plan.operators if not op.name.startswith(("aten::", "executorch_prim::")))
    return executorch.buffer, foreign


def make_dense_again(module: torch.fx.GraphModule, signature) -> None:
    """Give every use of a dense weight its own conversion from codes, so that none outlives its use."""
    constants = set(signature.inputs_to_buffers)
    frozen: set[torch.fx.Node] = set()
    for node in list(module.graph.nodes):
        if node.op == "placeholder" and node.name in constants:
            frozen.add(node)
        elif node.op == "call_function":
            if node.target is torch.ops.aten.empty_permuted.default:  # of silu's backward pass; ExecuTorch has it not
                node.target, node.args, node.kwargs = torch.ops.aten.full.default, (node.args[0], 0.0), {}
            elif node.all_input_nodes and frozen.issuperset(node.all_input_nodes):
                frozen.add(node)
    made = [node for node in module.graph.nodes if node in frozen and node.op == "call_function"]
    for node in reversed(made):
        for user in list(node.users)[1:]:
            with module.graph.inserting_before(user):
                user.replace_input_with(node, module.graph.node_copy(node))
    module.graph.eliminate_dead_code()
    module.recompile()
