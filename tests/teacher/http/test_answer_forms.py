"""How an answer is written down, where it is hard: characters that take several tokens."""

from __future__ import annotations

from itertools import accumulate

import pytest

from distill.logprobs import TokenLogprobs
from teacher.http.completion_form import TextForm
from teacher.http.completion_request import CompletionRequest

OPENING = "<think>\n"


def spell(*token_ids: int) -> str:
    """A vocabulary of 256 bytes."""
    return bytes(token_ids).decode("utf-8", "replace")


def offsets(data: bytes) -> list[int]:
    form = TextForm(CompletionRequest(model="m", prompt="p", logprobs=0), spell)
    kept = TokenLogprobs("id", [(byte, -1.0) for byte in data], [[] for _ in data])
    return form.logprobs(kept, form.offsets(len(OPENING)))["text_offset"]


@pytest.mark.parametrize("text", ["plain", "é", "a漢字b", "🙂🙂", "x🙂é漢y\n"])
def test_tokens_that_are_one_character_begin_where_it_begins(text: str) -> None:
    whole = OPENING + text
    sizes = [len(character.encode()) for character in text]
    wanted = [len(OPENING) + place for place, size in enumerate(sizes) for _ in range(size)]
    assert offsets(text.encode()) == wanted
    firsts = [0, *accumulate(sizes)][:-1]
    assert [whole[offsets(text.encode())[first]] for first in firsts] == list(text)


def test_bytes_that_never_become_a_character_are_passed_over() -> None:
    """A model may write half a character; what follows is still found, and no offset goes back."""
    data = b"a\x80b\xf0\x9fc" + b"\xff" * 9 + b"tail"
    text, found = OPENING + spell(*data), offsets(data)
    assert found == sorted(found)
    assert [text[place] for place in found[-4:]] == list("tail")
    assert [text[found[place]] for place in (0, 2, 5)] == list("abc")
