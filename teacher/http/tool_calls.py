"""The calls of tools in what a model wrote: found as it comes, and given on whole.

A call names a function that was offered, with an object of arguments; JSON that does not is text like any other, for
whoever reads it to make sense of.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterable
from typing import Any, Protocol

from teacher.admission.documents import DocumentError, loads
from teacher.engine.stopping import StopStrings
from teacher.http.parts import Call
from teacher.live import CallFormat

BEGIN, END = "<tool_call>", "</tool_call>"
# Llama 3.1 may write it in front of a call.
PYTHON_TAG = "<|python_tag|>"
BETWEEN = re.compile(r"[\s;]*")


class CallReader(Protocol):
    """Tells the calls in an answer from its words. Space around a call belongs to it."""

    def feed(self, piece: str) -> tuple[str, tuple[Call, ...]]: ...

    def rest(self) -> tuple[str, tuple[Call, ...]]: ...


def call_reader(form: CallFormat, names: Iterable[str], *, parallel: bool) -> CallReader:
    """The reader of calls of the functions `names`; without `parallel` the first one ends the answer."""
    calls = _Calls(frozenset(names), parallel=parallel)
    return HermesCalls(calls) if form == "hermes" else Llama3Calls(calls)


class _Calls:
    """Makes calls of what was read, and counts them."""

    def __init__(self, names: frozenset[str], *, parallel: bool) -> None:
        self._names = names
        self._parallel = parallel
        self.num_made = 0

    @property
    def are_all(self) -> bool:
        """True once no more may follow."""
        return self.num_made > 0 and not self._parallel

    def made_of(self, value: Any, *keys: str) -> Call | None:
        """The call that is meant, whose arguments stand under one of `keys`; None for what is no call."""
        name = value.get("name") if isinstance(value, dict) else None
        if not isinstance(name, str) or name not in self._names:
            return None
        arguments = next((value[key] for key in keys if key in value), {})
        if not isinstance(arguments, dict):
            return None
        self.num_made += 1
        text = json.dumps(arguments, ensure_ascii=False)
        return Call(self.num_made - 1, f"call_{uuid.uuid4().hex[:24]}", name, text)


class HermesCalls:
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, as often as the model likes, between other text."""

    def __init__(self, calls: _Calls) -> None:
        self._calls = calls
        self._finder = StopStrings([BEGIN])
        self._is_inside = False
        self._block = ""
        self._space = ""  # what ends the text so far, and may stand in front of a call
        self._is_behind_call = False

    def feed(self, piece: str) -> tuple[str, tuple[Call, ...]]:
        text, calls = "", []
        while not self._calls.are_all:
            found = self._finder.feed(piece)
            if self._is_inside:
                self._block += found
            else:
                text += self._said(found)
            if self._finder.found is None:
                break
            piece = self._finder.behind
            if self._is_inside and (call := self._read()) is not None:
                calls.append(call)
            elif self._is_inside:
                text += self._said(f"{BEGIN}{self._block}{END}")
            self._is_inside, self._block = not self._is_inside, ""
            self._finder = StopStrings([END if self._is_inside else BEGIN])
        return text, tuple(calls)

    def rest(self) -> tuple[str, tuple[Call, ...]]:
        """A call whose end tag is missing is one."""
        if self._calls.are_all:
            return "", ()
        held = self._finder.rest()
        if self._is_inside:
            self._block += held
            if (call := self._read()) is not None:
                return "", (call,)
            held = BEGIN + self._block
        text = self._said(held)
        return text if self._is_behind_call else text + self._space, ()

    def _said(self, found: str) -> str:
        """The text to give on, but the space at its end; what follows a call begins without."""
        text = found.lstrip() if self._is_behind_call else self._space + found
        kept = text.rstrip()
        self._space = text[len(kept) :]
        self._is_behind_call &= not kept
        return kept

    def _read(self) -> Call | None:
        try:
            call = self._calls.made_of(loads(self._block.encode()), "arguments", "parameters")
        except DocumentError:
            return None
        if call is not None:
            self._space, self._is_behind_call = "", True
        return call


class Llama3Calls:
    """`{"name": ..., "parameters": {...}}`, several of them with `;` between, and nothing else in the answer."""

    def __init__(self, calls: _Calls) -> None:
        self._calls = calls
        self._held: list[str] = []
        self._beginning = ""  # of what is held, without space in front, until it shows
        self._is_call: bool | None = None  # None: it does not show yet

    def feed(self, piece: str) -> tuple[str, tuple[Call, ...]]:
        if self._is_call is False:
            return piece, ()
        self._held.append(piece)
        if self._is_call is None:
            self._beginning = (self._beginning + piece).lstrip()
            if self._beginning.startswith(("{", PYTHON_TAG)):
                self._is_call = True
            elif not PYTHON_TAG.startswith(self._beginning):
                self._is_call = False
                return "".join(self._held), ()
        return "", ()

    def rest(self) -> tuple[str, tuple[Call, ...]]:
        text = "" if self._is_call is False else "".join(self._held)
        made = [self._calls.made_of(value, "parameters", "arguments") for value in _values(text)]
        if None in made or not made:
            return text, ()
        calls = tuple(call for call in made if call is not None)
        return "", calls[:1] if self._calls.are_all else calls


def _values(text: str) -> list[Any]:
    """The JSON values that are all of a text; none where there is anything else in it."""
    text = text.strip().removeprefix(PYTHON_TAG)
    decoder, values, place = json.JSONDecoder(), [], 0
    try:
        while (place := BETWEEN.match(text, place).end()) < len(text):  # type: ignore[union-attr]
            start = place
            _, place = decoder.raw_decode(text, start)
            values.append(loads(text[start:place].encode()))
    except (ValueError, RecursionError):
        return []
    return values
