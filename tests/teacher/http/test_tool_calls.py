"""Calls in what a model wrote: the same however the text is cut into pieces, and no other text is touched."""

from __future__ import annotations

import json
from collections.abc import Iterable

import pytest
from hypothesis import given, strategies as st

from teacher.http.chat_form import ChatForm, ReasoningPlace
from teacher.http.chat_request import ChatRequest
from teacher.http.parts import Parts
from teacher.live import CallFormat

QUESTION = {"role": "user", "content": "?"}


def request(**fields: object) -> ChatRequest:
    tools = [{"type": "function", "function": {"name": name}} for name in ("add", "now")]
    return ChatRequest.model_validate({"model": "m", "messages": [QUESTION], "tools": tools, **fields})


def read(
    pieces: Iterable[str], form: CallFormat, *, reasoning: ReasoningPlace = "content", **fields: object
) -> tuple[str, str, list[tuple[str, object]]]:
    """Reasoning, words and calls of a text that comes in pieces."""
    splitter = ChatForm(request(**fields), str, reasoning=reasoning, call_format=form).splitter()
    parts = Parts()
    for piece in pieces:
        parts = parts.then(splitter.feed(piece))
    parts = parts.then(splitter.rest())
    assert [call.number for call in parts.calls] == list(range(len(parts.calls)))
    assert len({call.id for call in parts.calls}) == len(parts.calls)
    return parts.reasoning, parts.text, [(call.name, json.loads(call.arguments)) for call in parts.calls]


def hermes(name: str, **arguments: object) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


ADD, NOW = hermes("add", a=1, b="</tool"), hermes("now")
CALLED_ADD, CALLED_NOW = ("add", {"a": 1, "b": "</tool"}), ("now", {})
UNKNOWN = hermes("subtract", a=1)
LLAMA_ADD = '{"name": "add", "parameters": {"a": 1, "b": "; {"}}'
LLAMA_CALLED = ("add", {"a": 1, "b": "; {"})


@pytest.mark.parametrize(
    ("form", "text", "words", "calls"),
    [
        ("hermes", ADD, "", [CALLED_ADD]),
        ("hermes", f"Let me see.\n{ADD}\n{NOW}\n", "Let me see.", [CALLED_ADD, CALLED_NOW]),
        ("hermes", f"{ADD}\n\nThat is all, then.", "That is all, then.", [CALLED_ADD]),
        ("hermes", f"Sum: {ADD} and\n{UNKNOWN}", f"Sum:and\n{UNKNOWN}", [CALLED_ADD]),
        ("hermes", '<tool_call>{"name": "now"}</tool_call>', "", [CALLED_NOW]),
        ("hermes", ADD.removesuffix("</tool_call>"), "", [CALLED_ADD]),
        ("hermes", "<tool_call>\n{broken\n</tool_call>\n", "<tool_call>\n{broken\n</tool_call>\n", []),
        ("hermes", "<tool_call>\n[1]\n</tool_call> so", "<tool_call>\n[1]\n</tool_call> so", []),
        ("hermes", '<tool_call>{"name": "add", "arguments": "1"}</tool_call>', None, []),
        ("hermes", hermes("add", a="x").replace("x", r"\ud800"), None, []),
        ("hermes", hermes("add", a=float("nan")), None, []),
        ("hermes", '<tool_call>{"name": ["add"], "arguments": {}}</tool_call>', None, []),
        ("hermes", "<tool_call>\nhalf", "<tool_call>\nhalf", []),
        ("hermes", "a < b, <tool, <tool_ca \n", "a < b, <tool, <tool_ca \n", []),
        ("hermes", " \n", " \n", []),
        ("hermes", LLAMA_ADD, LLAMA_ADD, []),
        ("llama3_json", LLAMA_ADD, "", [LLAMA_CALLED]),
        ("llama3_json", f" \n{LLAMA_ADD}; {LLAMA_ADD}", "", [LLAMA_CALLED] * 2),
        ("llama3_json", f"<|python_tag|>{LLAMA_ADD}", "", [LLAMA_CALLED]),
        ("llama3_json", '{"type": "function", "name": "now", "parameters": {}}', "", [CALLED_NOW]),
        ("llama3_json", '{"name": "Ann", "parameters": {}}', None, []),
        ("llama3_json", f"{LLAMA_ADD} is the call", None, []),
        ("llama3_json", f"The call is {LLAMA_ADD}", None, []),
        ("llama3_json", f"{LLAMA_ADD}; {{}}", None, []),
        ("llama3_json", LLAMA_ADD.replace("1", "NaN"), None, []),
        ("llama3_json", " {", None, []),
        ("llama3_json", "<|python", None, []),
        ("llama3_json", ADD, None, []),
    ],
)
@pytest.mark.parametrize("size", [1, 3, 1_000])
def test_calls_are_found_and_everything_else_stays(
    form: CallFormat, text: str, words: str | None, calls: list[object], size: int
) -> None:
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    assert read(pieces, form) == ("", text if words is None else words, calls)


@given(
    st.lists(
        st.one_of(st.text(max_size=8), st.sampled_from([ADD, NOW, UNKNOWN, "<tool_call>", "</tool_call>", "\n", "{"])),
        max_size=8,
    ),
    st.sampled_from(["hermes", "llama3_json"]),
)
def test_how_a_text_is_cut_makes_no_difference(pieces: list[str], form: CallFormat) -> None:
    text = "".join(pieces)
    assert read(pieces, form) == read([text], form) == read(text, form)


@given(st.text(), st.sampled_from(["hermes", "llama3_json"]))
def test_a_text_without_calls_is_what_it_was(text: str, form: CallFormat) -> None:
    assert read(text, form) == ("", text, [])


def test_without_parallel_calls_the_first_ends_the_answer() -> None:
    assert read([f"So: {ADD}\n{NOW} done"], "hermes", parallel_tool_calls=False) == ("", "So:", [CALLED_ADD])
    two = f"{LLAMA_ADD}; {LLAMA_ADD}"
    assert read([two], "llama3_json", parallel_tool_calls=False) == ("", "", [LLAMA_CALLED])


def test_what_is_thought_of_a_call_is_no_call() -> None:
    text = f"<think>\nI could write {ADD}.\n</think>\n\n{NOW}"
    thought = f"<think>\nI could write {ADD}.\n</think>"
    assert read(text, "hermes") == (thought, "", [CALLED_NOW])
    apart = f"I could write {ADD}.\n"
    assert read(text, "hermes", reasoning="apart") == (apart, "", [CALLED_NOW])
    goes_on = {"continue_final_message": True}
    thinking = [QUESTION, {"role": "assistant", "content": "<think>\nso"}]
    assert read(f", {ADD}", "hermes", messages=thinking, **goes_on) == (f", {ADD}", "", [])
    answering = [QUESTION, {"role": "assistant", "content": "<think>\nso\n</think>\n\n"}]
    assert read(ADD, "hermes", messages=answering, **goes_on) == ("", "", [CALLED_ADD])


def test_choosing_no_tool_leaves_calls_as_they_stand() -> None:
    assert read([ADD], "hermes", tool_choice="none") == ("", ADD, [])
