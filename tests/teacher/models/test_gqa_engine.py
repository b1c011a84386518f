"""Qwen2, Qwen3 and Llama on the engine: the greedy tokens of transformers' `generate`, whatever is switched on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors.torch import load_file, save_file

from distill.errors import CheckpointError
from teacher.engine.engine import Engine
from teacher.engine.sequence import Sequence
from teacher.models.gqa.config import parse_gqa_config
from teacher.models.gqa.model import GqaModel
from tests.repository import REPOSITORY

STUDENTS = REPOSITORY / "students" / "pico"
CPU = torch.device("cpu")
LLAMA3 = {
    "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128, "rope_theta": 10_000.0,
}  # fmt: skip
ROPES = [{"rope_type": "default", "rope_theta": 10_000.0}, {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e3}]
FEATURES: list[dict[str, Any]] = [
    {},
    {"max_chunk": 7, "prefix_caching": False},
    {"max_chunk": 64, "max_step_tokens": 65, "batch_size": 3},
    {"num_pages": 8},
    {"num_pages": 8, "prefix_caching": False, "max_chunk": 33},
    {"batch_size": 1, "run_ahead": True},
]


def save_random(folder: Path, family: str, seed: int = 0, max_shard_size: str = "5GB", **changes: Any) -> Any:
    """A folder of this family with random weights, norms and biases included; returns transformers' model."""
    fields = {
        "vocab_size": 80, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 512, "tie_word_embeddings": False,
        "bos_token_id": None, "eos_token_id": 5, "pad_token_id": 0,
    }  # fmt: skip
    config = transformers.AutoConfig.for_model(family, **(fields | changes))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2, generator=generator)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


