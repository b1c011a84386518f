"""A Hub on this machine that publishes data sets at one commit each: what `datasets` asks of it, over HTTP."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tests.loopback import on_loopback

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class PublishedDataSets:
    """Repository -> path in it -> bytes. `downloads` are the paths that were fetched whole."""

    repositories: Mapping[str, Mapping[str, bytes]]
    url: str = ""
    downloads: list[str] = field(default_factory=list)

    def app(self) -> Starlette:
        repo, api = "/datasets/{owner}/{name}", "/api/datasets/{owner}/{name}"
        routes = [
            Route(f"{api}/revision/{{revision}}", self.info),
            Route(f"{api}/tree/{{revision}}", self.tree),
            Route(f"{api}/tree/{{revision}}/{{path:path}}", self.tree),
            Route(f"{api}/paths-info/{{revision}}", self.paths_info, methods=["POST"]),
            Route(f"{repo}/resolve/{{revision}}/{{path:path}}", self.resolve, methods=["GET", "HEAD"]),
        ]
        return Starlette(routes=routes)

    async def info(self, request: Request) -> Response:
        if (files := self._files(request)) is None:
            return _missing("RepoNotFound")
        siblings = [{"rfilename": path} for path in files]
        return JSONResponse({"id": _repo(request), "sha": COMMIT, "siblings": siblings, "private": False})

    async def tree(self, request: Request) -> Response:
        folder = request.path_params.get("path", "")
        below = {path: data for path, data in (self._files(request) or {}).items() if path.startswith(folder)}
        recursive = request.query_params.get("recursive", "").lower() == "true"
        return JSONResponse(_entries(below, folder, recursive=recursive)) if below else _missing("EntryNotFound")

    async def paths_info(self, request: Request) -> Response:
        form = await request.form() if "form" in request.headers.get("content-type", "") else await request.json()
        wanted = form.getlist("paths") if hasattr(form, "getlist") else form["paths"]
        files = self._files(request) or {}
        found: list[dict[str, Any]] = []
        for path in wanted:
            if path in files:
                found.append(_file(path, files[path]))
            elif any(name.startswith(f"{path}/") for name in files):
                found.append({"type": "directory", "path": path, "oid": "0" * 40, "size": 0})
        return JSONResponse(found)

    async def resolve(self, request: Request) -> Response:
        files, path = self._files(request), request.path_params["path"]
        if files is None:
            return _missing("RepoNotFound")
        if path not in files:
            return _missing("EntryNotFound")
        if request.method == "GET":
            self.downloads.append(path)
        data = files[path]
        etag = hashlib.sha256(data).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Content-Length": str(len(data))}
        return Response(b"" if request.method == "HEAD" else data, headers=headers)

    def _files(self, request: Request) -> Mapping[str, bytes] | None:
        return self.repositories.get(_repo(request))


def _repo(request: Request) -> str:
    return "{owner}/{name}".format(**request.path_params)


def _missing(code: str) -> Response:
    return JSONResponse({"error": code}, status_code=404, headers={"X-Error-Code": code, "X-Repo-Commit": COMMIT})


def _file(path: str, data: bytes) -> dict[str, Any]:
    return {"type": "file", "path": path, "oid": hashlib.sha1(data).hexdigest(), "size": len(data)}


def _entries(files: Mapping[str, bytes], folder: str, *, recursive: bool) -> list[dict[str, Any]]:
    prefix = f"{folder}/" if folder else ""
    entries: dict[str, dict[str, Any]] = {}
    for path, data in files.items():
        head, slash, _ = path.removeprefix(prefix).partition("/")
        if slash:
            place = prefix + head
            entries.setdefault(place, {"type": "directory", "path": place, "oid": "0" * 40, "size": 0})
        if not slash or recursive:
            entries[path] = _file(path, data)
    return list(entries.values())


@contextmanager
def published_data_sets(repositories: Mapping[str, Mapping[str, bytes]]) -> Iterator[PublishedDataSets]:
    """Serve them on a free port, in a thread."""
    hub = PublishedDataSets(repositories)
    with on_loopback(uvicorn.Config(hub.app(), log_level="error", lifespan="off")) as (host, port):
        hub.url = f"http://{host}:{port}"
        yield hub
