"""Text that is fit for a terminal."""

from __future__ import annotations

from hypothesis import given, strategies as st

from distill.printable import printable

ESCAPED = {"a\x1b[2Jb": "a\\x1b[2Jb", "one\rtwo": "one\\rtwo", "\u202egnp.exe": "\\u202egnp.exe", "\ud800": "\\ud800"}


@given(st.text())
def test_what_is_printable_is_one_line_without_controls_and_stays_so(text: str) -> None:
    shown = printable(text)
    assert len(shown.splitlines()) <= 1
    assert not any(ord(one) < 32 or 0x7F <= ord(one) < 0xA0 or 0xD800 <= ord(one) < 0xE000 for one in shown)
    assert printable(shown) == shown
    if text.isprintable():
        assert shown == text


def test_what_is_escaped() -> None:
    assert {text: printable(text) for text in ESCAPED} == ESCAPED
    assert printable("naïve 答え\u00a0½ ±") == "naïve 答え\u00a0½ ±"
