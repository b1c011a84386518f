"""Converted GGUF files against the models that they were made of: weights, logits, greedy tokens, prompts."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from distill.errors import CheckpointError, EnvironmentFault
from distill.gguf import checkpoint_folder
from distill.gguf.convert import convert_gguf, to_bf16
from distill.weights import stored_tensors
from teacher.backends import check_folder
from tests.distill.gguf.tiny_files import (
    TEXTS,
    kinds_of,
    llama3_tokenizer,
    make_model,
    qwen2_tokenizer,
    rounded,
    smollm_tokenizer,
    write_gguf,
)

TOKENIZERS = {"llama": ("smollm", smollm_tokenizer), "qwen2": ("qwen2", qwen2_tokenizer)}
TOKENIZERS["qwen3"] = TOKENIZERS["qwen2"]


def converted(path: Path) -> Path:
    out = path.with_suffix("")
    out.mkdir()
    convert_gguf(path, out)
    check_folder(out, as_student=True)
    return out


def opened(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def assert_same(theirs: PreTrainedModel, ours: PreTrainedModel) -> None:
    """Equal to the last bit: both hold the same BF16 numbers and run the same code."""
    ids = torch.arange(7, 47)[None]
    with torch.no_grad():
        assert torch.equal(theirs(ids).logits, ours(ids).logits)
    options = {"do_sample": False, "max_new_tokens": 24, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(theirs.generate(ids, **options), ours.generate(ids, **options))


@pytest.mark.parametrize("matrices", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q5_1, Kind.Q5_0, Kind.Q4_1])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_weights_logits_and_prompts_are_those_of_the_model(tmp_path: Path, family: str, matrices: Kind) -> None:
    pre, make_tokenizer = TOKENIZERS[family]
    tokenizer = make_tokenizer()
    vocab_size = tokenizer.get_vocab_size() + 20
    model = make_model(family, vocab_size, tied=family != "qwen3")
    path = write_gguf(tmp_path / "tiny.gguf", model, tokenizer, pre=pre, matrices=matrices)
    rounded(model, kinds_of(model, matrices))
    folder = converted(path)
    assert_same(model, opened(folder))

    config = json.loads((folder / "config.json").read_text())
    assert config["tie_word_embeddings"] is (family != "qwen3")
    assert config["rms_norm_eps"] == 1e-5
    assert config["eos_token_id"] == tokenizer.token_to_id("<|im_end|>")
    assert config["pad_token_id"] == tokenizer.token_to_id("<|endoftext|>")
    assert ("lm_head.weight" in stored_tensors(folder)) is (family == "qwen3")

    ours, raw = AutoTokenizer.from_pretrained(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert len(ours) == tokenizer.get_vocab_size()
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == raw.encode(text).ids == tokenizer.encode(text).ids
        assert ours.decode(ids) == tokenizer.decode(ids, skip_special_tokens=False)
    assert ours.decode(ours.encode("<tool_call>x<|im_end|>"), skip_special_tokens=True) == "<tool_call>x"
    prompt = ours.apply_chat_template(
        [{"role": "user", "content": "2 + 2?"}], add_generation_prompt=True, tokenize=False
    )
    assert prompt == "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("embedding", "head"), [(Kind.Q5_0, Kind.Q8_0), (Kind.Q8_0, Kind.Q4_0), (Kind.Q4_0, Kind.Q4_1)]
)
def test_a_tied_matrix_that_is_stored_twice_is_the_better_one(tmp_path: Path, embedding: Kind, head: Kind) -> None:
    tokenizer = qwen2_tokenizer()
    model = make_model("qwen2", tokenizer.get_vocab_size())
    matrix = model.model.embed_tokens.weight.detach().numpy()
    extra = {"token_embd.weight": (matrix, embedding), "output.weight": (matrix, head)}
    path = write_gguf(tmp_path / "tiny.gguf", model, tokenizer, pre="qwen2", extra=extra)
    better = max((embedding, head), key=lambda kind: gguf.GGML_QUANT_SIZES[kind][1])
    rounded(model, kinds_of(model, Kind.F16) | {"model.embed_tokens.weight": better})
    folder = converted(path)
    assert "lm_head.weight" not in stored_tensors(folder)
    assert_same(model, opened(folder))


@pytest.mark.parametrize("drift", [0.05, 1.0])
def test_a_head_of_its_own_stays_one(tmp_path: Path, drift: float) -> None:
    """Also one that began as the embedding and was trained apart from it: 5% is ten times what Q8_0 loses."""
    tokenizer = qwen2_tokenizer()
    model = make_model("qwen2", tokenizer.get_vocab_size(), tied=False)
    embedding = model.model.embed_tokens.weight.detach()
    changed = embedding + drift * embedding.std() * torch.randn(
        embedding.shape, generator=torch.Generator().manual_seed(1)
    )
    model.lm_head.weight.data.copy_(changed)
    path = write_gguf(tmp_path / "tiny.gguf", model, tokenizer, pre="qwen2", matrices=Kind.Q8_0)
    rounded(model, kinds_of(model, Kind.Q8_0))
    assert_same(model, opened(converted(path)))


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def llama3_file(path: Path, **changes: object) -> tuple[Path, PreTrainedModel]:
    """A Llama 3.2: stretched frequencies, biases, the token that begins a text."""
    tokenizer = llama3_tokenizer()
    rope = {"rope_parameters": LLAMA3_ROPE, "max_position_embeddings": 131_072}
    model = make_model("llama", tokenizer.get_vocab_size(), attention_bias=True, mlp_bias=True, **rope)
    stretched = model.model.rotary_emb.inv_freq.numpy().astype(np.float64)
    factors = 500_000.0 ** -(np.arange(0, 16, 2) / 16) / stretched
    extra = {"rope_freqs.weight": (np.float32(factors), Kind.F32)}
    options = {"pre": "llama-bpe", "extra": extra, "matrices": Kind.Q8_0, **changes}
    write_gguf(path, model, tokenizer, **options)
    rounded(model, kinds_of(model, Kind.Q8_0))
    return path, model


def test_llama3_with_stretched_frequencies_and_biases(tmp_path: Path) -> None:
    path, model = llama3_file(tmp_path / "tiny.gguf")
    folder = converted(path)
    assert_same(model, opened(folder))
    scaling = json.loads((folder / "config.json").read_text())["rope_scaling"]
    assert scaling == {name: value for name, value in LLAMA3_ROPE.items() if name != "rope_theta"}
    ours, theirs = AutoTokenizer.from_pretrained(folder), llama3_tokenizer()
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text).ids
        assert ours.encode(text)[0] == theirs.token_to_id("<|begin_of_text|>")


def test_a_stretch_that_is_not_llama3s_is_refused(tmp_path: Path) -> None:
    extra = {"rope_freqs.weight": (np.linspace(1, 8, 8, dtype=np.float32), Kind.F32)}
    path, _ = llama3_file(tmp_path / "tiny.gguf", extra=extra)
    with pytest.raises(CheckpointError, match=r"tiny\.gguf: rope_freqs\.weight: are not the factors"):
        converted(path)


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        (
            {"qwen2.rope.scaling.type": "linear", "qwen2.rope.scaling.factor": 4.0},
            {"rope_type": "linear", "factor": 4.0},
        ),
        (
            {
                "qwen2.rope.scaling.type": "yarn",
                "qwen2.rope.scaling.factor": 4.0,
                "qwen2.rope.scaling.original_context_length": 64,
            },
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        ),
        ({"qwen2.rope.scaling.type": "none"}, None),
    ],
)
def test_other_stretches_are_named(tmp_path: Path, metadata: dict[str, object], expected: object) -> None:
    tokenizer = qwen2_tokenizer()
    model = make_model("qwen2", tokenizer.get_vocab_size())
    path = write_gguf(tmp_path / "tiny.gguf", model, tokenizer, pre="qwen2", metadata=metadata)
    out = tmp_path / "out"
    out.mkdir()
    convert_gguf(path, out)
    assert json.loads((out / "config.json").read_text())["rope_scaling"] == expected


def test_rounding_to_bf16_is_torchs() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint32)
    values = bits.view(np.float32)
    values = values[np.abs(values) < 3.3e38]
    expected = torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(to_bf16(values), expected)
    for wrong in (np.nan, np.inf, 3.4e38):
        assert to_bf16(np.array([1, wrong], dtype=np.float32)) is None


def test_a_file_is_converted_once_whatever_it_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path / "cache"))
    tokenizer = qwen2_tokenizer()
    model = make_model("qwen2", tokenizer.get_vocab_size())
    path = write_gguf(tmp_path / "tiny.gguf", model, tokenizer, pre="qwen2")
    folder = checkpoint_folder(path)
    assert folder.name == "tiny"
    made = (folder / "config.json").stat().st_mtime_ns
    moved = path.rename(tmp_path / "other.GGUF")
    assert checkpoint_folder(moved).parent == folder.parent
    assert (checkpoint_folder(moved.rename(path)) / "config.json").stat().st_mtime_ns == made
    changed = write_gguf(
        tmp_path / "tiny2.gguf", make_model("qwen2", tokenizer.get_vocab_size(), seed=1), tokenizer, pre="qwen2"
    )
    assert checkpoint_folder(changed).parent != folder.parent
    assert checkpoint_folder(tmp_path) == tmp_path
    with pytest.raises(CheckpointError, match=r"gone\.gguf: no such file"):
        checkpoint_folder(tmp_path / "gone.gguf")


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is asked for more than any has: a file whose header says so is refused before."""
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("distill.gguf.convert._MARGIN_BYTES", 2**60)
    tokenizer = qwen2_tokenizer()
    path = write_gguf(tmp_path / "tiny.gguf", make_model("qwen2", tokenizer.get_vocab_size()), tokenizer, pre="qwen2")
    with pytest.raises(EnvironmentFault, match=r"GB are needed, [\d.]+ GB are free"):
        checkpoint_folder(path)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and "hashes" not in path.parts]
