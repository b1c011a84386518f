"""Conversations in the templates of published models: the text is transformers', and what would be lost is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from distill.errors import UserInputError
from teacher.backends.chat_template import ChatTemplate
from teacher.live import Conversation
from tests.repository import REPOSITORY
from tests.teacher.backends.published_templates import template
from tests.teacher.backends.tiny_models import save_tokenizer

SYSTEM = {"role": "system", "content": "be brief"}
DEVELOPER = {"role": "developer", "content": "be brief"}
USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "hello"}
CALLING = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [2, "é"]}}}],
}
RESULT = {"role": "tool", "content": "42", "tool_call_id": "c1"}
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder, None)
    return PreTrainedTokenizerFast.from_pretrained(folder, bos_token="<|im_start|>")


def with_template(tokenizer: PreTrainedTokenizerBase, text: str) -> ChatTemplate:
    tokenizer.chat_template = text
    return ChatTemplate(tokenizer)


def talk(*messages: dict[str, Any], tools: tuple[dict[str, Any], ...] = ()) -> Conversation:
    return Conversation(messages, tools)


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama3_1", "llama3_2"])
@pytest.mark.parametrize(
    "said",
    [
        talk(USER),
        talk(SYSTEM, USER, ASSISTANT, USER),
        talk(SYSTEM, USER, tools=(ADD,)),
        talk(USER, CALLING, RESULT, tools=(ADD,)),
        talk(SYSTEM, USER, CALLING, RESULT, ASSISTANT, USER, tools=(ADD,)),
    ],
)
def test_the_text_is_transformers_own(tokenizer: PreTrainedTokenizerBase, name: str, said: Conversation) -> None:
    rendered = with_template(tokenizer, template(name)).render(said)
    assert rendered == tokenizer.apply_chat_template(
        list(said.messages), tools=list(said.tools) or None, add_generation_prompt=True, tokenize=False
    )
    assert "hi" in rendered
    assert "add" in rendered or not said.tools


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("qwen2_5", "hermes"),
        ("qwen3", "hermes"),
        ("qwen3_instruct_2507", "hermes"),
        ("llama3_1", "llama3_json"),
        ("llama3_2", "llama3_json"),
        ("llama3", None),
        ("gemma", None),
        ("deepseek_r1_distill", None),
        ("qwen3_5_think", None),  # calls as XML, which is not read
    ],
)
def test_how_calls_are_written_shows_in_one(tokenizer: PreTrainedTokenizerBase, name: str, form: str | None) -> None:
    assert with_template(tokenizer, template(name)).call_format == form


def test_our_own_templates_have_no_tools(tokenizer: PreTrainedTokenizerBase) -> None:
    for path in (
        *(REPOSITORY / "students" / "templates").glob("*.jinja"),
        REPOSITORY / "teacher/pico/chat_template.jinja",
    ):
        ours = with_template(tokenizer, Path(path).read_text(encoding="utf-8"))
        assert ours.call_format is None
        with pytest.raises(UserInputError, match="has no tools"):
            ours.render(talk(USER, tools=(ADD,)))


@pytest.mark.parametrize(
    ("name", "said", "field", "why"),
    [
        ("gemma", talk(SYSTEM, USER), "messages", "System role not supported"),
        ("gemma", talk(USER, USER), "messages", "must alternate"),
        ("qwen3_5_think", talk(USER, SYSTEM, USER), "messages", "System message must be at the beginning"),
        ("cohere", talk(USER, SYSTEM, USER), "messages[1].role", "no place for a message of the role 'system' here"),
        ("llama3", talk(USER, tools=(ADD,)), "tools", "has no tools"),
        ("llama3", talk(USER, CALLING, RESULT), "messages[1].tool_calls", "no place for tool calls"),
    ],
)
def test_what_a_template_would_drop_is_refused(
    tokenizer: PreTrainedTokenizerBase, name: str, said: Conversation, field: str, why: str
) -> None:
    with pytest.raises(UserInputError, match=why) as caught:
        with_template(tokenizer, template(name)).render(said)
    assert caught.value.field == field


def test_a_template_that_leaves_a_role_out_is_found(tokenizer: PreTrainedTokenizerBase) -> None:
    quiet = "{% for m in messages %}{% if m.role != 'system' %}{{ m.role }}: {{ m.content }}\n{% endif %}{% endfor %}"
    ours = with_template(tokenizer, quiet)
    assert ours.render(talk(USER, ASSISTANT)) == "user: hi\nassistant: hello\n"
    for _ in range(2):  # what is remembered of a shape says the same
        with pytest.raises(UserInputError, match="no place for a message of the role 'system' here"):
            ours.render(talk(SYSTEM, USER))


def test_a_developer_is_the_system_where_the_template_does_not_know_one(tokenizer: PreTrainedTokenizerBase) -> None:
    qwen = with_template(tokenizer, template("qwen2_5"))
    assert qwen.render(talk(DEVELOPER, USER)) == qwen.render(talk(SYSTEM, USER))
    knows = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{# developer #}"
    assert with_template(tokenizer, knows).render(talk(DEVELOPER)) == "developer: be brief\n"


def test_deepseek_s_templates_get_arguments_as_text_and_no_content(tokenizer: PreTrainedTokenizerBase) -> None:
    rendered = with_template(tokenizer, template("deepseek_r1_distill")).render(talk(USER, CALLING, RESULT))
    assert '{"a": 1, "b": [2, "é"]}' in rendered
    assert "None" not in rendered


def test_the_words_of_a_turn_may_be_what_a_marker_is_not(tokenizer: PreTrainedTokenizerBase) -> None:
    """R1's templates delete the reasoning of earlier turns, which is no reason to refuse them."""
    thought = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nhello"}
    rendered = with_template(tokenizer, template("deepseek_r1_distill")).render(talk(USER, thought, USER))
    assert "hello" in rendered
    assert "hm" not in rendered
