"""`potstill serve`: a recipe's teacher, or the model in a folder, behind an HTTP API.

A native one in this process or over ranks, by `teacher.http`; a vLLM one as a server of this node that is watched,
and started again where it dies, until a signal ends it.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from distill.bundled import locate
from distill.errors import EnvironmentFault, Preempted, RecipeError
from distill.gguf import checkpoint_folder
from distill.progress import Progress, silent
from distill.recipe import SERVER_KEY_ENV, NativeTeacher, Recipe, TeacherConfig, VllmTeacher
from distill.records import Sampling
from pipelines.ports import SERVE_PORT
from pipelines.preemption import preemptible

LOOPBACK = ("127.0.0.1", "localhost", "::1")
# What a native teacher can be told to tell apart, under vLLM's names.
REASONING_PARSERS = ("deepseek_r1",)
OF_THE_RECIPE = "is for a native teacher; vLLM's own flags stand in its recipe"


@dataclass(frozen=True)
class ServerSettings:
    """What only a native server can be told.

    `max_waiting` bounds the queue (None: as `build_app` does), `reasoning_parser` (of `REASONING_PARSERS`) tells
    reasoning and answer apart, `end_loops` ends texts by `RepetitionLimit`'s defaults, `speculate` drafts with the MTP
    layer whatever the recipe says.
    """

    max_waiting: int | None = None
    speculate: bool = False
    reasoning_parser: str | None = None
    end_loops: bool = False


def serve_teacher(
    config: TeacherConfig,
    sampling: Sampling,
    settings: ServerSettings,
    *,
    host: str,
    port: int,
    base_dir: Path,
    announce: Callable[[str], object],
    node_rank: int = 0,
    progress: Progress | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM; `sampling` says what a request leaves open, `base_dir` where paths start.

    `announce` is told the address. `node_rank`: which node this is; others than the first serve its ranks.

    Raises RecipeError for a teacher that is itself an endpoint, for an address that others reach without a key set, and
    for a native server's settings with vLLM; EnvironmentFault where the address cannot be bound, and for ranks that do
    not come or are lost; Preempted where another node was told to stop.
    """
    if (parser := settings.reasoning_parser) not in (None, *REASONING_PARSERS):
        raise RecipeError(f"{parser!r} is not known; {', '.join(REASONING_PARSERS)} is", where="--reasoning-parser")
    if isinstance(config, VllmTeacher):
        _refuse_settings(settings)
        _serve_vllm(config, host=host, port=port, base_dir=base_dir, announce=announce, node_rank=node_rank)
        return
    if not isinstance(config, NativeTeacher):
        raise RecipeError("only a native or a vllm teacher can be served", where="recipe", field="teacher.backend")
    _check_node(config.num_nodes, node_rank)
    if node_rank:
        from teacher.backends.native.fleet import serve_node

        with preemptible():
            serve_node(config, node_rank, base_dir=base_dir, announce=announce)
    else:
        how = {"base_dir": base_dir, "announce": announce, "progress": progress or silent()}
        _serve_native(config, sampling, settings, host=host, port=port, **how)


def _refuse_settings(settings: ServerSettings) -> None:
    """Raise RecipeError for the first of them that was given."""
    for flag, is_given, message in (
        ("--max-waiting", settings.max_waiting is not None, "vLLM's queue has no bound"),
        ("--speculate", settings.speculate, "vLLM speculates by its own flag, speculative-config"),
        ("--reasoning-parser", settings.reasoning_parser is not None, OF_THE_RECIPE),
        ("--end-loops", settings.end_loops, OF_THE_RECIPE),
    ):
        if is_given:
            raise RecipeError(message, where=flag)


