"""What `benchmarks.serve` measures: models, batches and lengths, and the floor under a decode step of each.

Another machine's scenarios are another entry of SCENARIOS; every scenario names the engines that can run it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from teacher.model.config import read_config
from teacher.serve.grouped_config import read_grouped_config
from teacher.serve.models import LATENT, read_facts

ROOT = Path(__file__).resolve().parent.parent
ALL = ("ours", "ours, batch-invariant", "transformers", "vllm")


@dataclass(frozen=True)
class Scenario:
    """`batch` requests at once, each with a prompt of `prompt_tokens`; a step's time is the difference between runs of
    `many` and of `few` new tokens, divided by the difference."""

    name: str
    folder: Path
    batch: int
    prompt_tokens: int
    few: int
    many: int
    engines: tuple[str, ...] = ALL
    bytes_per_number: int = 4

    def toy(self) -> Scenario:
        return replace(self, batch=2, prompt_tokens=8, few=1, many=3)


SCENARIOS: dict[str, tuple[Scenario, ...]] = {
    "cpu": (
        Scenario("pico teacher", ROOT / "teacher/pico", batch=64, prompt_tokens=40, few=4, many=132),
        Scenario("qwen2-0.8m", ROOT / "students/pico/qwen2-0.8m", batch=64, prompt_tokens=40, few=4, many=132),
    ),
}


def floor_seconds(scenario: Scenario, flop_per_s: float, bytes_per_s: float) -> float:
    """A decode step's arithmetic (active weights, attention) or its traffic (weights, live cache), the larger.

    At the mean length between the two runs. The embedding is looked up, not multiplied; a tied one is the head too.
    """
    facts = read_facts(scenario.folder)
    length = scenario.prompt_tokens + (scenario.few + scenario.many) / 2
    live = scenario.batch * length
    if facts.model_type == LATENT:
        latent = read_config(scenario.folder)
        entry = latent.kv_lora_rank + latent.qk_rope_head_dim
        layers, looked_up = latent.num_hidden_layers, latent.vocab_size * latent.hidden_size
        attention = 2 * latent.num_attention_heads * (entry + latent.kv_lora_rank)
    else:
        config = read_grouped_config(scenario.folder)
        entry, layers = 2 * config.num_key_value_heads * config.head_dim, config.num_hidden_layers
        looked_up = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
        attention = 4 * config.num_attention_heads * config.head_dim
    flop = 2 * (facts.num_active - looked_up) * scenario.batch + live * layers * attention
    traffic = scenario.bytes_per_number * (facts.num_parameters - looked_up + live * layers * entry)
    return max(flop / flop_per_s, traffic / bytes_per_s)
