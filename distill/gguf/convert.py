"""A GGUF file written as a Hugging Face folder in BF16: weights, config, tokenizer, chat template.

Weights go from the file to the folder some rows at a time: dequantised in FP32, turned where the format turns them,
rounded to BF16, written at their place in one safetensors file. Memory holds a few megabytes of them, whatever the
model's size.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from distill.gguf.families import EMBEDDING, Source, read_config, sources
from distill.gguf.header import GgufFile, read_gguf
from distill.gguf.heads import better_matrix, is_tied
from distill.gguf.rows import read_rows
from distill.gguf.tokenizer import build_tokenizer, special_tokens
from distill.manifest import require_space
from distill.progress import Progress, Task, silent
from distill.weights import SINGLE

CHUNK_WEIGHTS = 2**21
BF16_MAX = 3.3895314e38
_MARGIN_BYTES = 64 * 2**20  # tokenizer and config, and room to breathe


def convert_gguf(path: Path, out: Path, *, progress: Progress | None = None) -> None:
    """Write the model in `path` as a checkpoint folder into the empty folder `out`.

    Raises CheckpointError for a file that cannot be read as a Llama, Qwen2 or Qwen3, naming the field; EnvironmentFault
    where the disk has no room for the result, before anything is written.
    """
    file = read_gguf(path)
    config = read_config(file)
    tied = is_tied(file)
    plan = sources(file, config, tied=tied, embedding=better_matrix(file) if tied else EMBEDDING)
    tokenizer = build_tokenizer(file, config["vocab_size"])
    specials = special_tokens(file, tokenizer)
    size_bytes = sum(2 * _num_weights(source) for source in plan.values())
    require_space(out, size_bytes + _MARGIN_BYTES)
    config |= {"tie_word_embeddings": tied, "bos_token_id": specials["bos"], "eos_token_id": specials["eos"]}
    config["pad_token_id"] = specials["pad"]
    _write_json(out / "config.json", config)
    _write_json(out / "generation_config.json", _generation_config(specials))
    _write_tokenizer(file, tokenizer, specials, config, out)
    with (progress or silent()).task(f"convert {path.name}", size_bytes / 1e6, unit="MB") as task:
        _write_weights(file, plan, out / SINGLE, task)


def _generation_config(specials: dict[str, int | None]) -> dict[str, Any]:
    ends = list(dict.fromkeys(specials[name] for name in ("eos", "eot", "eom") if specials[name] is not None))
    return {
        "bos_token_id": specials["bos"],
        "eos_token_id": ends if len(ends) > 1 else next(iter(ends), None),
        "pad_token_id": specials["pad"],
    }


def _write_tokenizer(
    file: GgufFile, tokenizer: Tokenizer, specials: dict[str, int | None], config: dict[str, Any], out: Path
) -> None:
    tokenizer.save(str(out / "tokenizer.json"))
    tokens = {name: None if index is None else tokenizer.id_to_token(index) for name, index in specials.items()}
    settings: dict[str, Any] = {f"{name}_token": tokens[name] for name in ("bos", "eos", "pad", "unk")}
    settings["clean_up_tokenization_spaces"] = False
    settings["model_max_length"] = config["max_position_embeddings"]
    # AutoTokenizer takes tokenizer.json as it is for the one, and has the other's split in its own code.
    settings["tokenizer_class"] = "PreTrainedTokenizerFast" if config["model_type"] == "llama" else "Qwen2Tokenizer"
    _write_json(out / "tokenizer_config.json", settings)
    template = file.text("tokenizer.chat_template", "")
    if template:
        (out / "chat_template.jinja").write_text(template, encoding="utf-8")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_weights(file: GgufFile, plan: dict[str, Source], path: Path, task: Task) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, source in plan.items():
        end = at + 2 * _num_weights(source)
        header[name] = {"dtype": "BF16", "shape": list(source.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # safetensors aligns the data
    with path.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for source in plan.values():
            for chunk in _chunks(file, source):
                rounded = to_bf16(chunk)
                if rounded is None:
                    raise file.fault("has values that are not finite", source.name)
                out.write(rounded.tobytes())
                task.advance(rounded.nbytes / 1e6)


def _chunks(file: GgufFile, source: Source) -> Iterator[np.ndarray]:
    """The tensor's rows in their right order, FP32, a chunk at a time."""
    num_rows = file.tensors[source.name].num_rows
    if source.turned_heads is not None and len(source.shape) == 1:
        yield read_rows(file, source.name)[:, _turned_back(source.shape[0], source.turned_heads)]
        return
    order = np.arange(num_rows) if source.turned_heads is None else _turned_back(num_rows, source.turned_heads)
    step = max(1, CHUNK_WEIGHTS // source.shape[-1])
    for begin in range(0, num_rows, step):
        yield read_rows(file, source.name, order[begin : begin + step])


def _turned_back(num_rows: int, num_heads: int) -> np.ndarray:
    """For each row as Hugging Face has it, where it lies: a head's rows are interleaved halves, here halves again."""
    return np.arange(num_rows).reshape(num_heads, -1, 2).swapaxes(1, 2).ravel()


def to_bf16(values: np.ndarray) -> np.ndarray | None:
    """FP32 values rounded to BF16 (to nearest, ties to even) as uint16; None where one is not finite in it."""
    if not np.abs(values).max(initial=0) <= BF16_MAX:
        return None
    bits = np.ascontiguousarray(values).view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)


def _num_weights(source: Source) -> int:
    return int(np.prod(source.shape, dtype=np.int64))
