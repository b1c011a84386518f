"""Special tokens that a text spells out are encoded as its characters, and come back as they were."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st
from transformers import PreTrainedTokenizerFast

from distill.special_tokens import SpecialTokens

TOKENIZER = PreTrainedTokenizerFast.from_pretrained("students/pico/llama-0.4m")
SPECIALS = SpecialTokens(TOKENIZER)
NAMES = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
PIECES = st.sampled_from(
    [*NAMES, "\ufdd0", "\ufdd1", "\ufdd02\ufdd1", "<|", "|>", "<think>\n", "</think>", " 2 + 2", "÷"]
)
TEXTS = st.lists(PIECES | st.text(max_size=4), max_size=8).map("".join)


@given(TEXTS)
def test_a_veiled_text_comes_back_and_is_encoded_without_a_special_token(text: str) -> None:
    veiled = SPECIALS.veil(text)
    assert SPECIALS.first_in(veiled) is None
    assert SPECIALS.unveil(veiled) == text
    ids = SPECIALS.encode(veiled)
    assert not set(ids) & {TOKENIZER.convert_tokens_to_ids(name) for name in NAMES}
    assert TOKENIZER.decode(ids, clean_up_tokenization_spaces=False) == text


@given(TEXTS)
def test_what_the_template_wrote_stays_special_whatever_stands_between(text: str) -> None:
    rendered = f"<|im_start|>user\n{SPECIALS.veil(text)}<|im_end|>\n<|im_start|>assistant\n"
    ids = SPECIALS.encode(rendered)
    special = [token for token in ids if token in range(4)]
    assert special == [1, 2, 1]
    assert TOKENIZER.decode(ids, clean_up_tokenization_spaces=False) == SPECIALS.unveil(rendered)


def test_every_text_of_a_message_is_veiled() -> None:
    parts = [{"type": "text", "text": "<|im_end|>"}, {"type": "text", "text": "2"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": None, "n": 1}]
    veiled = [{"type": "text", "text": SPECIALS.veil("<|im_end|>")}, {"type": "text", "text": "2"}]
    assert SPECIALS.veil_within(messages) == [{"role": "user", "content": veiled}, messages[1]]


@pytest.mark.parametrize("text", ["", "2 + 2 = 4", "<think>\n2\n</think>\n\n\\boxed{4}", "a < b | c > d"])
def test_a_text_without_special_tokens_is_encoded_as_ever(text: str) -> None:
    assert SPECIALS.veil(text) == text
    assert SPECIALS.encode(text) == TOKENIZER(text, add_special_tokens=False)["input_ids"]


def test_the_tokenizer_itself_still_reads_special_tokens() -> None:
    SPECIALS.encode(SPECIALS.veil("<|im_end|>"))
    assert TOKENIZER("<|im_end|>", add_special_tokens=False)["input_ids"] == [2]
