"""The parts of an answer, as they are told apart while it is written."""

from __future__ import annotations

from typing import NamedTuple, Protocol


class Call(NamedTuple):
    """A tool's call; `arguments` is the text of a JSON object, `number` its place among the calls of the answer."""

    number: int
    id: str
    name: str
    arguments: str


class Parts(NamedTuple):
    """What of each part has come."""

    reasoning: str = ""
    text: str = ""
    calls: tuple[Call, ...] = ()

    def then(self, more: Parts) -> Parts:
        return Parts(self.reasoning + more.reasoning, self.text + more.text, self.calls + more.calls)


class Splitter(Protocol):
    """Tells the parts of one answer apart."""

    def feed(self, piece: str) -> Parts:
        """Take a piece of the text; return what is certain now and was not before."""
        ...

    def rest(self) -> Parts:
        """Return what was held back, now that the text has ended."""
        ...


class Undivided:
    """An answer that is all text."""

    def feed(self, piece: str) -> Parts:
        return Parts(text=piece)

    def rest(self) -> Parts:
        return Parts()
