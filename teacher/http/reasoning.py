"""Reasoning and answer told apart: `<think>`, what was thought, `</think>`, the answer (DeepSeek-R1, arXiv 2501.12948).

Nothing but the tags is lost: the line breaks around them stay, as with vLLM's `deepseek_r1` parser. A text that ends
before `</think>` is reasoning to its end.
"""

from __future__ import annotations

from distill.reasoning import END_OF_THINKING, THINK_LINE
from teacher.engine.stopping import StopStrings


class Reasoning:
    """Splits a text that comes in pieces. `has_ended`: it goes on behind `</think>`, so all of it is answer."""

    def __init__(self, *, has_ended: bool = False) -> None:
        self._opening = "" if has_ended else THINK_LINE  # what may still stand in front
        self._seen = ""
        self._end = None if has_ended else StopStrings([END_OF_THINKING])

    def feed(self, piece: str) -> tuple[str, str]:
        """Take a piece; return what of the reasoning and of the answer is certain now and was not before."""
        if self._opening:
            self._seen += piece
            if len(self._seen) < len(THINK_LINE) and THINK_LINE.startswith(self._seen):
                return "", ""
            piece, self._seen, self._opening = self._seen.removeprefix(THINK_LINE), "", ""
        if self._end is None:
            return "", piece
        thought, answer = self._end.feed(piece), self._end.behind
        if self._end.found is not None:
            self._end = None
        return thought, answer

    def rest(self) -> tuple[str, str]:
        """Return what was held back, now that the text has ended."""
        seen, self._seen = self._seen, ""
        return seen + ("" if self._end is None else self._end.rest()), ""