def prompts() -> list[list[int]]:
    """Prompts that share pages, end on a page's edge, are equal, or span several chunks."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randint(6, 64, (300,), generator=generator).tolist()
    return [base[:n] for n in (1, 5, 64, 65, 130, 300)] + [base[:130], [*base[:70], 7, 8], [9, *base[:100]]]


def ours(model: GqaModel, rows: list[list[int]], num_tokens: int = 12, **features: Any) -> list[list[int]]:
    engine = Engine(model, **{"batch_size": 16, "eos_token_ids": ()} | features)
    engine.runner.cache.entries_LPSE.fill_(float("nan"))  # what memory may hold before it is cleared
    done = {s.key: s for s in engine.run([Sequence(n, row, num_tokens, seed=n) for n, row in enumerate(rows)])}
    assert engine.blocks.num_available == engine.blocks.num_pages
    return [done[n].generated_ids for n in range(len(rows))]


def theirs(peer: Any, rows: list[list[int]], num_tokens: int = 12) -> list[list[int]]:
    limits = {"max_new_tokens": num_tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    peer.generation_config = transformers.GenerationConfig()
    found = []
    for row in rows:
        ids = torch.tensor([row])
        found.append(peer.generate(ids, attention_mask=torch.ones_like(ids), **limits)[0, len(row) :].tolist())
    return found


@pytest.mark.parametrize("features", FEATURES, ids=str)
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_greedy_tokens_equal_transformers(tmp_path: Path, family: str, features: dict[str, Any]) -> None:
    peer = save_random(tmp_path, family)
    assert ours(GqaModel.load(tmp_path, CPU), prompts(), **features) == theirs(peer, prompts())


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    family=st.sampled_from(["qwen2", "qwen3", "llama"]),
    heads=st.sampled_from([(1, 1), (2, 1), (4, 2), (6, 2), (3, 3), (8, 1)]),
    head_dim=st.sampled_from([8, 12, 16]),
    tied=st.booleans(),
    bias=st.booleans(),
    rope=st.sampled_from([*ROPES, LLAMA3]),
    chunk=st.sampled_from([5, 64, 500]),
    seed=st.integers(0, 1_000),
)
def test_every_shape_and_rotation(
    tmp_path_factory: pytest.TempPathFactory,
    family: str,
    heads: tuple[int, int],
    head_dim: int,
    tied: bool,
    bias: bool,
    rope: dict[str, Any],
    chunk: int,
    seed: int,
) -> None:
    folder = tmp_path_factory.mktemp("model")
    width = heads[0] * head_dim if family == "qwen2" else 48  # Qwen2 has no width of heads that is its own
    kind = {"attention_bias": bias} if family != "qwen2" else {}
    kind |= {"mlp_bias": bias} if family == "llama" else {}
    peer = save_random(
        folder, family, seed, hidden_size=width, num_attention_heads=heads[0], num_key_value_heads=heads[1],
        head_dim=head_dim, tie_word_embeddings=tied, rope_parameters=rope, **kind,
    )  # fmt: skip
    rows = [prompts()[n] for n in (1, 4, 5)]
    found = ours(GqaModel.load(folder, CPU), rows, num_tokens=4, max_chunk=chunk)
    shutil.rmtree(folder)
    assert found == theirs(peer, rows, num_tokens=4)


@pytest.mark.parametrize("name", ["qwen2-0.2m", "qwen2-0.4m", "qwen2-0.8m", "llama-0.4m"])
def test_greedy_tokens_of_the_bundled_bases(name: str) -> None:
    peer = transformers.AutoModelForCausalLM.from_pretrained(STUDENTS / name, dtype=torch.float32).eval()
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(STUDENTS / name)
    texts = ["What is 12 + 30 - 7?", "12 + 30 = ", "Sort: 9 3 5", "x" * 150, "12 mod 5 = "]
    rows = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    model, wanted = GqaModel.load(STUDENTS / name, CPU), theirs(peer, rows, num_tokens=40)
    for features in FEATURES[:5]:
        assert ours(model, rows, num_tokens=40, **features) == wanted, features


# --- folders ----------------------------------------------------------------------------------------------------------


def test_several_shards_are_one_model(tmp_path: Path) -> None:
    peer = save_random(tmp_path, "qwen2", max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert ours(GqaModel.load(tmp_path, CPU), prompts()[:2]) == theirs(peer, prompts()[:2])


def test_a_tied_head_that_is_stored_too_is_not_read(tmp_path: Path) -> None:
    peer = save_random(tmp_path, "llama", tie_word_embeddings=True)
    state = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in state
    state["lm_head.weight"] = torch.zeros(80, 48)
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(6)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert ours(GqaModel.load(tmp_path, CPU), prompts()[:2]) == theirs(peer, prompts()[:2])


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"model_type": "mistral"}, "model_type"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3 does not divide"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_parameters.rope_type"),
        ({"rope_parameters": None, "rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_scaling.rope_type"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        ({"use_sliding_window": True, "sliding_window": 100, "layer_types": None, "max_window_layers": 1}, "sliding"),
        ({"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 64}, "sliding_window"),
        ({"layer_types": ["linear_attention"]}, "layer_types"),
        ({"hidden_size": None}, "hidden_size"),
        ({"vocab_size": "many"}, "vocab_size"),
    ],
    ids=str,
)
def test_what_would_change_the_result_is_refused(tmp_path: Path, change: dict[str, Any], field: str) -> None:
    save_random(tmp_path, "qwen2")
    tree = json.loads((tmp_path / "config.json").read_text()) | change
    with pytest.raises(CheckpointError) as caught:
        parse_gqa_config(tree, tmp_path / "config.json")
    assert str(tmp_path / "config.json") in str(caught.value)
    assert field in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"use_sliding_window": True, "sliding_window": 512, "layer_types": ["sliding_attention"] * 2},
        {"use_sliding_window": True, "sliding_window": 9, "layer_types": None, "max_window_layers": 2},
        {"use_sliding_window": False, "sliding_window": 9, "layer_types": None, "max_window_layers": 0},
    ],
)
def test_windows_that_change_nothing_are_taken(tmp_path: Path, change: dict[str, Any]) -> None:
    save_random(tmp_path, "qwen2")
    tree = json.loads((tmp_path / "config.json").read_text())
    assert parse_gqa_config(tree | change, "config.json") == parse_gqa_config(tree, "config.json")


def test_damaged_weights_are_one_line(tmp_path: Path) -> None:
    save_random(tmp_path, "qwen3")
    whole = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.self_attn.k_norm.weight"
    for changed, said in (
        ({name: None}, "missing tensor"),
        ({name: whole[name][:5]}, "must have shape [12]"),
        ({name: whole[name] * float("nan")}, "12 values that are not finite"),
        ({"model.layers.2.mlp.up_proj.weight": whole[name].clone()}, "unknown tensor"),
    ):
        state = {key: tensor.contiguous() for key, tensor in (whole | changed).items() if tensor is not None}
        save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError) as caught:
            GqaModel.load(tmp_path, CPU)
        assert said in str(caught.value)
        assert "model.safetensors" in str(caught.value)
