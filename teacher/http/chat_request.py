"""The request of `/v1/chat/completions`: a conversation, the tools that are offered, and how the answer is told.

With `continue_final_message`, as in vLLM, the answer goes on from the assistant message that ends the conversation.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from distill.reasoning import END_OF_THINKING, THINK
from distill.records import content_id
from teacher.admission.fields import ChatServiceFields, Integer
from teacher.engine.guide import Grammar
from teacher.http.messages import MAX_MESSAGES, Message, check_order
from teacher.http.request import MAX_LOGPROBS, Request, sample_of
from teacher.http.tool_grammar import call_grammar
from teacher.http.tools import MAX_TOOLS, NamedTool, Tool
from teacher.live import CallFormat, Conversation, GenerationRequest

Choice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("(word)")] | Annotated[NamedTool, Tag("(function)")],
    Discriminator(lambda given: "(function)" if isinstance(given, dict | NamedTool) else "(word)"),
]


class ChatRequest(Request, ChatServiceFields):
    """`/v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    continue_final_message: bool = False
    add_generation_prompt: bool | None = None
    tools: list[Tool] = Field([], max_length=MAX_TOOLS)
    tool_choice: Choice | None = None
    parallel_tool_calls: bool = True
    max_completion_tokens: Integer | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: Integer | None = Field(None, ge=0, le=MAX_LOGPROBS)
    include_reasoning: bool | None = None

    @model_validator(mode="after")
    def _fields_agree(self) -> ChatRequest:
        check_order(self.messages)
        if self.add_generation_prompt is not None and self.add_generation_prompt == self.continue_final_message:
            raise ValueError("add_generation_prompt: must be the opposite of continue_final_message")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: needs logprobs to be true")
        if self.continue_final_message:
            self._check_continued(self.messages[-1])
        self._check_choice()
        return self

    def _check_continued(self, last: Message) -> None:
        if len(self.messages) < 2 or last.role != "assistant" or not last.text or last.tool_calls:
            raise ValueError(
                "messages: continue_final_message needs an assistant message with words to go on from, last"
            )
        if self.thinking_token_budget is not None:
            raise ValueError("thinking_token_budget: cannot be counted in a message that goes on")
        if (grammar := self.grammar()) is not None:
            raise ValueError(f"{grammar.field}: cannot be kept by a message that goes on")

    def _check_choice(self) -> None:
        choice = self.tool_choice
        if choice in (None, "none"):
            return
        if not self.tools:
            raise ValueError("tool_choice: is only allowed when 'tools' are specified")
        if isinstance(choice, NamedTool) and not self.offered:
            raise ValueError(f"tool_choice: the function {choice.function.name!r} is not among the 'tools'")
        if self.continue_final_message and self.must_call:
            raise ValueError("tool_choice: cannot be kept by a message that goes on")

    @property
    def offered(self) -> list[Tool]:
        """The tools that may be called."""
        if isinstance(self.tool_choice, NamedTool):
            return [tool for tool in self.tools if tool.function.name == self.tool_choice.function.name]
        return [] if self.tool_choice == "none" else self.tools

    @property
    def must_call(self) -> bool:
        return self.tool_choice not in (None, "none", "auto")

    def call_grammar(self, form: CallFormat) -> Grammar | None:
        """The grammar of the answer, where `form` is how it calls; None: it may be any text."""
        grammar = self.grammar()
        is_strict = any(tool.function.strict for tool in self.offered)
        if not self.offered or not (self.must_call or is_strict or grammar is not None):
            return grammar
        return call_grammar(
            form,
            self.offered,
            must_call=self.must_call,
            parallel=self.parallel_tool_calls,
            said=None if grammar is None else grammar.lark.removeprefix("answer: "),
            field="tool_choice" if self.must_call else "tools",
        )

    def prompts(self) -> list[GenerationRequest]:
        turns = self.messages[:-1] if self.continue_final_message else self.messages
        written = self.messages[-1].text if self.continue_final_message else ""
        rendered = tuple(message.rendered() for message in turns)
        tools = tuple(tool.given for tool in self.tools) if self.offered else ()
        question = self.messages[0].text
        if question and not tools and rendered == ({"role": "user", "content": question},):
            return [GenerationRequest(sample_of(question), partial_answer=written)]
        told = content_id([rendered, tools])
        return [GenerationRequest(sample_of(f"conversation {told}"), Conversation(rendered, tools), written)]

    @property
    def has_thought(self) -> bool:
        """True where the answer goes on behind its reasoning."""
        return self.continue_final_message and END_OF_THINKING in self.messages[-1].text

    @property
    def is_thinking(self) -> bool:
        """True where the answer goes on within its reasoning."""
        return self.continue_final_message and not self.has_thought and self.messages[-1].text.startswith(THINK)

    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def limit(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
