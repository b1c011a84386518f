"""A canary key and a canary password through a proxy: CONNECT to an endpoint with TLS, by the real command line.

In a process of its own, because what a process trusts is settled when it starts (`SSL_CERT_FILE`).
"""

from __future__ import annotations

import base64
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.pipelines.canary import command_lines_with, places_with
from tests.pipelines.test_canary import KEY, recipe
from tests.pipelines.tiny_world import potstill
from tests.teacher.backends.openai.chat_endpoint import ChatEndpoint, serving
from tests.teacher.backends.openai.forward_proxy import HOST, VARIABLES, certificate, encoded, proxying

PASSWORD = "canary-7c1d@/+91"
LOGIN = f"me:{PASSWORD}"
SECRETS = (KEY, PASSWORD, quote(PASSWORD, safe=""), encoded(LOGIN), base64.b64encode(KEY.encode()).decode())


def run(folder: Path, port: int, proxy: str, trusted: Path) -> tuple[int, str, str]:
    """The secrets are in this process's environment alone: everything that is written lies under `folder`."""
    names = dict.fromkeys([*VARIABLES, *map(str.upper, VARIABLES)], "")
    environment = names | {"https_proxy": proxy, "SSL_CERT_FILE": str(trusted)}
    environment |= {"CANARY_KEY": KEY, "POTSTILL_DEBUG": "1"}
    path = recipe(folder, f"https://{HOST}:{port}/v1", max_retries=1)
    done = potstill("generate", path, "--out", folder / "runs", **environment)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("login", [LOGIN, None], ids=["password", "none"])
@pytest.mark.slow
def test_a_tunnel_carries_the_key_unseen(tmp_path: Path, login: str | None) -> None:
    seen: list[str] = []
    tls = certificate(tmp_path)
    with serving(ChatEndpoint(key=KEY), tls=tls) as endpoint, proxying(login) as proxy:
        endpoint.fault = lambda number, payload: seen.extend(
            line for secret in SECRETS for line in command_lines_with(secret)
        )
        in_url = f"me:{quote(PASSWORD, safe='')}@" if login else ""
        code, stdout, stderr = run(tmp_path, endpoint.port, f"http://{in_url}{proxy.address}", tls[1])
    assert code == 0, stderr
    assert len(endpoint.payloads) == 24
    assert len(proxy.heads) >= 3, "two questions before the first sample, and the samples"
    for head in proxy.heads:
        assert head.startswith(f"CONNECT {HOST}:{endpoint.port} HTTP/1.1\r\n")
        shown = [line for line in head.split("\r\n") if "authorization" in line.lower()]
        assert [line.lower() for line in shown] == (
            [f"Proxy-Authorization: Basic {encoded(LOGIN)}".lower()] if login else []
        )
        assert KEY not in head
    assert proxy.passed
    for secret in SECRETS:
        assert secret.encode() not in proxy.passed
        assert places_with(secret, tmp_path, stdout, stderr) == []
    assert not seen


def test_a_refused_password_is_in_no_error(tmp_path: Path) -> None:
    tls = certificate(tmp_path)
    with serving(ChatEndpoint(key=KEY), tls=tls) as endpoint, proxying("another:one") as proxy:
        url = f"http://me:{quote(PASSWORD, safe='')}@{proxy.address}"
        code, stdout, stderr = run(tmp_path, endpoint.port, url, tls[1])
    assert code == 3, stderr
    assert "refuses user and password (HTTP 407: not with" in stderr
    assert "Traceback" in stderr, "it is searched too"
    for secret in SECRETS:
        assert places_with(secret, tmp_path, stdout, stderr) == []
    assert not endpoint.payloads
