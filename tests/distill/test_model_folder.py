"""A model's folder before a library opens it: the bundled ones and DeepSeek's settings pass, what is absurd does not.

Code, pipes and the like are in the box of hostile files (`tests.hostile`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from numpy import zeros
from safetensors.numpy import save_file

from distill.errors import CheckpointError
from distill.model_folder import SIZES, check_model_folder, read_config_json
from tests.repository import REPOSITORY

BUNDLED = sorted(path.parent for path in REPOSITORY.glob("*/pico/**/config.json"))
CONFIG = {"model_type": "llama", "hidden_size": 8, "vocab_size": 4, "num_hidden_layers": 2, "intermediate_size": 16}
SHAPES = {
    "model.embed_tokens.weight": (4, 8),
    "model.layers.0.mlp.gate_proj.weight": (16, 8),
    "model.layers.1.mlp.gate_proj.weight": (16, 8),
}


def folder_of(path: Path, **changes: Any) -> Path:
    (path / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    save_file({name: zeros(shape, "float16") for name, shape in SHAPES.items()}, path / "model.safetensors")
    return path


@pytest.mark.parametrize("folder", BUNDLED, ids=lambda folder: folder.name)
def test_bundled_folders_pass(folder: Path) -> None:
    assert check_model_folder(folder)["model_type"] in ("deepseek_v3", "qwen2", "llama")


def test_deepseeks_own_config_passes_its_code_unused(tmp_path: Path) -> None:
    """config.json of DeepSeek-R1 names its authors' code; the engine has the architecture itself."""
    names = {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}
    settings = {"model_type": "deepseek_v3", "auto_map": names, "hidden_size": 7168, "vocab_size": 129_280,
                "num_hidden_layers": 61, "q_lora_rank": None, "eos_token_id": [0, 1]}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert read_config_json(tmp_path) == settings
    (tmp_path / "config.json").write_text(json.dumps({**settings, "vision": {"auto_map": names}}))
    with pytest.raises(CheckpointError, match=r"config\.json: vision\.auto_map: names Python code, which is not run"):
        read_config_json(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": names}))
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: auto_map"):
        read_config_json(tmp_path)


@pytest.mark.parametrize("field", SIZES)
def test_every_size_is_a_whole_number_within_its_bounds(tmp_path: Path, field: str) -> None:
    least, most = SIZES[field]
    for value in (least, most, None):
        assert read_config_json(folder_of(tmp_path, **{field: value}))[field] == value
    for value in (
        least - 1,
        most + 1,
        10**18,
        1.0,
        1e300,
        True,
        "8",
        [8, "8"],
        {},
        float("nan"),
        float("inf"),
        10**4000,
    ):
        with pytest.raises(
            CheckpointError, match=rf"config\.json: {field}: must be a whole number from {least} to {most}"
        ):
            read_config_json(folder_of(tmp_path, **{field: value}))


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("vocab_size", 5, r"the weights have \[4, 8\] for model\.embed_tokens\.weight, config\.json says \[5, 8\]"),
        ("hidden_size", 16, r"the weights have \[4, 8\]"),
        ("intermediate_size", 32, r"the weights have \[16, 8\] for model\.layers\.0\.mlp\.gate_proj\.weight"),
        ("num_hidden_layers", 3, "is 3, the weights have 2"),
    ],
)
def test_config_and_weights_must_agree(tmp_path: Path, field: str, value: int, says: str) -> None:
    assert check_model_folder(folder_of(tmp_path)) == CONFIG
    with pytest.raises(CheckpointError, match=says):
        check_model_folder(folder_of(tmp_path, **{field: value}))


def test_pickles_beside_safetensors_are_left_alone_and_alone_are_refused(tmp_path: Path) -> None:
    (folder_of(tmp_path) / "training_args.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    check_model_folder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no such file.*; training_args\.bin is a pickle, which can run code"):
        check_model_folder(tmp_path)
