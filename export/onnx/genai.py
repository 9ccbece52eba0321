"""`genai_config.json`: what onnxruntime-genai reads of a model folder."""

import json
from pathlib import Path

from lordba.models import BaseModel

from ..model import cache_shape

NAME = "genai_config.json"


def write_genai_config(folder: Path, base: BaseModel, program: str, max_seq_len: int, eos_ids: list[int]) -> None:
    """Describe the program for onnxruntime-genai; adapters are loaded by its Adapters object.

    To have our kernel there, a deployment adds `"custom_ops_library": PATH` to the decoder's session options; the
    bundle names none, for it does not know the machine that it will run on.
    """
    config = base.model.config
    layers, kv_heads, head_dim = cache_shape(config)
    tokenizer = base.tokenizer
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else (eos_ids or [0])[0]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (eos_ids or [0])[0]
    kinds = ("key", "value")
    record = {
        "model": {
            "type": "decoder",
            "bos_token_id": bos,
            "eos_token_id": eos_ids or [bos],
            "pad_token_id": pad,
            "vocab_size": config.vocab_size,
            "context_length": max_seq_len,
            "decoder": {
                "filename": program,
                "session_options": {"log_severity_level": 3, "provider_options": []},
                "hidden_size": config.hidden_size,
                "head_size": head_dim,
                "num_attention_heads": config.num_attention_heads,
                "num_key_value_heads": kv_heads,
                "num_hidden_layers": layers,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "position_ids": "position_ids",
                    **{f"past_{kind}_names": f"past_key_values.%d.{kind}" for kind in kinds},
                },
                "outputs": {"logits": "logits", **{f"present_{kind}_names": f"present.%d.{kind}" for kind in kinds}},
            },
        },
        "search": {"max_length": max_seq_len, "do_sample": False, "past_present_share_buffer": False},
    }
    (folder / NAME).write_text(json.dumps(record, indent=2) + "\n")
