"""Server-sent events, as chat endpoints use them: lines of bytes in, the data of each event out.

WHATWG HTML s.9.2.6, of which endpoints use `data:` and comments. A comment (`: keep-alive`, which DeepSeek's API sends
while a request waits) carries nothing, but its bytes show that the other side lives.
"""

from __future__ import annotations

DONE = "[DONE]"


class EventDecoder:
    """Feed bytes as they come, cut anywhere; get the data of the events that they complete."""

    def __init__(self) -> None:
        self._line: list[bytes] = []
        self._data: list[str] = []

    def feed(self, piece: bytes) -> list[str]:
        """Raises UnicodeDecodeError for a line that is not UTF-8."""
        events: list[str] = []
        *ended, rest = piece.split(b"\n")
        for part in ended:
            line = (b"".join(self._line) + part).removesuffix(b"\r")
            self._line.clear()
            if not line:
                if self._data:
                    events.append("\n".join(self._data))
                    self._data.clear()
            elif line.startswith(b"data:"):
                self._data.append(line[5:].decode().removeprefix(" "))
        if rest:
            self._line.append(rest)
        return events
