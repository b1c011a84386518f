"""GGUF files that are damaged or lie: one line with file and field, never a crash, never memory for what is claimed."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from hypothesis import given, settings, strategies as st

from distill.errors import CheckpointError
from distill.gguf.convert import convert_gguf
from distill.gguf.header import read_gguf
from tests.distill.gguf.tiny_files import make_model, qwen2_tokenizer, smollm_tokenizer, write_gguf

TOKENIZER = qwen2_tokenizer()
VOCABULARY = TOKENIZER.get_vocab_size()
NAMED = b"blk.0.attn_q.weight"
ARRAY = 9  # the type of a GGUF value


def make_file(path: Path, **options: Any) -> Path:
    return write_gguf(path, make_model("qwen2", VOCABULARY), TOKENIZER, pre="qwen2", **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return make_file(tmp_path_factory.mktemp("gguf") / "whole.gguf").read_bytes()


def fault_of(path: Path) -> str:
    """The one line that converting the file gives; more memory than the file is large would show here."""
    out = path.with_suffix("")
    out.mkdir(exist_ok=True)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError) as raised:
            convert_gguf(path, out)
        assert tracemalloc.get_traced_memory()[1] < 64e6
    finally:
        tracemalloc.stop()
    text = str(raised.value)
    assert text.startswith(f"{path}: ")
    assert "\n" not in text
    assert len(text) < len(str(path)) + 300
    return text


def put(data: bytes, after: bytes, offset: int, form: str, value: int) -> bytes:
    """`data` with one number changed, `offset` bytes after the end of the only occurrence of `after`."""
    assert data.count(after) == 1
    at = data.index(after) + len(after) + offset
    return data[:at] + struct.pack(form, value) + data[at + struct.calcsize(form) :]


HUGE = 2**60
BLOCKS, TOKENS = b"qwen2.block_count", b"tokenizer.ggml.tokens"
CHANGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", "is truncated or not a GGUF file"),
    "another file": (lambda data: b"PK\3\4" + data[4:], "is truncated or not a GGUF file"),
    "big-endian": (lambda data: data[:4] + struct.pack(">I", 3) + data[8:], "version: must be 2 or 3"),
    "version 1": (lambda data: data[:4] + struct.pack("<I", 1) + data[8:], "version: must be 2 or 3"),
    "tensors": (lambda data: data[:8] + struct.pack("<Q", HUGE) + data[16:], f"tensor_count: is {HUGE}, more than"),
    "fields": (lambda data: data[:16] + struct.pack("<Q", HUGE) + data[24:], f"metadata_kv_count: is {HUGE}, more"),
    "a key's length": (
        lambda data: data[:24] + struct.pack("<Q", HUGE) + data[32:],
        "is truncated: 1152921504606846976",
    ),
    "an array's length": (lambda data: put(data, TOKENS, 8, "<Q", HUGE), f"tokenizer.ggml.tokens: is {HUGE}, more"),
    "an array's type": (lambda data: put(data, TOKENS, 4, "<I", 77), "tokenizer.ggml.tokens: has a type that nobody"),
    "nested arrays": (lambda data: put(data, TOKENS, 4, "<I", ARRAY), "tokenizer.ggml.tokens: is an array of arrays"),
    "a field's type": (lambda data: put(data, BLOCKS, 0, "<I", 99), "qwen2.block_count: has a type that nobody knows"),
    "layers": (lambda data: put(data, BLOCKS, 4, "<I", 2**31 - 1), "qwen2.block_count: is 2147483647, with"),
    "no layers": (lambda data: put(data, BLOCKS, 4, "<I", 0), "qwen2.block_count: must be a whole number from 1"),
    "no dimensions": (lambda data: put(data, NAMED, 0, "<I", 0), "attn_q.weight: must have 1 to 4 dimensions, got 0"),
    "dimensions": (lambda data: put(data, NAMED, 0, "<I", 2**32 - 1), "attn_q.weight: must have 1 to 4 dimensions"),
    "rows": (lambda data: put(data, NAMED, 12, "<Q", HUGE), "attn_q.weight: is truncated: F16"),
    "rows and columns": (
        lambda data: put(put(data, NAMED, 12, "<Q", 2**62), NAMED, 4, "<Q", 2**62),
        "attn_q.weight: is truncated: F16",
    ),
    "no rows": (lambda data: put(data, NAMED, 12, "<Q", 0), "attn_q.weight: has shape [0, 64]"),
    "other rows": (lambda data: put(data, NAMED, 12, "<Q", 63), "attn_q.weight: has shape [63, 64], must have"),
    "a quantisation": (lambda data: put(data, NAMED, 20, "<I", 250), "attn_q.weight: has a quantisation that nobody"),
    "whole blocks": (lambda data: put(data, NAMED, 20, "<I", int(Kind.Q4_K)), "needs rows of a multiple of 256"),
    "integers": (lambda data: put(data, NAMED, 20, "<I", int(Kind.I16)), "quantisation that cannot be undone: I16"),
    "a place": (lambda data: put(data, NAMED, 24, "<Q", HUGE), "attn_q.weight: is truncated: F16"),
    "the same place": (lambda data: put(data, NAMED, 24, "<Q", 0), "begins within another tensor"),
    "a crooked place": (lambda data: put(data, NAMED, 24, "<Q", 2**40 + 1), "begins within another tensor, or not at"),
    "a stranger": (lambda data: data.replace(NAMED, b"blk.0.attn_z.weight"), "blk.0.attn_q.weight: is missing"),
    "not UTF-8": (lambda data: data.replace(b"<tool_call>", b"<tool\xff\xff\xff\xff\xff>"), "is not UTF-8"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_changed_number_is_one_line(tmp_path: Path, whole: bytes, what: str) -> None:
    change, expected = CHANGES[what]
    path = tmp_path / "bad.gguf"
    path.write_bytes(change(whole))
    assert expected in fault_of(path)


def test_names_that_occur_twice(tmp_path: Path, whole: bytes) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(whole.replace(b"blk.0.attn_q.weight", b"blk.0.attn_k.weight"))
    assert "blk.0.attn_k.weight: occurs twice" in fault_of(path)
    path.write_bytes(whole.replace(b"qwen2.attention.key_length", b"qwen2.attention.head_count"))
    assert "qwen2.attention.head_count: occurs twice" in fault_of(path)


def cuts(size: int) -> Iterator[int]:
    yield from range(0, 3_000, 7)
    yield from range(3_000, size, 977)
    yield size - 1


def test_a_file_cut_anywhere_is_truncated(tmp_path: Path, whole: bytes) -> None:
    path = tmp_path / "cut.gguf"
    for size in cuts(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"cut\.gguf: .*(truncated|can hold)"):
            read_gguf(path)


@settings(max_examples=150)
@given(st.data())
def test_any_bytes_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, whole: bytes, data: st.DataObject
) -> None:
    changed = bytearray(whole)
    head = whole.index(b"output_norm") + 100
    for at in data.draw(st.lists(st.integers(0, head), min_size=1, max_size=4)):
        changed[at] = data.draw(st.integers(0, 255))
    folder = tmp_path_factory.mktemp("any")
    path = folder / "any.gguf"
    path.write_bytes(changed)
    fault = None
    try:
        convert_gguf(path, folder)
    except CheckpointError as exc:
        fault = str(exc)
    assert fault is None or (fault.startswith(str(path)) and fault.isprintable())


FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "experts": ({"qwen2.expert_count": 8}, "qwen2.expert_count: is 8"),
    "partial rotation": ({"qwen2.rope.dimension_count": 8}, "qwen2.rope.dimension_count: is 8"),
    "a window": ({"qwen2.attention.sliding_window": 64}, "qwen2.attention.sliding_window: is 64"),
    "odd heads": ({"qwen2.attention.key_length": 15}, "qwen2.attention.key_length: is 15: heads are rotated in pairs"),
    "values' width": ({"qwen2.attention.value_length": 8}, "qwen2.attention.value_length: is 8"),
    "a stretch": ({"qwen2.rope.scaling.type": "longrope"}, "qwen2.rope.scaling.type: must be none, linear or yarn"),
    "theta": ({"qwen2.rope.freq_base": float("nan")}, "qwen2.rope.freq_base: must be a positive number, got nan"),
    "epsilon": ({"qwen2.attention.layer_norm_rms_epsilon": -1.0}, "rms_epsilon: must be a positive number"),
    "heads": ({"qwen2.attention.head_count": 0}, "head_count: must be a whole number from 1"),
    "heads as text": ({"qwen2.attention.head_count": "4"}, "head_count: must be a whole number from 1 to"),
    "more key heads": ({"qwen2.attention.head_count_kv": 8}, "head_count_kv: must be a whole number from 1 to 4"),
    "another width": ({"qwen2.embedding_length": 32}, "token_embd.weight: has shape"),
    "one of several": ({"split.count": 3}, "split.count: is one of 3 parts"),
    "alignment": ({"general.alignment": 24}, "general.alignment: must be a power of two"),
    "a tokenizer": ({"tokenizer.ggml.model": "bert"}, "tokenizer.ggml.model: no tokenizer that is read: 'bert'"),
    "a split": ({"tokenizer.ggml.pre": "qwen9"}, "tokenizer.ggml.pre: no way to split text that is known: 'qwen9'"),
    "an end": ({"tokenizer.ggml.eos_token_id": 10**6}, "eos_token_id: must be a whole number from 0 to"),
    "a beginning": ({"tokenizer.ggml.add_bos_token": True}, "tokenizer.ggml.bos_token_id: required, but not given"),
    "kinds": ({"tokenizer.ggml.token_type": [1, 2]}, "tokenizer.ggml.token_type: must be an array of"),
    "a token twice": ({"tokenizer.ggml.tokens": ["a"] * VOCABULARY}, "tokenizer.ggml.tokens: has 'a' twice"),
    "many tokens": ({"tokenizer.ggml.tokens": [str(i) for i in range(VOCABULARY + 1)]}, "tokens: has"),
    "a merge": ({"tokenizer.ggml.merges": ["zz q\n\x1b[31m"]}, "tokenizer.ggml.merges[0]: merges what is not in"),
    "a template": ({"tokenizer.chat_template": 7}, "tokenizer.chat_template: must be a string, got 7"),
}


@pytest.mark.parametrize("what", FIELDS)
def test_a_wrong_field_is_one_line(tmp_path: Path, what: str) -> None:
    metadata, expected = FIELDS[what]
    assert expected in fault_of(make_file(tmp_path / "bad.gguf", metadata=metadata))


@pytest.mark.parametrize(
    "field",
    [
        "qwen2.block_count",
        "qwen2.context_length",
        "qwen2.embedding_length",
        "qwen2.feed_forward_length",
        "qwen2.attention.head_count",
        "qwen2.attention.layer_norm_rms_epsilon",
        "tokenizer.ggml.model",
        "tokenizer.ggml.tokens",
        "tokenizer.ggml.merges",
    ],
)
def test_a_missing_field_is_one_line(tmp_path: Path, field: str) -> None:
    assert f"{field}: required, but not given" in fault_of(make_file(tmp_path / "bad.gguf", leave_out=(field,)))


@pytest.mark.parametrize(
    "tensor", ["token_embd.weight", "output_norm.weight", "blk.1.ffn_down.weight", "blk.0.attn_q.bias"]
)
def test_a_missing_tensor_is_one_line(tmp_path: Path, tensor: str) -> None:
    assert f"{tensor}: is missing" in fault_of(make_file(tmp_path / "bad.gguf", leave_out=(tensor,)))


def test_tensors_that_are_no_part_of_the_model(tmp_path: Path) -> None:
    stranger = {"blk.0.attn_q_norm.weight": (np.ones(16, np.float32), Kind.F32)}
    fault = fault_of(make_file(tmp_path / "bad.gguf", extra=stranger))
    assert "blk.0.attn_q_norm.weight: is no tensor of this architecture" in fault
    head = {"output.weight": (np.ones((7, 64), np.float32), Kind.F16)}
    assert "output.weight: has shape [7, 64], must have" in fault_of(make_file(tmp_path / "bad.gguf", extra=head))


@pytest.mark.parametrize("value", [np.nan, np.inf, 3.4e38])
def test_weights_that_are_not_finite(tmp_path: Path, value: float) -> None:
    matrix = np.zeros((64, 64), np.float32)
    matrix[5, 7] = value
    wrong = {"blk.1.attn_output.weight": (matrix, Kind.F32)}
    fault = fault_of(make_file(tmp_path / "bad.gguf", extra=wrong))
    assert "blk.1.attn_output.weight: has values that are not finite" in fault


def test_a_head_without_end(tmp_path: Path, whole: bytes) -> None:
    """A sparse file: its bytes are there, so that only the bound stops a string of 300 MB."""
    path = tmp_path / "bad.gguf"
    path.write_bytes(put(whole, b"tokenizer.chat_template", 4, "<Q", 300_000_000))
    with path.open("r+b") as file:
        file.truncate(2**30)
    assert "tokenizer.chat_template: ends past 268,435,456 bytes" in fault_of(path)


def test_another_architecture(tmp_path: Path, whole: bytes) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(whole.replace(b"qwen2", b"qwen9"))
    assert "general.architecture: no architecture that is read: 'qwen9'; did you mean 'qwen3'?" in fault_of(path)


def test_a_llama_of_unknown_split(tmp_path: Path) -> None:
    """Old files name no split: Qwen has one, of Llamas there are several."""
    tokenizer = smollm_tokenizer()
    model = make_model("llama", tokenizer.get_vocab_size())
    path = write_gguf(tmp_path / "bad.gguf", model, tokenizer, pre="smollm", leave_out=("tokenizer.ggml.pre",))
    assert "tokenizer.ggml.pre: no way to split text that is known: 'default'" in fault_of(path)
