"""The least time of a decode step of a bundled model, FP32 on a CPU."""

from __future__ import annotations

from pathlib import Path

from teacher.model.config import read_config
from teacher.models.gqa.config import read_gqa_config
from teacher.models.load import LATENT, read_facts

_BYTES = 4


def step_seconds(folder: Path, batch: int, length: float, flop_per_s: float, bytes_per_s: float) -> float:
    """Arithmetic (active weights, attention over `length` tokens) or traffic (weights, live cache), the larger.

    The embedding is looked up, not multiplied; a tied one is the head too.
    """
    facts = read_facts(folder)
    if facts.model_type == LATENT:
        latent = read_config(folder)
        entry, layers = latent.kv_lora_rank + latent.qk_rope_head_dim, latent.num_hidden_layers
        looked_up = latent.vocab_size * latent.hidden_size
        attention = 2 * latent.num_attention_heads * (entry + latent.kv_lora_rank)
    else:
        config = read_gqa_config(folder)
        entry, layers = 2 * config.num_key_value_heads * config.head_dim, config.num_hidden_layers
        looked_up = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
        attention = 4 * config.num_attention_heads * config.head_dim
    live = batch * length * layers
    flop = 2 * (facts.num_active - looked_up) * batch + live * attention
    traffic = _BYTES * (facts.num_parameters - looked_up + live * entry)
    return max(flop / flop_per_s, traffic / bytes_per_s)
