"""Reasoning and answer told apart: `<think>`, what was thought, `</think>`, the answer (DeepSeek-R1, arXiv 2501.12948).

Nothing but the tags is lost: the line breaks around them stay, as with vLLM's `deepseek_r1` parser. A text that ends
before `</think>` is reasoning to its end.
"""

from __future__ import annotations

from typing import Literal

from distill.reasoning import END_OF_THINKING, THINK, THINK_LINE
from teacher.engine.stopping import StopStrings

Beginning = Literal["open", "ended", "marked"]


class Reasoning:
    """Splits a text that comes in pieces.

    It begins within the reasoning ("open"), behind it ("ended"), or shows by a `<think>` at its beginning that there is
    any ("marked"). `keeps_tags`: they belong to the reasoning.
    """

    def __init__(self, begins: Beginning = "open", *, keeps_tags: bool = False) -> None:
        self._opening = {"open": THINK_LINE, "ended": "", "marked": THINK}[begins]  # what may still stand in front
        self._must_open = begins == "marked"
        self._keeps_tags = keeps_tags
        self._seen = ""
        self._end = None if begins == "ended" else StopStrings([END_OF_THINKING])

    def feed(self, piece: str) -> tuple[str, str]:
        """Take a piece; return what of the reasoning and of the answer is certain now and was not before."""
        if self._opening:
            self._seen += piece
            if len(self._seen) < len(self._opening) and self._opening.startswith(self._seen):
                return "", ""
            piece = self._begun()
        if self._end is None:
            return "", piece
        thought, answer = self._end.feed(piece), self._end.behind
        if self._end.found is not None:
            self._end = None
            thought += END_OF_THINKING if self._keeps_tags else ""
        return thought, answer

    def rest(self) -> tuple[str, str]:
        """Return what was held back, now that the text has ended."""
        if self._opening and self._must_open:
            return "", self._begun()
        seen, self._seen = self._seen, ""
        return seen + ("" if self._end is None else self._end.rest()), ""

    def _begun(self) -> str:
        """What has come, now that it shows how it begins."""
        if self._must_open and not self._seen.startswith(self._opening):
            self._end = None
        piece = self._seen if self._keeps_tags else self._seen.removeprefix(self._opening)
        self._seen = self._opening = ""
        return piece
