"""A rendered prompt in words: what the model is given around a question, and what its template says on its own account.

An instruct model's template may bring a system turn along that nobody asked for ("You are ..., a helpful assistant",
today's date): what it says is part of every sample.
"""

from __future__ import annotations

import re

SHOWN_CHARACTERS = 240
MARKER = re.compile(r"<[|｜][^<>]*[|｜]>|</?s>|\[/?INST\]")
ROLES = {"system", "user", "human", "assistant"}


def own_words(prompt: str, question: str) -> str:
    """What stands before the question besides markers and names of roles.

    >>> own_words("<|im_start|>system\\nBe kind.<|im_end|>\\n<|im_start|>user\\n1 + 1?<|im_end|>\\n", "1 + 1?")
    'Be kind.'
    """
    pieces = (piece.strip() for piece in MARKER.sub("\n", prompt.partition(question)[0]).splitlines())
    return " ".join(piece for piece in pieces if piece and piece.lower().rstrip(":") not in ROLES)


def describe_prompt(prompt: str, question: str, system_prompt: str | None = None) -> str:
    """The prompt in one line, with QUESTION for the question; before it, what the template adds, where it does.

    `system_prompt` was asked for: those are no words of the template's.
    """
    shown = prompt.replace(question, "QUESTION")
    shown = shown if len(shown) <= SHOWN_CHARACTERS else f"{shown[:SHOWN_CHARACTERS]}…"
    added = own_words(prompt.replace(system_prompt.strip(), "") if system_prompt else prompt, question)
    return (f"the template itself adds {added!r}; " if added else "") + f"prompt {shown!r}"
