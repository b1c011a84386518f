"""JSON that a server takes, and what it says to all other."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, strategies as st

from teacher.admission import reader as reader_module
from teacher.admission.documents import MAX_DEPTH, MAX_VALUES, DocumentError, loads
from teacher.admission.reader import SMALL_BYTES, Reader
from teacher.admission.refusals import Refused

texts = st.text(st.characters(exclude_categories=["Cs"]))
values = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
trees = st.recursive(values | texts, lambda inner: st.lists(inner) | st.dictionaries(texts, inner), max_leaves=30)


@given(tree=trees, ascii_alone=st.booleans())
def test_it_says_what_json_says(tree: Any, ascii_alone: bool) -> None:
    assert loads(json.dumps(tree, ensure_ascii=ascii_alone).encode()) == tree


@given(data=st.binary() | texts.map(str.encode) | trees.map(lambda tree: json.dumps(tree).encode()[:-1]))
def test_whatever_comes_is_json_or_refused(data: bytes) -> None:
    try:
        tree = loads(data)
    except DocumentError as exc:
        exc.message.encode()
    else:
        json.dumps(tree, ensure_ascii=False).encode()


def nested(depth: int) -> bytes:
    return b"[" * depth + b"1" + b"]" * depth


HOSTILE = [
    (b"", "not JSON"),
    (b"{", "not JSON"),
    (b'{"a": 1} x', "Extra data"),
    (b'{"a": 1}{"a": 1}', "Extra data"),
    (b"\xff\xfe{\x00}\x00", "not UTF-8, at byte 0"),
    (b'"ab\xc3"', "not UTF-8, at byte 3"),
    (b'"\xed\xa0\x80"', "not UTF-8"),
    ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
    (b"[NaN]", "NaN is no number"),
    (b"[-Infinity]", "-Infinity is no number"),
    (b"[1e999]", "too large"),
    (b"[" + b"9" * 100_000 + b"]", "100000 digits"),
    (b"[9223372036854775808]", "64 bits"),
    (b'{"a": 1, "b": {"x": 1, "x": 2}}', "the key 'x' twice"),
    (rb'{"\ud800": 1, "\ud800": 2}', r"the key '\ud800' twice"),
    (nested(MAX_DEPTH + 1), "nested too deeply"),
    (nested(100_000), "nested too deeply"),
    (b'{"a":' * 100_000, "nested too deeply"),
    (b"[" + b"[]," * MAX_VALUES + b"[]]", "too many values"),
    (b"[" + b"{}," * MAX_VALUES + b"{}]", "too many values"),
    (b"[1.5" + b",1.5" * MAX_VALUES + b"]", "too many values"),
]


@pytest.fixture
def loop() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


def test_what_is_hostile_is_refused_alike_here_and_in_the_process_beside(loop: asyncio.Runner) -> None:
    reader = Reader()

    async def said(data: bytes) -> str:
        with pytest.raises(Refused) as caught:
            await reader.loads(data)
        assert (caught.value.status, caught.value.body["error"]["type"]) == (400, "invalid_request_error")
        return str(caught.value)

    async def check() -> None:
        for data, why in HOSTILE:
            with pytest.raises(DocumentError) as caught:
                loads(data)
            assert why in caught.value.message, data[:40]
            assert why in await said(data + b" " * SMALL_BYTES) or "not JSON" in why or "UTF-8" in why
        await reader.close()

    loop.run(check())


@pytest.mark.parametrize(
    ("document", "path"),
    [
        (r'{"model": "\ud800"}', "model"),
        (r'{"messages": [{"role": "user", "content": "a\udfffb"}]}', "messages[0].content"),
        (r'{"stop": ["x", "\udc00\ud800"]}', "stop[1]"),
        (r'{"tools": [{"function": {"parameters": {"\ud83d": 1}}}]}', r"tools[0].function.parameters.\ud83d"),
        (r'"\ud800"', None),
    ],
)
def test_half_a_character_is_named_wherever_it_is(document: str, path: str | None) -> None:
    with pytest.raises(DocumentError, match="half a character") as caught:
        loads(document.encode())
    assert caught.value.path == path


@pytest.mark.parametrize("text", [r"\ud83d\ude00", r"\u0000", r"\\ud800", "\N{GRINNING FACE}", r"\uFEFF"])
def test_whole_characters_are_taken(text: str) -> None:
    assert loads(f'["{text}"]'.encode()) == json.loads(f'["{text}"]')


def test_a_byte_order_mark_is_passed_over() -> None:
    assert loads(b'\xef\xbb\xbf{"a": 1}') == {"a": 1}


@pytest.mark.parametrize(("long", "what"), [("x" * 11, "characters"), ([7] * 11, "tokens")])
def test_what_is_longer_than_any_prompt_is_named(long: Any, what: str) -> None:
    document = json.dumps({"messages": [{"content": long}], "user": "y" * 10}).encode()
    assert loads(document, max_length=11)
    with pytest.raises(DocumentError, match=f"11 {what}; at most 10") as caught:
        loads(document, max_length=10)
    assert (caught.value.path, caught.value.code) == ("messages[0].content", "context_length_exceeded")


def test_a_prompt_of_many_tokens_is_one_value() -> None:
    ids = list(range(3 * MAX_VALUES))
    assert loads(json.dumps({"prompt": [ids, ids[:7]]}).encode()) == {"prompt": [ids, ids[:7]]}
    assert math.isclose(loads(b"[0.1]")[0], 0.1)


def test_large_documents_are_read_one_after_the_other_and_small_ones_between(loop: asyncio.Runner) -> None:
    reader = Reader()

    async def check() -> None:
        large = [{"prompt": [number] * 500_000} for number in range(3)]
        reading = [asyncio.ensure_future(reader.loads(json.dumps(tree).encode())) for tree in large]
        await asyncio.sleep(0)
        assert await reader.loads(b"[1]") == [1]
        assert not any(one.done() for one in reading)
        assert await asyncio.gather(*reading) == large
        await reader.close()

    loop.run(check())


def test_too_many_large_documents_are_told_to_come_again(loop: asyncio.Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "MAX_WAITING", 2)
    reader = Reader()

    async def check() -> None:
        large = json.dumps({"prompt": "x" * (2 * SMALL_BYTES)}).encode()
        answers = await asyncio.gather(*(reader.loads(large) for _ in range(4)), return_exceptions=True)
        assert [getattr(answer, "status", 200) for answer in answers] == [200, 200, 429, 429]
        assert await reader.loads(large)
        await reader.close()

    loop.run(check())


def test_a_reader_whose_process_dies_or_whose_caller_leaves_goes_on(loop: asyncio.Runner) -> None:
    reader = Reader()
    large = json.dumps({"prompt": "x" * (2 * SMALL_BYTES)}).encode()

    async def check() -> None:
        wanted = json.loads(large)
        assert await reader.loads(large) == wanted
        assert reader._process is not None
        reader._process.kill()
        await reader._process.wait()
        assert await reader.loads(large) == wanted
        leaving = asyncio.ensure_future(reader.loads(json.dumps([1] * 10**6).encode()))
        await asyncio.sleep(0.01)
        leaving.cancel()
        assert await reader.loads(large) == wanted
        reader._process.kill()  # and is not waited for: the question finds nobody, or half an answer
        try:
            assert await reader.loads(large) == wanted
        except Refused as refused:
            assert refused.status == 503  # noqa: PT017 - either is right
        assert await reader.loads(large) == wanted
        await reader.close()

    loop.run(check())
