"""Weight files judged by their headers, and what identifies a folder."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from distill.errors import CheckpointError
from distill.weights import StoredTensor, folder_identity, stored_tensors, template_hash, weight_files, weights_hash

BASE = Path(__file__).resolve().parents[2] / "students" / "pico" / "qwen2-0.2m"


def write_safetensors(path: Path, header: dict, data: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.fixture
def folder(tmp_path) -> Path:
    return shutil.copytree(BASE, tmp_path / "base")


def test_headers_say_names_types_and_shapes(tmp_path):
    header = {"a": {"dtype": "BOOL", "shape": [3], "data_offsets": [0, 3]}, "__metadata__": {"format": "pt"}}
    write_safetensors(tmp_path / "model.safetensors", header, b"\0\1\0")
    file = tmp_path / "model.safetensors"
    assert stored_tensors(tmp_path) == {"a": StoredTensor(file, "BOOL", (3,))}
    assert weight_files(tmp_path) == [file]


@pytest.mark.parametrize(
    ("entry", "fault"),
    [
        ({"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}, "has type F4; allowed: F64"),
        ({"dtype": "I64", "shape": [1], "data_offsets": [0, 4]}, r"has 4 bytes for I64 \[1\]"),
        ({"dtype": "U8", "shape": [9], "data_offsets": [0, 9]}, "is truncated: 1 bytes are missing"),
        ({"dtype": "U8", "shape": [1]}, "has a damaged entry"),
    ],
)
def test_a_header_that_is_wrong_names_the_tensor(tmp_path, entry, fault):
    write_safetensors(tmp_path / "model.safetensors", {"a": entry}, b"12345678")
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: a: {fault}"):
        stored_tensors(tmp_path)


def test_a_copy_with_other_times_is_the_same_model(folder):
    for path in folder.iterdir():
        os.utime(path, (1, 1))
    settings = {"backend": "b", "backend_version": "1"}
    named = folder_identity(BASE, **settings).model_copy(update={"name": "base"})
    assert folder_identity(folder, **settings) == named


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors"])
def test_weights_are_hashed_with_their_configs(folder, name):
    (folder / name).write_bytes((folder / name).read_bytes() + b" ")
    assert weights_hash(folder) != weights_hash(BASE)
    assert template_hash(folder) == template_hash(BASE)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_the_template_is_hashed_with_its_tokenizer(folder, name):
    path = folder / name
    path.write_bytes((path.read_bytes() if path.exists() else b"") + b" ")
    assert weights_hash(folder) == weights_hash(BASE)
    assert template_hash(folder) != template_hash(BASE)
