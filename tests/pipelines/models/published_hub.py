"""A Hub on this machine that publishes one repository at one commit: what a download asks, over HTTP."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tests.loopback import on_loopback


@dataclass
class PublishedHub:
    """`files` are served as they are; `swapped` ones with other bytes than their hashes say."""

    repository: str
    revision: str
    files: dict[str, bytes]
    swapped: dict[str, bytes] = field(default_factory=dict)
    url: str = ""

    def app(self) -> Starlette:
        repository = f"/{self.repository}"
        routes = [
            Route(f"/api/models{repository}/revision/{self.revision}", self.info),
            Route(f"/api/models{repository}/tree/{self.revision}", self.tree),
            Route(f"{repository}/resolve/{self.revision}/{{name}}", self.resolve, methods=["GET", "HEAD"]),
        ]
        return Starlette(routes=routes)

    async def info(self, request: Request) -> Response:
        siblings = [{"rfilename": name, **_blob(name, data)} for name, data in self.files.items()]
        return JSONResponse({"id": self.repository, "sha": self.revision, "siblings": siblings})

    async def tree(self, request: Request) -> Response:
        entries = [
            {"type": "file", "path": name, "oid": "0" * 40, **_blob(name, data)} for name, data in self.files.items()
        ]
        return JSONResponse(entries)

    async def resolve(self, request: Request) -> Response:
        name = request.path_params["name"]
        data = self.swapped.get(name, self.files[name])
        etag = hashlib.sha256(self.files[name]).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": self.revision, "Content-Length": str(len(data))}
        return Response(b"" if request.method == "HEAD" else data, headers=headers)


def _blob(name: str, data: bytes) -> dict[str, Any]:
    """Size and, of a large file, the hash that the commit's pointer names."""
    if not name.endswith(".safetensors"):
        return {"size": len(data)}
    digest = hashlib.sha256(data).hexdigest()
    lfs = {"sha256": digest, "oid": digest, "size": len(data), "pointerSize": 130}
    return {"size": len(data), "lfs": lfs}


@contextmanager
def published_hub(repository: str, revision: str, folder: Path) -> Iterator[PublishedHub]:
    """Serve the folder's files on a free port, in a thread."""
    hub = PublishedHub(repository, revision, {path.name: path.read_bytes() for path in folder.iterdir()})
    with on_loopback(uvicorn.Config(hub.app(), log_level="error", lifespan="off")) as (host, port):
        hub.url = f"http://{host}:{port}"
        yield hub
