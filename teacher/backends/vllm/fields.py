"""The fields of a request to vLLM, decided as potstill's own server does.

vLLM ignores what it does not know. So what it does not know is refused here, and what changes nothing is left out: some
of it, `tools: []` and nulls, vLLM would refuse.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from teacher.admission.fields import ChatServiceFields, ServiceFields
from teacher.admission.wording import refusal_of, unknown_parameter

FORMS: Mapping[str, type[ServiceFields]] = {
    "/v1/chat/completions": ChatServiceFields,
    "/v1/completions": ServiceFields,
}


def known_fields(routes: Iterable[Any], path: str) -> frozenset[str]:
    """The fields that the route of `path` reads, by the types of the function behind it; none where it has no types."""
    for route in routes:
        if getattr(route, "path", None) == path and "POST" in (getattr(route, "methods", None) or ()):
            for parameter in inspect.signature(route.endpoint, eval_str=True).parameters.values():
                if isinstance(parameter.annotation, type) and issubclass(parameter.annotation, BaseModel):
                    fields = parameter.annotation.model_fields.items()
                    return frozenset(name for field, info in fields for name in (field, info.alias) if name)
    return frozenset()


def passed_on(body: Mapping[str, Any], known: frozenset[str], form: type[ServiceFields]) -> dict[str, Any]:
    """What of a body vLLM is to read, which knows the fields `known`.

    Raises Refused for a field that neither it knows nor `form`, which has those that change nothing, and their values.
    """
    given = {name: value for name, value in body.items() if value is not None}
    of_service = {name: value for name, value in given.items() if name in form.model_fields and name not in known}
    try:
        form.model_validate(of_service)
    except ValidationError as exc:
        raise refusal_of(exc, form) from exc
    if unknown := sorted(given.keys() - known - of_service.keys()):
        raise unknown_parameter(unknown[0], known)
    kept = {name: value for name, value in given.items() if name not in of_service}
    if not kept.get("tools") and kept.get("tool_choice", "none") == "none":
        kept = {name: value for name, value in kept.items() if name not in ("tools", "tool_choice")}
    return kept
