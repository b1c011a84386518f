"""The HTTP application on a socket: uvicorn with the guards in front, until a signal ends it."""

from __future__ import annotations

import contextlib
import gc
import resource
import socket
from collections.abc import Callable

import uvicorn
from starlette.applications import Starlette

from distill.errors import PotstillError, Preempted
from teacher.http.guard import MAX_CONNECTIONS, OTHER_FILES, GuardedProtocol, LoopbackMiddleware

SHUTDOWN_S = 60


def guarded(app: Starlette) -> uvicorn.Config:
    """uvicorn's settings for what `build_app` made, with all that stands between it and the network."""
    return uvicorn.Config(
        app if app.state.asks_for_key else LoopbackMiddleware(app),
        log_level="error",
        proxy_headers=False,
        http=GuardedProtocol,
        ws="none",
        timeout_graceful_shutdown=SHUTDOWN_S,
    )


def serve(app: Starlette, listener: socket.socket, *, ready: Callable[[], object]) -> None:
    """Serve on a bound socket until SIGINT or SIGTERM, calling `ready` once requests are taken.

    Requests that are under way when the signal comes are finished first; then this returns. Raises what ended the
    teacher, if something did, or why it is to be given no more.
    """

    class Ready(uvicorn.Server):
        fault: PotstillError | None = None

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            # What has been imported and loaded stays: every full collection would look through it all again, which
            # is 0.3 s with torch and transformers.
            gc.collect()
            gc.freeze()
            ready()

        async def on_tick(self, counter: int) -> bool:
            self.fault = app.state.feed.fault
            return await super().on_tick(counter) or self.fault is not None

    server = Ready(guarded(app))
    _allow_files()
    try:
        with contextlib.suppress(KeyboardInterrupt, Preempted):  # uvicorn raises the signal again after its orderly end
            server.run([listener])
    finally:
        gc.unfreeze()
    if server.fault is not None:
        raise server.fault


def _allow_files() -> None:
    """Let this process have as many connections as it takes, where the system lets it: each is an open file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_CONNECTIONS + OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