def _serve_native(
    config: NativeTeacher,
    sampling: Sampling,
    settings: ServerSettings,
    *,
    host: str,
    port: int,
    base_dir: Path,
    announce: Callable[[str], object],
    progress: Progress,
) -> None:
    key = _key(SERVER_KEY_ENV, host)
    name = checkpoint_folder(locate(config.model, base_dir), progress=progress).name
    listener = bind(host, port)

    from teacher.backends import open_teacher
    from teacher.engine.stopping import RepetitionLimit
    from teacher.http.app import build_app
    from teacher.http.server import serve

    config = config.model_copy(update={"system_prompt": None, "prompt_suffix": None})  # clients send what they mean
    if settings.speculate:
        config = config.model_copy(update={"speculate": True})
    with progress.task(f"load {name}", None):
        teacher = open_teacher(config, base_dir=base_dir, progress=progress, needs_template=False)
    app = build_app(
        teacher,
        model=name,
        sampling=sampling,
        max_batch=teacher.batch_size,
        api_key=key,
        reasoning="content" if settings.reasoning_parser is None else "apart",
        repetition=RepetitionLimit() if settings.end_loops else None,
        **({} if settings.max_waiting is None else {"max_waiting": settings.max_waiting}),
    )
    address = f"{host}:{listener.getsockname()[1]}"
    serve(app, listener, ready=lambda: announce(f"serving {name!r} on http://{address}/v1"))
    metrics = app.state.metrics
    if metrics.num_drafts:
        share = metrics.num_accepted / metrics.num_drafts
        announce(f"{metrics.num_accepted} of {metrics.num_drafts} drafted tokens came true ({share:.1%})")


def launch_plan(recipe: Recipe, *, host: str, port: int) -> list[str]:
    """The command of every node of a vLLM teacher, one line each, after checking its flags with the installed vLLM.

    Raises RecipeError for another backend and for a flag that this vLLM does not know, EnvironmentFault without vLLM.
    """
    from teacher.backends.vllm.launch import check_flags, installed_flags, installed_version, is_cpu_build, plan

    config = recipe.teacher
    if not isinstance(config, VllmTeacher):
        raise RecipeError("only a vllm teacher has a launch plan", where="recipe", field="teacher.backend")
    version = installed_version()
    local = Path(config.model).is_dir()
    # A plan for a Hub model is for GPU nodes, wherever it is printed.
    launches = plan(config, host=host, port=port or SERVE_PORT, on_cpu=is_cpu_build(version) and local)
    check_flags(launches, installed_flags(), version)
    return [launch.shell(config.api_key_env) for launch in launches]


def _serve_vllm(
    config: VllmTeacher, *, host: str, port: int, base_dir: Path, announce: Callable[[str], object], node_rank: int
) -> None:
    from teacher.backends.vllm.backend import located, make_server, served_name
    from teacher.backends.vllm.launch import installed_version

    version = installed_version()
    _check_node(config.num_nodes, node_rank)
    key = os.environ.get(config.api_key_env, "") if node_rank else _key(config.api_key_env, host)
    if node_rank == 0 and port:
        bind(host, port).close()
    config = located(config, base_dir)
    server = make_server(config, version, key=key, log=None, host=host, port=port or None, node_rank=node_rank)
    head = node_rank == 0
    try:
        server.start(wait=head)
        while True:
            announce(f"serving {served_name(config.model)!r} on {server.url}/v1" if head else f"node {node_rank} is up")
            server.wait()
            server.restart(wait=head)
    except (Preempted, KeyboardInterrupt):
        pass
    finally:
        server.stop()


def _check_node(num_nodes: int, node_rank: int) -> None:
    if node_rank >= num_nodes:
        raise RecipeError(f"the plan has nodes 0 to {num_nodes - 1}, got {node_rank}", where="--node-rank")


def _key(variable: str, host: str) -> str:
    """The key that the server asks for; without one it answers this machine alone."""
    key = os.environ.get(variable, "")
    if host not in LOOPBACK and not key:
        raise RecipeError(f"{host} can be reached from outside: set a key in ${variable}", where="--host")
    return key


def bind(host: str, port: int) -> socket.socket:
    """A listening socket, taken before the model is loaded so that a port in use shows at once."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as exc:
        raise EnvironmentFault(f"cannot be bound ({exc.strerror or exc})", where=f"{host}:{port}") from exc
    return listener
