"""The proxy between us and an endpoint, as `http_proxy`, `https_proxy`, `all_proxy` and `no_proxy` name it.

Looked up once. aiohttp's own `trust_env` takes two trips to a thread for every request, sends
a password of ~/.netrc where there is no key, and hands the proxy whatever headers its session has, the key among them.
Loopback is never asked through a proxy.
"""

from __future__ import annotations

import base64
import ipaddress
import json
import urllib.parse
import urllib.request
from typing import Any

from distill.errors import EnvironmentFault
from teacher.backends.openai.secrets import HIDDEN, MIN_SECRET


class Proxy:
    """The way to one endpoint. Its password leaves this object in a request's arguments alone; `repr` does not show it.

    Raises EnvironmentFault for a proxy that does not speak HTTP: to go past it in silence would be no better.
    """

    def __init__(self, proxy: str, *, tunnels: bool) -> None:
        scheme, _, rest = proxy.rpartition("://")
        login, _, address = rest.rpartition("@")
        self.url = f"{scheme or 'http'}://{address}"
        if not _speaks_http(self.url):
            message = f"names {self.url!r}; allowed: a proxy that speaks HTTP, as http://host:port"
            raise EnvironmentFault(message, where="$https_proxy" if tunnels else "$http_proxy")
        self._tunnels = tunnels
        self._login_as_given = login
        self._login = tuple(map(urllib.parse.unquote, login.partition(":")[::2])) if login else None

    @classmethod
    def of_environment(cls, url: str) -> Proxy | None:
        """The proxy that the environment names for `url`; None where it is asked directly."""
        try:
            parts = urllib.parse.urlsplit(url)
        except ValueError:  # no URL: whoever asks it will say so
            return None
        host, named = parts.hostname or "", urllib.request.getproxies()
        proxy = named.get(parts.scheme) or named.get("all")
        if not proxy or _is_loopback(host) or urllib.request.proxy_bypass(host):
            return None
        return cls(proxy, tunnels=parts.scheme == "https")

    def __repr__(self) -> str:
        return f"Proxy({self.url}, {'with' if self._login else 'without'} a password)"

    def for_aiohttp(self, headers: dict[str, str]) -> dict[str, Any]:
        """The arguments of a request that has `headers` of its own.

        aiohttp sends `proxy_headers` with CONNECT alone; without a tunnel the password goes with the request itself.
        """
        password = {"Proxy-Authorization": f"Basic {self._encoded}"} if self._login else {}
        if self._tunnels:
            return {"proxy": self.url, "proxy_headers": password, "headers": headers}
        return {"proxy": self.url, "headers": {**headers, **password}}

    def redacted(self, text: str) -> str:
        """`text` with the password starred out, in whatever form the proxy may echo it."""
        if self._login is None:
            return text
        password = self._login[1]
        forms = {self._encoded, self._login_as_given, ":".join(self._login)}
        if len(password) >= MIN_SECRET:
            forms |= {password, urllib.parse.quote(password, safe="")}
        for form in sorted(forms | {json.dumps(form)[1:-1] for form in forms}, key=len, reverse=True):
            text = text.replace(form, HIDDEN)
        return text

    @property
    def _encoded(self) -> str:
        """User and password as RFC 7617 writes them."""
        return base64.b64encode(":".join(self._login or ()).encode()).decode()


def _speaks_http(url: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def _is_loopback(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
