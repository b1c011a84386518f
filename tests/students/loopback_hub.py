"""A Hub on this machine: the endpoints that a push asks, over HTTP, storing what arrives.

`with loopback_hub(root) as hub:` serves on a free port in a thread. Files lie under `root/<owner>/<name>` as committed,
those of data sets under `root/datasets/<owner>/<name>`.
Large files go through the LFS protocol (batch, PUT, verify), small ones inside the commit, as on the real Hub.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
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

OWNER, TOKEN = "tester", "hf_loopback_secret"


@dataclass
class LoopbackHub:
    root: Path
    url: str = ""
    refuse: int | None = None
    hold_commits: bool = False
    held: int = 0
    repos: dict[str, dict[str, Any]] = field(default_factory=dict)
    commits: list[dict[str, Any]] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def app(self) -> Starlette:
        repo, api = "{owner}/{name}", "/api/{kind:str}/{owner}/{name}"
        routes = [
            Route("/api/repos/create", self.create, methods=["POST"]),
            Route("/api/validate-yaml", self.validate, methods=["POST"]),
            Route(api, self.info),
            Route(f"{api}/revision/main", self.info),
            Route(f"{api}/tree/main", self.tree),
            Route(f"{api}/preupload/main", self.preupload, methods=["POST"]),
            Route(f"/{repo}.git/info/lfs/objects/batch", self.batch, methods=["POST"]),
            Route(f"/datasets/{repo}.git/info/lfs/objects/batch", self.batch, methods=["POST"]),
            Route("/lfs/verify", self.verify, methods=["POST"]),
            Route("/lfs/{oid}", self.put, methods=["PUT"]),
            Route(f"{api}/commit/main", self.commit, methods=["POST"]),
            Route("/{rest:path}", self.unknown, methods=["GET", "HEAD", "POST"]),
        ]
        return Starlette(routes=routes)

    def _refused(self, request: Request) -> Response | None:
        self.requests.append(f"{request.method} {request.url.path}")
        status = self.refuse
        if status is None and request.headers.get("authorization") != f"Bearer {TOKEN}":
            status = 401
        said = f"refused {request.headers.get('authorization')}"  # as a careless proxy would say it
        return JSONResponse({"error": said}, status_code=status) if status else None

    async def create(self, request: Request) -> Response:
        if refused := self._refused(request):
            return refused
        body = await request.json()
        kind = "datasets/" if body.get("type") == "dataset" else ""
        repo = f"{kind}{body.get('organization') or OWNER}/{body['name']}"
        url = f"{self.url}/{repo}"
        if repo in self.repos:
            return JSONResponse({"error": "exists", "url": url}, status_code=409)
        self.repos[repo] = body
        return JSONResponse({"url": url, "name": repo.removeprefix("datasets/")})

    async def validate(self, request: Request) -> Response:
        self.requests.append("POST /api/validate-yaml")
        body = await request.json()
        valid = body["content"].startswith("---\n") and "license:" in body["content"].split("---")[1]
        errors = [] if valid else [{"message": "no front matter"}]
        return JSONResponse({"errors": errors, "warnings": []}, status_code=200 if valid else 400)

    async def info(self, request: Request) -> Response:
        if refused := self._refused(request):
            return refused
        repo = _repo(request)
        known = {
            "id": repo.removeprefix("datasets/"),
            "sha": "0" * 40,
            "siblings": [],
            "private": self.repos[repo].get("visibility") == "private",
        }
        return JSONResponse(known)

    async def tree(self, request: Request) -> Response:
        if refused := self._refused(request):
            return refused
        folder = self.root / _repo(request)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        entries = [
            {"type": "file", "path": path.relative_to(folder).as_posix(), "size": path.stat().st_size, "oid": "0" * 40}
            for path in files
        ]
        return JSONResponse(entries)

    async def preupload(self, request: Request) -> Response:
        if refused := self._refused(request):
            return refused
        files = [
            {"path": file["path"], "uploadMode": _mode(file["path"]), "shouldIgnore": False}
            for file in (await request.json())["files"]
        ]
        return JSONResponse({"files": files})

    async def batch(self, request: Request) -> Response:
        if refused := self._refused(request):
            return refused
        actions = {"verify": {"href": f"{self.url}/lfs/verify"}}
        objects = [
            {**item, "actions": {"upload": {"href": f"{self.url}/lfs/{item['oid']}"}, **actions}}
            for item in (await request.json())["objects"]
        ]
        return JSONResponse({"transfer": "basic", "objects": objects})

    async def put(self, request: Request) -> Response:
        data = await request.body()
        if hashlib.sha256(data).hexdigest() != request.path_params["oid"]:
            return Response(status_code=422)
        self._blob(request.path_params["oid"]).write_bytes(data)
        return Response()

    async def verify(self, request: Request) -> Response:
        body = await request.json()
        there = self._blob(body["oid"]).is_file() and self._blob(body["oid"]).stat().st_size == body["size"]
        return Response(status_code=200 if there else 404)

    async def commit(self, request: Request) -> Response:
        if refused := self._refused(request):
            return refused
        repo = _repo(request)
        body = await request.body()
        self.held += self.hold_commits
        while self.hold_commits:
            await asyncio.sleep(0.01)
        for line in body.splitlines():
            entry = json.loads(line)
            self._apply(self.root / repo, entry["key"], entry["value"])
        oid = hashlib.sha1(str(len(self.commits)).encode()).hexdigest()
        return JSONResponse({"commitUrl": f"{self.url}/{repo}/commit/{oid}", "commitOid": oid, "success": True})

    async def unknown(self, request: Request) -> Response:
        self.requests.append(f"unknown: {request.method} {request.url.path}")
        return JSONResponse({"error": "not found"}, status_code=404)

    def _apply(self, folder: Path, key: str, value: dict[str, Any]) -> None:
        if key == "header":
            self.commits.append(value)
            return
        path = folder / value["path"]
        if key == "deletedFile":
            path.unlink()
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(value["content"]) if key == "file" else self._blob(value["oid"]).read_bytes())

    def _blob(self, oid: str) -> Path:
        folder = self.root / ".lfs"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / oid


def _repo(request: Request) -> str:
    """`owner/name` of a model, `datasets/owner/name` of a data set, as their addresses are."""
    kind = "" if request.path_params["kind"] == "models" else "datasets/"
    return "{kind}{owner}/{name}".format(**{**request.path_params, "kind": kind})


def _mode(path: str) -> str:
    return "lfs" if path.endswith((".safetensors", ".parquet")) else "regular"


@contextmanager
def loopback_hub(root: Path) -> Iterator[LoopbackHub]:
    hub = LoopbackHub(root)
    with on_loopback(uvicorn.Config(hub.app(), log_level="error", lifespan="off")) as (host, port):
        hub.url = f"http://{host}:{port}"
        yield hub
