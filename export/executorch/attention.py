"""Causal attention over a static KV cache: ExecuTorch's fused ops in the program, plain PyTorch in eager mode.

Two implementations on purpose: parity then compares the runtime's kernels with an independent reference.
"""

import torch
import torch.nn.functional as F
from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401 (registers llama::update_cache, custom_sdpa)
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, start: int, scale: float) -> Tensor:
    """Write k and v [1, T, kv_heads, head_dim] into the caches at `start`; attend with q [1, T, heads, head_dim].

    Returns [1, T, heads, head_dim]. Heads share keys in groups of heads / kv_heads.
    """
    if torch.compiler.is_exporting():
        torch.ops.llama.update_cache(k, k_cache, start)
        torch.ops.llama.update_cache(v, v_cache, start)
        return torch.ops.llama.custom_sdpa(q, k_cache, v_cache, start, None, 0.0, True, scale)
    end = start + q.shape[1]
    k_cache[:, start:end] = k
    v_cache[:, start:end] = v
    keys, values = (cache[:, :end].transpose(1, 2) for cache in (k_cache, v_cache))
    visible = torch.ones(q.shape[1], end, dtype=torch.bool).tril(start)
    y = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, visible, scale=scale, enable_gqa=True)
    return y.transpose(1, 2)
