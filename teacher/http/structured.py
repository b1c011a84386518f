"""The form that an answer must have, as a grammar: OpenAI's `response_format` and vLLM's `structured_outputs`."""

from __future__ import annotations

import json
from typing import Any, Literal

from llguidance import regex_to_lark
from pydantic import Field, model_validator

from teacher.admission.fields import Body
from teacher.engine.guide import Grammar

MAX_CHOICES, MAX_REGEX_CHARACTERS = 1_024, 4_096
# One line, as `json.dumps` writes it. JSON allows any white space, and a small model may not find out of it again.
LAYOUT = {"whitespace_flexible": False, "key_separator": ": ", "item_separator": ", "}


class JSONSchemaFormat(Body):
    """A schema that is followed to the letter, `strict` or not: what it leaves open, the model may add."""

    name: str = Field(max_length=64)
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchemaFormat | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema: is needed by type 'json_schema', and by no other")
        return self

    @property
    def rule(self) -> str | None:
        if self.json_schema is not None:
            return json_rule(self.json_schema.schema_)
        return None if self.type == "text" else json_rule({"type": "object"})


class StructuredOutputs(Body):
    """One of the four, as in vLLM."""

    json_: dict[str, Any] | None = Field(None, alias="json")
    json_object: bool = False
    regex: str | None = Field(None, min_length=1, max_length=MAX_REGEX_CHARACTERS)
    choice: list[str] | None = Field(None, min_length=1, max_length=MAX_CHOICES)

    @model_validator(mode="after")
    def _is_one(self) -> StructuredOutputs:
        if sum((self.json_ is not None, self.json_object, self.regex is not None, self.choice is not None)) != 1:
            raise ValueError("must have one of json, json_object, regex and choice")
        return self

    @property
    def rule(self) -> str:
        if self.choice is not None:
            return " | ".join(json.dumps(text) for text in self.choice)
        if self.regex is not None:
            return f"/{regex_to_lark(self.regex, 'd')}/".replace("\n", r"\n")
        return json_rule({"type": "object"} if self.json_ is None else self.json_)


class StructuredFields(Body):
    """The fields of a request that say what its answer must look like."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None

    @model_validator(mode="after")
    def _one_form(self) -> StructuredFields:
        if self.structured_outputs is not None and self.response_format is not None and self.response_format.rule:
            raise ValueError("structured_outputs: goes with no response_format but 'text'")
        return self

    def grammar(self) -> Grammar | None:
        """The grammar of the answer; None: it may be any text."""
        if self.structured_outputs is not None:
            return Grammar(f"answer: {self.structured_outputs.rule}", field="structured_outputs")
        rule = None if self.response_format is None else self.response_format.rule
        return None if rule is None else Grammar(f"answer: {rule}")


def json_rule(schema: dict[str, Any]) -> str:
    """The right side of a rule that derives JSON of a schema, on one line."""
    return "%json " + json.dumps({"x-guidance": LAYOUT, **schema})
