"""The API key: read from the environment, sent in one header, and in no message, whatever an endpoint echoes."""

from __future__ import annotations

import json
import os
import re
from urllib.parse import quote

from distill.errors import EnvironmentFault

HIDDEN = "***"
MAX_SAID = 200
# Shorter than this it is a placeholder ("x", "EMPTY"), which also stands in ordinary words.
MIN_SECRET = 6


class ApiKey:
    """The key of one endpoint. Its value leaves this object in `headers` alone; `repr` does not show it."""

    def __init__(self, value: str | None, *, variable: str) -> None:
        self.variable = variable
        self._value = (value or "").strip() or None
        if self._value is not None and not re.fullmatch(r"[\x21-\x7e]+", self._value):
            raise EnvironmentFault(
                "holds characters that no key has (a space, a line break, an accent)", where=f"${variable}"
            )

    @classmethod
    def of_environment(cls, variable: str) -> ApiKey:
        return cls(os.environ.get(variable), variable=variable)

    def __repr__(self) -> str:
        return f"ApiKey(${self.variable}, {'set' if self else 'not set'})"

    def __bool__(self) -> bool:
        return self._value is not None

    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._value}"} if self._value else {}

    def is_in(self, text: str) -> bool:
        return self._value is not None and len(self._value) >= MIN_SECRET and self._value in text

    def redacted(self, text: str) -> str:
        """`text` on one line of at most 200 characters, the key starred out first: a cut must not hide half of it."""
        text = " ".join(text.split())
        if self._value is not None and len(self._value) >= MIN_SECRET:
            forms = {self._value, json.dumps(self._value)[1:-1], quote(self._value, safe="")}
            for form in sorted(forms, key=len, reverse=True):
                text = text.replace(form, HIDDEN)
        return text[:MAX_SAID]
