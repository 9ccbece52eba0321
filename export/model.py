"""transformers models as every target needs them: another attention, heads and layers of their own."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lordba.errors import LordbaError

# dynamic changes only beyond max_position_embeddings, which no program exceeds
STATIC_ROPES = ("default", "linear", "dynamic", "llama3", "yarn")


def with_attention(model: Any, name: str, attention: Callable[..., tuple[Tensor, None]]) -> Any:
    """A copy of the model's structure, sharing its weights, that runs this attention and makes no mask of its own.

    Its head has a weight of its own, and every linear layer is an nn.Linear.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if getattr(model.config, "num_attention_heads", None) is None or not getattr(
        model, "_supports_attention_backend", False
    ):
        raise LordbaError(
            f"the generic path needs a decoder whose attention is configurable; {type(model).__name__} has none"
        )
    model = copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})
    ALL_ATTENTION_FUNCTIONS.register(name, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, lambda *args, **kwargs: None)
    model.config._attn_implementation = name
    output = model.get_output_embeddings()
    if output is not None and output.weight is model.get_input_embeddings().weight:
        # Embedding and head are quantized apart, and tied weights do not export.
        model.set_output_embeddings(side_by_side(output))
        model.config.tie_word_embeddings = False
    for path, layer in list(model.named_modules()):
        if type(layer).__name__ == "Conv1D":  # GPT-2's linear layer, weight transposed
            model.set_submodule(path, as_linear(layer))
    return model


def check_length(config: Any, max_seq_len: int) -> None:
    """Refuse a --max-seq-len that the model does not take."""
    limit = getattr(config, "max_position_embeddings", max_seq_len)
    if not 2 <= max_seq_len <= limit:
        raise LordbaError(f"--max-seq-len {max_seq_len}: the model {config.model_type} takes 2 to {limit} tokens")


def check_plain_attention(further: Mapping[str, object], who: str) -> None:
    """Refuse a model whose attention asks for more, in `further` arguments, than causal attention over all tokens."""
    if further.get("sliding_window") is not None or further.get("softcap") is not None:
        raise LordbaError(f"{who} has no sliding-window or soft-capped attention, which this model uses")


def cache_shape(config: Any) -> tuple[int, int, int]:
    """Layers, heads of keys and values, and their width."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return config.num_hidden_layers, kv_heads, head_dim


def side_by_side(*layers: nn.Linear) -> nn.Linear:
    """One new linear layer whose output is the outputs of these, concatenated; the source model stays as it is."""
    biases: list[Tensor] = [layer.bias for layer in layers]
    with torch.device("meta"):
        joined = nn.Linear(layers[0].in_features, sum(layer.out_features for layer in layers), biases[0] is not None)
    joined.weight = nn.Parameter(torch.cat([layer.weight for layer in layers]), requires_grad=False)
    if biases[0] is not None:
        joined.bias = nn.Parameter(torch.cat(biases), requires_grad=False)
    return joined


def as_linear(layer: Any) -> nn.Linear:
    """GPT-2's Conv1D, weight [d_in, d_out], as the linear layer that it is."""
    d_in, d_out = layer.weight.shape
    linear = nn.Linear(d_in, d_out, device="meta")
    linear.weight = nn.Parameter(layer.weight.detach().t().contiguous(), requires_grad=False)
    linear.bias = layer.bias
    return linear
