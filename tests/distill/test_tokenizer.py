"""Tokenizers of our own: any text comes back, digits stand alone, operators carry their spaces."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given, settings, strategies as st
from tokenizers import Tokenizer

from distill.problems.stream import pico_families, stream
from distill.problems.worked import worked_solution
from distill.tokenizer import train_tokenizer

SPECIAL = ("<|pad|>", "<|end|>")
PLAIN = ("<think>", "</think>")
VOCAB_SIZE = 480


def pico_texts() -> list[str]:
    return [
        text
        for family, parameters in pico_families().items()
        for problem in itertools.islice(stream(family, parameters, seed=41, split="train"), 40)
        for text in (problem.prompt, worked_solution(problem))
    ]


def make(texts: list[str]) -> Tokenizer:
    return train_tokenizer(texts, vocab_size=VOCAB_SIZE, special_tokens=SPECIAL, plain_tokens=PLAIN)


TEXTS = pico_texts()
TOKENIZER = make(TEXTS)
PIECES = st.sampled_from([*SPECIAL, *PLAIN, " + ", " - ", "\n", "\n\n", "  ", "12", "-7", "\\boxed{", "légs", "\u2009"])
ANY_TEXT = st.text() | st.lists(st.text(max_size=8) | PIECES).map("".join)


@settings(max_examples=400, deadline=None)
@given(ANY_TEXT)
def test_any_text_comes_back(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text).ids, skip_special_tokens=False) == text


@settings(max_examples=200, deadline=None)
@given(ANY_TEXT)
def test_it_comes_back_from_the_stored_form_too(text: str) -> None:
    stored = Tokenizer.from_str(TOKENIZER.to_str())
    assert stored.encode(text).ids == TOKENIZER.encode(text).ids


@settings(max_examples=200, deadline=None)
@given(ANY_TEXT)
def test_a_digit_is_a_token(text: str) -> None:
    for token in TOKENIZER.encode(text).tokens:
        assert len(token) == 1 or not re.search("[0-9]", token)


def test_no_token_of_the_vocabulary_joins_a_digit() -> None:
    assert [token for token in TOKENIZER.get_vocab() if len(token) > 1 and re.search("[0-9]", token)] == []
    assert {str(digit) for digit in range(10)} <= TOKENIZER.get_vocab().keys()


@pytest.mark.parametrize("operator", [" + ", " - ", " * ", " / ", " = "])
def test_an_operator_with_its_spaces_is_a_token(operator: str) -> None:
    tokens = TOKENIZER.encode(f"4{operator}5").ids
    assert [TOKENIZER.decode([token]) for token in tokens] == ["4", operator, "5"]


def test_special_tokens_vanish_when_decoding_and_plain_ones_stay() -> None:
    ids = TOKENIZER.encode("<|pad|><think>\n1</think><|end|>").ids
    assert [TOKENIZER.token_to_id(token) for token in SPECIAL] == [0, 1]
    assert ids[0] == 0
    assert ids[-1] == 1
    assert len(ids) == 6
    assert TOKENIZER.decode(ids) == "<think>\n1</think>"


def test_the_vocabulary_keeps_its_size_and_every_id_is_used() -> None:
    assert sorted(TOKENIZER.get_vocab().values()) == list(range(VOCAB_SIZE))


def test_equal_texts_give_equal_tokenizers() -> None:
    assert make(TEXTS).to_str() == TOKENIZER.to_str()
