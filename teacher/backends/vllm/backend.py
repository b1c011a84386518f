"""The vLLM backend: a server of ours on this machine, asked through the client for OpenAI-compatible endpoints.

The server starts with the first sample that is asked for, so a ledger that has them all costs nothing, and ends with
`close` or with this process. Where it dies, the samples in flight are asked again from the next one. Samples are
identified as the native backend's are: by the hash of weights and template, and vLLM's version for the engine; the
BF16 copy that its CPU build needs is not another model. On several nodes this is node 0; `potstill serve --node-rank`
starts the others.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from distill.bundled import locate
from distill.errors import CheckpointError, EnvironmentFault
from distill.gguf import checkpoint_folder, is_gguf
from distill.model_folder import check_model_folder
from distill.progress import Progress
from distill.recipe import OpenAITeacher, ServedTeacher, VllmTeacher
from distill.records import Completion, Sampling, TeacherIdentity, TraceRequest, content_id
from distill.weights import folder_identity
from teacher.backends.folder import check_cpu_sizes, readable_on_cpu
from teacher.backends.openai import OpenAICompatibleTeacher
from teacher.backends.openai.answers import Answer
from teacher.backends.vllm.launch import (
    KEY_VARIABLE,
    installed_version,
    is_cpu_build,
    plan,
    served_name,
    startup_timeout_s,
)
from teacher.backends.vllm.server import Server

LOOPBACK = "127.0.0.1"


def open_vllm(
    config: VllmTeacher, *, base_dir: Path, log_dir: Path | None = None, progress: Progress | None = None
) -> VllmBackend:
    """Check version and folder; nothing is started yet. The log goes to `log_dir`/vllm.log (default: `base_dir`).

    Raises EnvironmentFault for a vLLM that is missing or too old, CheckpointError for a folder that cannot be served.
    """
    version = installed_version()
    return VllmBackend(located(config, base_dir), version, log=(log_dir or base_dir) / "vllm.log", progress=progress)


def check_vllm(config: VllmTeacher, *, base_dir: Path) -> str:
    """Say what the backend would serve, in a line; nothing is asked of the Hub. Raises as `open_vllm` does."""
    version = installed_version()
    folder = locate(config.model, base_dir)
    if folder.exists() or not is_repository(config.model, base_dir):
        folder = _folder(config, base_dir)
        if is_cpu_build(version):
            check_cpu_sizes(folder)
    return f"{config.model}, served by vLLM {version}"


def located(config: VllmTeacher, base_dir: Path) -> VllmTeacher:
    """The config with its model as an absolute folder, or at the commit that the Hub names now."""
    if locate(config.model, base_dir).is_dir() or not is_repository(config.model, base_dir):
        return config.model_copy(update={"model": str(_folder(config, base_dir).resolve())})
    return config.model_copy(update={"revision": _commit(config.model, config.revision)})


class VllmBackend:
    """A `Teacher` over one vLLM server."""

    def __init__(self, config: VllmTeacher, version: str, *, log: Path, progress: Progress | None = None) -> None:
        self.config = config
        self.version = version
        self._key = os.environ.get(config.api_key_env) or secrets.token_urlsafe(24)
        self._log = log
        self._progress = progress
        self._server: Server | None = None
        self._client: OpenAICompatibleTeacher | None = None
        self._lock = threading.Lock()

    @cached_property
    def identity(self) -> TeacherIdentity:
        return vllm_identity(self.config, self.version)

    @property
    def url(self) -> str:
        """The server's address, without `/v1`; it is started if it has not been. Its key is `key`."""
        return self._running().url

    @property
    def key(self) -> str:
        return self._key

    def generate(self, requests: Sequence[TraceRequest], sampling: Sampling) -> Iterator[Completion]:
        """Yield completions as they finish. Raises EnvironmentFault where the server cannot be brought up (again)."""
        waiting = {(request.problem.id, request.sample_index): request for request in requests}

        def ask(client: OpenAICompatibleTeacher) -> Iterator[tuple[Any, Completion]]:
            with contextlib.closing(client.generate(list(waiting.values()), sampling)) as stream:
                for completion in stream:
                    yield (completion.request.problem.id, completion.request.sample_index), completion

        with contextlib.closing(self._asked_again(waiting, ask)) as stream:
            for _, completion in stream:
                yield completion

    def complete(self, payloads: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, Answer]]:
        """As `OpenAICompatibleTeacher.complete`, of a server that is started again where it dies."""
        waiting = dict(enumerate(payloads))

        def ask(client: OpenAICompatibleTeacher) -> Iterator[tuple[int, Answer]]:
            numbers = list(waiting)
            with contextlib.closing(client.complete(list(waiting.values()))) as stream:
                for number, answer in stream:
                    yield numbers[number], answer

        yield from self._asked_again(waiting, ask)

    def _asked_again(
        self, waiting: dict[Any, Any], ask: Callable[[OpenAICompatibleTeacher], Iterator[tuple[Any, Any]]]
    ) -> Iterator[tuple[Any, Any]]:
        """What `ask` brings for what waits, until nothing does; what a server that died still owed is asked again."""
        while waiting:
            server = self._running()
            try:
                self._client = self.client(server)
                with contextlib.closing(ask(self._client)) as stream:
                    for key, answer in stream:
                        if waiting.pop(key, None) is not None:
                            yield key, answer
            except EnvironmentFault:
                if server.alive:
                    raise
                with self._lock:
                    if not server.alive:  # else another caller of `generate` was first
                        server.restart()

    def facts(self) -> dict[str, str | float]:
        """The client's, for the progress bar."""
        return self._client.facts() if self._client is not None else {}

    def client(self, server: Server) -> OpenAICompatibleTeacher:
        settings = client_settings(self.config, f"{server.url}/v1", served_name(self.config.model))
        return OpenAICompatibleTeacher(settings, api_key=self._key, gone=lambda: not server.alive)

    def close(self) -> None:
        """End the server."""
        if self._server is not None:
            self._server.stop()

    def _running(self) -> Server:
        with self._lock:
            return self._server or self._start()

    def _start(self) -> Server:
        if self._server is None:
            server = make_server(self.config, self.version, key=self._key, log=self._log, progress=self._progress)
            server.start()
            self._server = server
        return self._server


