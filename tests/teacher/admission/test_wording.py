"""What is wrong with a request, in the API's words: message, param and code."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from teacher.admission.wording import refusal_of
from teacher.http.chat_request import ChatRequest
from teacher.http.completion_request import CompletionRequest

QUESTION = {"role": "user", "content": "?"}
TOOL = {"type": "function", "function": {"name": "add"}}


def call(arguments: str) -> dict[str, Any]:
    function = {"name": "add", "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"id": "c", "type": "function", "function": function}]}


def refused(form: type[ChatRequest | CompletionRequest], **fields: Any) -> tuple[str, str | None, str | None]:
    with pytest.raises(ValidationError) as caught:
        form.model_validate(fields)
    error = refusal_of(caught.value, form).body["error"]
    assert error["type"] == "invalid_request_error"
    return error["message"], error["param"], error["code"]


@pytest.mark.parametrize(
    ("fields", "message", "param", "code"),
    [
        (
            {"temperature": 6},
            "Invalid 'temperature': integer above maximum value. Expected a value <= 5, but got 6 instead.",
            "temperature",
            "integer_above_max_value",
        ),
        (
            {"top_p": 0.0},
            "Invalid 'top_p': decimal below minimum value. Expected a value > 0, but got 0.0 instead.",
            "top_p",
            "decimal_below_min_value",
        ),
        (
            {"seed": -1},
            "Invalid 'seed': integer below minimum value. Expected a value >= 0, but got -1 instead.",
            "seed",
            "integer_below_min_value",
        ),
        (
            {"temperature": "hot"},
            "Invalid type for 'temperature': expected a decimal, but got 'hot' instead.",
            "temperature",
            "invalid_type",
        ),
        (
            {"n": [1]},
            "Invalid type for 'n': expected an integer, but got an array instead.",
            "n",
            "invalid_type",
        ),
        ({"n": 1.5}, "Invalid type for 'n': expected an integer, but got 1.5 instead.", "n", "invalid_type"),
        ({"n": True}, "Invalid 'n': expected a number, but got a boolean instead.", "n", "invalid_value"),
        (
            {"stop": 7},
            "Invalid type for 'stop': expected a string, but got an integer instead.",
            "stop",
            "invalid_type",
        ),
        (
            {"stop": ["a", 7]},
            "Invalid type for 'stop[1]': expected a string, but got an integer instead.",
            "stop[1]",
            "invalid_type",
        ),
        (
            {"stop": ["a"] * 17},
            "Invalid 'stop': array too long. Expected an array with maximum length 16, but got an array with length 17 "
            "instead.",
            "stop",
            "array_above_max_length",
        ),
        (
            {"messages": []},
            "Invalid 'messages': array too short. Expected an array with minimum length 1, but got an empty array "
            "instead.",
            "messages",
            "empty_array",
        ),
        ({"messages": None}, "Missing required parameter: 'messages'.", "messages", "missing_required_parameter"),
        (
            {"messages": [{"content": "?"}]},
            "Missing required parameter: 'messages[0].role'.",
            "messages[0].role",
            "missing_required_parameter",
        ),
        (
            {"messages": [QUESTION, {"role": "function", "content": "4"}]},
            "Invalid value for 'messages[1].role': 'function'. Supported values are: 'developer', 'system', 'user', "
            "'assistant' or 'tool'.",
            "messages[1].role",
            "invalid_value",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]},
            "Invalid value for 'messages[0].content[0].type': 'image_url'. Supported values are: 'text'.",
            "messages[0].content[0].type",
            "invalid_value",
        ),
        (
            {"messages": [{"role": "assistant"}]},
            "Invalid 'messages[0].content': is required without tool_calls.",
            "messages[0].content",
            "invalid_value",
        ),
        (
            {"messages": [QUESTION, call("[1]")]},
            "Invalid 'messages[1].tool_calls[0].function.arguments': must be the text of a JSON object.",
            "messages[1].tool_calls[0].function.arguments",
            "invalid_value",
        ),
        (
            {"messages": [QUESTION, call('{"a": "\\ud800"}')]},
            "Invalid 'messages[1].tool_calls[0].function.arguments': must be the text of a JSON object; "
            "has \\ud800, which is half a character.",
            "messages[1].tool_calls[0].function.arguments",
            "invalid_value",
        ),
        (
            {"messages": [QUESTION, call("{}"), {"role": "tool", "tool_call_id": "d", "content": "4"}]},
            "Invalid 'messages[2].tool_call_id': messages with role 'tool' must be a response to a preceding message "
            "with 'tool_calls', got 'd'.",
            "messages[2].tool_call_id",
            "invalid_value",
        ),
        (
            {"temprature": 1},
            "Unknown parameter: 'temprature'. Did you mean 'temperature'?",
            "temprature",
            "unknown_parameter",
        ),
        (
            {"web_search_options": {}},
            "Unsupported parameter: 'web_search_options' is not supported with this model.",
            "web_search_options",
            "unsupported_parameter",
        ),
        (
            {"verbosity": "low"},
            "Invalid value for 'verbosity': 'low'. Supported values are: 'medium'.",
            "verbosity",
            "invalid_value",
        ),
        (
            {"modalities": ["text", "audio"]},
            "Invalid value for 'modalities[1]': 'audio'. Supported values are: 'text'.",
            "modalities[1]",
            "invalid_value",
        ),
        (
            {"tool_choice": "auto"},
            "Invalid 'tool_choice': is only allowed when 'tools' are specified.",
            "tool_choice",
            "invalid_value",
        ),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "sub"}}},
            "Invalid 'tool_choice': the function 'sub' is not among the 'tools'.",
            "tool_choice",
            "invalid_value",
        ),
        (
            {"tools": [TOOL, {"type": "custom", "custom": {"name": "x"}}]},
            "Invalid value for 'tools[1].type': 'custom'. Supported values are: 'function'.",
            "tools[1].type",
            "invalid_value",
        ),
        (
            {"stream_options": {"include_usage": True}},
            "Invalid 'stream_options': is only allowed when 'stream' is enabled.",
            "stream_options",
            "invalid_value",
        ),
    ],
)
def test_a_chat_request_that_is_wrong(fields: dict[str, Any], message: str, param: str, code: str) -> None:
    assert refused(ChatRequest, **{"model": "m", "messages": [QUESTION], **fields}) == (message, param, code)


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({}, "prompt", "Missing required parameter: 'prompt'."),
        ({"prompt": None}, "prompt", "Missing required parameter: 'prompt'."),
        ({"prompt": [["a"]]}, "prompt", "Invalid 'prompt': must be a text, a list of token ids, or a list of several"),
        ({"prompt": "a", "suffix": "b"}, "suffix", "Invalid value for 'suffix': 'b'. Supported values are: ''."),
        ({"prompt": "a", "best_of": 2}, "best_of", "Invalid value for 'best_of': 2. Supported values are: 1."),
        ({"prompt": "a", "thinking_token_budget": 3}, "thinking_token_budget", "is for chat completions"),
    ],
)
def test_a_completion_request_that_is_wrong(fields: dict[str, Any], param: str, said: str) -> None:
    message, found, _ = refused(CompletionRequest, **{"model": "m", **fields})
    assert found == param
    assert said in message


def test_a_body_that_is_no_object() -> None:
    with pytest.raises(ValidationError) as caught:
        ChatRequest.model_validate([1])
    error = refusal_of(caught.value, ChatRequest).body["error"]
    assert error["message"] == "Invalid type for body: expected an object, but got an array instead."
    assert error["param"] is None
