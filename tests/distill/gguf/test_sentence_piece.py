"""SentencePiece's vocabularies (Llama 2, TinyLlama, Mistral) against its own rule: always merge the best pair."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as Kind
from transformers import AutoTokenizer

from distill.gguf.convert import convert_gguf
from tests.distill.gguf.tiny_files import make_model, smollm_tokenizer, write_gguf

WORDS = ["▁the", "▁then", "th", "he", "en", "▁t", "the", "▁a", "nd", "and", "▁and", "12", "▁▁"]
CHARACTERS = [*"▁thenad12.,", "é"]
PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS, *CHARACTERS]
KINDS = [2, 3, 3, *[6] * 256, *[1] * (len(WORDS) + len(CHARACTERS))]
SCORES = [0.0] * 259 + [-float(rank) for rank in range(len(WORDS) + len(CHARACTERS))]
TEXTS = ["the then and 1212", " leading and  double", "café, naïve 你", "then\nthen", ""]


def best_pairs_first(text: str, *, prefix: bool) -> list[int]:
    """SentencePiece's BPE (Kudo and Richardson, 1808.06226): the adjacent pair with the best score, leftmost first."""
    score = dict(zip(PIECES[259:], SCORES[259:], strict=True))
    symbols = list(("▁" if prefix and text else "") + text.replace(" ", "▁"))
    while True:
        pairs = [(score[a + b], -i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in score]
        if not pairs:
            break
        at = -max(pairs)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    ids = []
    for symbol in symbols:
        known = symbol in score
        ids += [PIECES.index(symbol)] if known else [3 + byte for byte in symbol.encode()]
    return ids


@pytest.mark.parametrize("prefix", [True, False])
def test_pieces_are_sentence_pieces_own(tmp_path: Path, prefix: bool) -> None:
    model = make_model("llama", len(PIECES), tied=False)
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": PIECES,
        "tokenizer.ggml.token_type": KINDS,
        "tokenizer.ggml.scores": SCORES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": prefix,
    }
    unsaid = ("tokenizer.ggml.merges", "tokenizer.ggml.pre", "tokenizer.ggml.add_bos_token")
    unsaid += ("tokenizer.ggml.padding_token_id",)
    path = tmp_path / "tiny.gguf"
    tokenizer = smollm_tokenizer()
    write_gguf(path, model, tokenizer, pre="default", matrices=Kind.F16, metadata=metadata, leave_out=unsaid)
    out = tmp_path / "out"
    out.mkdir()
    convert_gguf(path, out)
    ours = AutoTokenizer.from_pretrained(out)
    assert (ours.bos_token_id, ours.eos_token_id, ours.unk_token_id, ours.pad_token_id) == (1, 2, 0, None)
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == [1, *best_pairs_first(text, prefix=prefix)]
        assert ours.decode(ids, skip_special_tokens=True) == text