def make_server(
    config: VllmTeacher,
    version: str,
    *,
    key: str,
    log: Path | None,
    host: str = LOOPBACK,
    port: int | None = None,
    node_rank: int = 0,
    progress: Progress | None = None,
) -> Server:
    """The server of one node, not started. Where the CPU build needs a BF16 copy of the weights, it is made here."""
    on_cpu = is_cpu_build(version)
    timeout_s = startup_timeout_s(config, config.model)
    if on_cpu and Path(config.model).is_dir():
        config = config.model_copy(update={"model": str(readable_on_cpu(Path(config.model)))})
    port = port or _free_port()
    launch = plan(config, host=host, port=port, on_cpu=on_cpu)[node_rank]
    # The server imports our middleware from where this process has it.
    environment = {**launch.environment, KEY_VARIABLE: key, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return Server(
        launch.command,
        url=f"http://{LOOPBACK if host in ('0.0.0.0', '::') else host}:{port}",
        environment=environment,
        startup_timeout_s=timeout_s,
        max_restarts=config.max_restarts,
        log=log,
        secret=key,
        progress=progress,
    )


def client_settings(config: ServedTeacher, base_url: str, model: str) -> OpenAITeacher:
    """Settings for asking the endpoint at `base_url`, from what the recipe says of asking."""
    shared = {name: getattr(config, name) for name in ServedTeacher.model_fields}
    return OpenAITeacher.model_validate(shared | {"base_url": base_url, "model": model})


def vllm_identity(config: VllmTeacher, version: str) -> TeacherIdentity:
    """Weights and template as the native backend names them, vLLM's version, and the flags that change numbers."""
    numerics = config.numerics
    engine = version if not numerics else f"{version} {content_id(numerics, digits=8)}"
    if Path(config.model).is_dir():
        identity = folder_identity(Path(config.model), backend="vllm", backend_version=engine)
    else:
        identity = TeacherIdentity(
            name=config.model,
            weights=f"{config.model}@{config.revision}",
            template=f"{config.model}@{config.revision}",
            backend="vllm",
            backend_version=engine,
        )
    asked = [config.system_prompt, config.extra_body, config.budget_forcing, config.opens_thinking]
    asked += [config.prompt_suffix] if config.prompt_suffix else []
    return identity.asked_with([] if asked == [None, {}, "completions", True] else asked)


def is_repository(model: str, base_dir: Path) -> bool:
    """True where `model` is owner/name on the Hub, and not a folder that is missing (its parent is here)."""
    owner, _, name = model.partition("/")
    named = bool(name) and "/" not in name and not is_gguf(Path(model))
    return named and owner not in ("", ".", "..", "~") and not (base_dir / owner).is_dir()


def _folder(config: VllmTeacher, base_dir: Path) -> Path:
    folder = checkpoint_folder(locate(config.model, base_dir))
    if not folder.is_dir():
        raise CheckpointError("no such checkpoint folder", where=folder, field="teacher.model")
    check_model_folder(folder)
    return folder


def _commit(repo: str, revision: str) -> str:
    """The commit that a branch or tag names: what the Hub says, else what was downloaded last, else the name itself."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        return HfApi().model_info(repo, revision=revision, timeout=10).sha or revision
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError):
        cached = try_to_load_from_cache(repo, "config.json", revision=revision)
        return Path(cached).parent.name if isinstance(cached, str) else revision


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])
