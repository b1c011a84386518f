"""`potstill serve`: the recipe's teacher behind the HTTP API of `teacher.serve`."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

from distill.errors import EnvironmentFault, RecipeError
from distill.recipe import NativeTeacher, Recipe


def serve_teacher(recipe: Recipe, *, host: str, port: int, announce: Callable[[str], object]) -> None:
    """Load the teacher, bind, announce the address and serve until SIGINT or SIGTERM.

    Raises RecipeError for a teacher that is itself an endpoint, EnvironmentFault where the address cannot be bound.
    """
    config = recipe.teacher
    if not isinstance(config, NativeTeacher):
        raise RecipeError("only a native teacher can be served", where="recipe", field="teacher.backend")
    listener = _bind(host, port)

    from teacher.backends import open_teacher
    from teacher.serve.http import build_app, serve

    name = Path(config.model).name
    teacher = open_teacher(config, base_dir=Path.cwd())
    app = build_app(teacher, model=name, sampling=recipe.generate.sampling, max_batch=config.batch_size)
    address = f"{host}:{listener.getsockname()[1]}"
    serve(app, listener, ready=lambda: announce(f"serving {name!r} on http://{address}/v1"))


def _bind(host: str, port: int) -> socket.socket:
    """A listening socket, taken before the model is loaded so that a port in use shows at once."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as exc:
        raise EnvironmentFault(f"cannot be bound ({exc.strerror or exc})", where=f"{host}:{port}") from exc
    return listener
