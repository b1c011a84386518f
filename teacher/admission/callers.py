"""Who may ask a server that asks for no key: programs of this machine, and no web page.

A page that somebody has open can send requests to ports of this machine. Under a name of its own that it points here
(DNS rebinding) it could even read the answers: the Host header tells. Without that, browsers send only what a form
could (no JSON) before they have asked for permission, which is never given; and they name the page in the Origin
header.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from teacher.admission.refusals import Refused

_LOOPBACK = r"(localhost|127\.0\.0\.1|\[::1\])(:\d{1,5})?"
_HOST = re.compile(_LOOPBACK, re.IGNORECASE)
_ORIGIN = re.compile(f"https?://{_LOOPBACK}", re.IGNORECASE)
_JSON = re.compile(r"application/json\s*(;\s*charset=\"?utf-8\"?\s*)?", re.IGNORECASE)
_SHOWN = 80


def check_caller(method: str, headers: Iterable[tuple[bytes, bytes]], *, how_to_open: str) -> None:
    """Raise Refused unless a program of this machine asks. `how_to_open` says what to do to have others answered."""
    given: dict[bytes, list[str]] = {}
    for name, value in headers:
        given.setdefault(name, []).append(value.decode("latin-1"))
    hosts, origins, types = (given.get(name, []) for name in (b"host", b"origin", b"content-type"))
    if len(hosts) != 1 or not _HOST.fullmatch(hosts[0]):
        message = f"host: {_shown(hosts)} is not a name of this machine's loopback: localhost, 127.0.0.1 or [::1]"
        raise Refused(421, f"{message}; to answer to other names, {how_to_open}")
    if any(not _ORIGIN.fullmatch(origin) for origin in origins):
        message = f"origin: {_shown(origins)} is a page of another site"
        raise Refused(403, f"{message}; to answer such pages, {how_to_open}")
    if method == "POST" and (len(types) != 1 or not _JSON.fullmatch(types[0])):
        message = f"content-type: {_shown(types)} is not taken; send 'content-type: application/json'"
        raise Refused(415, f"{message} (curl: -H 'content-type: application/json')")


def _shown(values: list[str]) -> str:
    return ", ".join(repr(value[:_SHOWN]) for value in values) or "none"
