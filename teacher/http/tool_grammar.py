"""The grammar of answers that call tools: one that must, and one whose calls keep to the schemas of strict functions.

The text around a call's arguments is what the chat templates themselves write, so that a model is led where it goes
anyway (`teacher.http.tool_calls` reads both forms again).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from teacher.engine.guide import Grammar
from teacher.http.structured import json_rule
from teacher.http.tool_calls import BEGIN, END, PYTHON_TAG
from teacher.http.tools import Tool
from teacher.live import CallFormat

NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}
# Words that do not begin like a call.
WORDS = {
    "hermes": rf"WORDS: /(?s:.*)/ & ~/(?s:.*){BEGIN}(?s:.*)/",
    "llama3_json": rf"WORDS: /(?s:.*)/ & ~/\s*(\{{|{PYTHON_TAG.replace('|', chr(92) + '|')})(?s:.*)/",
}


def call_grammar(
    form: CallFormat, tools: Sequence[Tool], *, must_call: bool, parallel: bool, said: str | None, field: str
) -> Grammar:
    """The grammar of an answer that calls one of `tools`, several where `parallel`.

    Unless it must call, it may say something: what the rule `said` derives, or any words, in Hermes' form in front of
    calls, too. A function's schema is kept to where the answer must call, or it is strict. `field` is the request's
    that asks for all this.
    """
    name, arguments = ('"name"', '"arguments"') if form == "hermes" else ('"name"', '"parameters"')
    rules = []
    for number, tool in enumerate(tools):
        beginning = f"{{{name}: {json.dumps(tool.function.name)}, {arguments}: "
        rules.append(f'call_{number}: {json.dumps(beginning)} arguments_{number} "}}"')
        keeps = must_call or tool.function.strict
        schema = (tool.function.parameters or NO_ARGUMENTS) if keeps else {"type": "object"}
        rules.append(f"arguments_{number}: {json_rule(schema)}")
    rules.append(f"call: {_any(f'call_{number}' for number in range(len(tools)))}")
    if form == "hermes":
        more = r'("\n" tag_0 rest)*' if parallel else ""
        rules += [r'rest: "\n" call "\n" tag_1', f"calls: tag_0 rest {more}", f"to_calls: to_tag_0 rest {more}"]
    else:
        rules.append('calls: call ("; " call)*' if parallel else "calls: call")
    if must_call:
        answer = "calls"
    elif said is not None:
        answer = "said | calls"
        rules.append(f"said: {said}")
    else:
        answer = "WORDS | to_calls" if form == "hermes" else "WORDS | calls"
        rules.append(WORDS[form])
    tags = (BEGIN, END) if form == "hermes" else ()
    return Grammar("\n".join([f"answer: {answer}", *rules]), tags=tags, field=field)


def _any(names: Iterable[str]) -> str:
    return " | ".join(names)
