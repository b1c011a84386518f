"""Endpoints behind a proxy that the environment names: which one, and what it is told. TLS: tests/pipelines."""

from __future__ import annotations

import itertools

import pytest

from distill.errors import EnvironmentFault
from distill.recipe import OpenAITeacher
from distill.records import Problem, Sampling, TraceRequest
from teacher.backends.openai import OpenAICompatibleTeacher
from teacher.backends.openai.proxy import Proxy
from tests.teacher.backends.openai.chat_endpoint import ChatEndpoint, serving
from tests.teacher.backends.openai.forward_proxy import HOST, VARIABLES, encoded, proxying

LOGIN = "me:p@ss w/+rd"
IN_A_URL = "me:p%40ss%20w%2F%2Brd"


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def ask(port: int) -> list[str]:
    config = OpenAITeacher(
        base_url=f"http://{HOST}:{port}/v1", model="pico", api_key_env="CANARY_KEY", max_retries=0, max_concurrency=3
    )
    problems = [Problem(prompt=f"{n} + 1?", answer=None, grader="math", source="t") for n in range(9)]
    requests = [TraceRequest(problem=problem, sample_index=0) for problem in problems]
    done = OpenAICompatibleTeacher(config).generate(requests, Sampling(max_tokens=8))
    return [completion.text for completion in done]


def fields(head: str, name: str) -> list[str]:
    lines = [line.partition(": ") for line in head.split("\r\n")[1:]]
    return [value for field, _, value in lines if field.lower() == name]


@pytest.mark.parametrize(("login", "in_url"), [(LOGIN, f"{IN_A_URL}@"), (None, "")], ids=["password", "none"])
def test_a_plain_endpoint_is_asked_through_it(monkeypatch: pytest.MonkeyPatch, login: str | None, in_url: str) -> None:
    monkeypatch.setenv("CANARY_KEY", "sk-1234567")
    with serving(ChatEndpoint(key="sk-1234567")) as endpoint, proxying(login) as proxy:
        monkeypatch.setenv("http_proxy", f"http://{in_url}{proxy.address}")
        assert len(ask(endpoint.port)) == 9
    assert len(endpoint.payloads) == 9
    posts = [
        head for head in proxy.heads if head.startswith(f"POST http://{HOST}:{endpoint.port}/v1/chat/completions ")
    ]
    assert len(posts) == 9
    for head in proxy.heads:
        assert fields(head, "proxy-authorization") == ([f"Basic {encoded(login)}"] if login else [])
        assert fields(head, "authorization") == ["Bearer sk-1234567"]
        assert "%40" not in head


@pytest.mark.parametrize("secret", [LOGIN, IN_A_URL, encoded(LOGIN), LOGIN.partition(":")[2]])
def test_one_that_refuses_the_password_is_named_and_the_password_is_not(
    monkeypatch: pytest.MonkeyPatch, secret: str
) -> None:
    with serving(ChatEndpoint()) as endpoint, proxying("another:one") as proxy:
        monkeypatch.setenv("http_proxy", f"http://{IN_A_URL}@{proxy.address}")
        with pytest.raises(EnvironmentFault, match=r"proxy .* refuses user and password \(HTTP 407") as caught:
            ask(endpoint.port)
    assert secret not in str(caught.value)
    assert str(caught.value).count("***") == 2, "it echoed both forms"
    assert not endpoint.payloads


def test_a_proxy_that_begins_to_refuse_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(ChatEndpoint()) as endpoint, proxying(LOGIN) as proxy:
        monkeypatch.setenv("http_proxy", f"http://{IN_A_URL}@{proxy.address}")
        config = OpenAITeacher(base_url=f"http://{HOST}:{endpoint.port}/v1", model="pico", max_retries=0)
        teacher = OpenAICompatibleTeacher(config)
        proxy.login = "another:one"
        problem = Problem(prompt="1 + 1?", answer=None, grader="math", source="t")
        with pytest.raises(EnvironmentFault, match="refuses user and password") as caught:
            list(teacher.generate([TraceRequest(problem=problem, sample_index=0)], Sampling(max_tokens=8)))
    assert encoded(LOGIN) not in str(caught.value)
    assert LOGIN not in str(caught.value)


def test_which_urls_it_stands_before(monkeypatch: pytest.MonkeyPatch) -> None:
    urls = [f"{scheme}://{host}/v1" for scheme, host in itertools.product(("http", "https"), ("a.test:8000", "b.test"))]
    loopback = ["http://127.0.0.1:8000/v1", "http://localhost/v1", "https://[::1]:8000/v1", "http://x.localhost:1/"]
    assert [Proxy.of_environment(url) for url in urls] == [None] * 4
    monkeypatch.setenv("all_proxy", "three.test:3128")
    monkeypatch.setenv("https_proxy", "http://two.test:3128")
    found = [Proxy.of_environment(url) for url in urls]
    assert [proxy and proxy.url for proxy in found] == ["http://three.test:3128"] * 2 + ["http://two.test:3128"] * 2
    monkeypatch.setenv("http_proxy", "https://one.test")
    monkeypatch.setenv("no_proxy", "b.test")
    found = [Proxy.of_environment(url) for url in urls]
    assert [proxy and proxy.url for proxy in found] == ["https://one.test", None, "http://two.test:3128", None]
    assert [Proxy.of_environment(url) for url in loopback] == [None] * 4


@pytest.mark.parametrize("proxy", ["socks5://me:secret1@p.test:1080", "http://me:secret1@", "http://me:secret1@p:x"])
def test_what_speaks_no_http_is_refused_and_not_gone_past(monkeypatch: pytest.MonkeyPatch, proxy: str) -> None:
    monkeypatch.setenv("https_proxy", proxy)
    with pytest.raises(EnvironmentFault, match=r"\$https_proxy: names .* allowed") as caught:
        Proxy.of_environment("https://endpoint.test/v1")
    assert "secret1" not in str(caught.value)


def test_its_password_does_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", f"http://{IN_A_URL}@p.test:3128")
    proxy = Proxy.of_environment("https://endpoint.test/v1")
    assert proxy is not None
    assert repr(proxy) == "Proxy(http://p.test:3128, with a password)"
    tunnel = proxy.for_aiohttp({"Authorization": "Bearer sk-1234567"})
    assert tunnel["proxy_headers"] == {"Proxy-Authorization": f"Basic {encoded(LOGIN)}"}
    assert tunnel["headers"] == {"Authorization": "Bearer sk-1234567"}
