"""Stage manifests: a stage is complete when its `manifest.json` is there, and the manifest is written last.

`run_stage` runs a stage; a `StageRun` does the same in two steps, for a stage that prepares what its body needs. What
goes in is fingerprinted (input hashes, resolved config, potstill's own version); where the folder already holds a
manifest with that fingerprint and its outputs are still there, nothing runs. Otherwise the stage's body runs and the
manifest is written atomically (temporary file, fsync, rename, fsync of the folder). A body must itself be resumable:
what it finds in its folder from an interrupted run is its own to judge.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import json
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import ValidationError

from distill.device import device_name
from distill.errors import EnvironmentFault
from distill.failpoints import failpoint
from distill.hash_cache import LEAST_BYTES, HashCache, cache_folder
from distill.records import StageManifest, content_id

MANIFEST = "manifest.json"
VERSIONED = (
    "potstill",
    "torch",
    "transformers",
    "trl",
    "datasets",
    "accelerate",
    "lm-eval",
    "math-verify",
    "reasoning-gym",
)


_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free it"),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "make it writable"),
    errno.EIO: "see to the disk",
}


@contextmanager
def environment_faults(where: Path | str) -> Iterator[None]:
    """Translate a full disk, a read-only folder and the like into EnvironmentFault (exit 3)."""
    try:
        yield
    except OSError as exc:
        if (remedy := _REMEDIES.get(exc.errno or 0)) is None:
            raise
        raise EnvironmentFault(f"{exc.strerror}; {remedy} and run the same command again", where=where) from exc


def write_atomically(path: Path, data: str | bytes) -> None:
    """Write a whole file or nothing."""
    with atomic_file(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file that appears whole or not at all: temporary file beside it, fsync, rename, fsync of the folder."""
    with environment_faults(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            failpoint("file.written")
            temporary.replace(path)
            failpoint("file.renamed")
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)


@contextmanager
def atomic_folder(target: Path, *, within: Path | None = None) -> Iterator[Path]:
    """A folder that appears whole or not at all: filled beside its place, its files synced, renamed.

    `within` is another folder of the same disk to fill it in. Where another process was first, what it made stays.
    """
    with environment_faults(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=within or target.parent, prefix=".") as temporary:
            made = Path(temporary) / target.name
            made.mkdir()
            yield made
            for path in made.rglob("*"):
                sync_folder(path)
            try:
                made.rename(target)
            except OSError:
                if not target.is_dir():
                    raise
        sync_folder(target.parent)


def require_space(folder: Path, size_bytes: int) -> None:
    """Raise EnvironmentFault unless the disk of `folder`, which need not exist yet, has room for so many bytes."""
    there = folder.resolve()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if free < size_bytes:
        message = f"{size_bytes / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free"
        raise EnvironmentFault(message, where=folder)


def sync_folder(folder: Path) -> None:
    """Have the system write to the disk what it holds of a folder's entries (or of a file's bytes)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes, or of a folder's files: relative names and bytes, sorted.

    Of a folder manifests are left out, and what is hidden: programs note there when a file was downloaded. A file of
    `hash_cache.LEAST_BYTES` or more is read once, until it changes; a smaller one each time.
    """
    if path.is_dir():
        digest = hashlib.sha256()
        for inner in sorted(p for p in path.rglob("*") if p.is_file() and p.name != MANIFEST):
            if any(part.startswith(".") for part in inner.relative_to(path).parts):
                continue
            digest.update(f"{inner.relative_to(path).as_posix()}\0{hash_file(inner)}\n".encode())
        return digest.hexdigest()
    if path.stat().st_size < LEAST_BYTES:
        return _read_hash(path)
    return HashCache(cache_folder() / "hashes").digest(path, _read_hash)


def _read_hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def read_manifest(folder: Path) -> StageManifest | None:
    """The folder's manifest, or None where there is none or it is not one (then the stage is not complete)."""
    try:
        return StageManifest.model_validate_json((folder / MANIFEST).read_bytes())
    except (OSError, ValidationError):
        return None


def fingerprint(stage: str, inputs: Mapping[str, str], config: Mapping[str, Any], version: str | None = None) -> str:
    """`version` is that of the potstill that ran the stage; left out: this one."""
    return content_id([stage, dict(inputs), dict(config), version or version_of("potstill")])


def rewrite_manifest(
    folder: Path, manifest: StageManifest, config: Mapping[str, Any], counts: Mapping[str, Any]
) -> StageManifest:
    """Put in place of `manifest` the one of outputs that were made anew from the same inputs under another `config`.

    It stands for the potstill that ran the stage, as before: where a newer one would run it again, it still does.
    """
    made_by = manifest.versions["potstill"]
    changed = {
        "fingerprint": fingerprint(manifest.stage, manifest.inputs, config, made_by),
        "config": dict(config),
        "counts": dict(counts),
        "outputs": {name: hash_file(folder / name) for name in manifest.outputs},
    }
    rewritten = manifest.model_copy(update=changed)
    if rewritten != manifest:
        _write_manifest(folder, rewritten)
    return rewritten


def _write_manifest(folder: Path, manifest: StageManifest) -> None:
    write_atomically(folder / MANIFEST, json.dumps(manifest.model_dump(mode="json"), indent=2) + "\n")


class StageRun:
    """One stage about to run: its inputs are hashed once, when they are first asked for.

    `inputs` maps a name to a file or folder, `config` is the part of the resolved recipe that the stage depends on,
    `out_dir` the folder that belongs to it.
    """

    def __init__(self, stage: str, inputs: Mapping[str, Path], config: Mapping[str, Any], out_dir: Path) -> None:
        self._stage = stage
        self._inputs = dict(inputs)
        self._config = dict(config)
        self._out_dir = out_dir
        self._begun = time.monotonic()  # a stage may open models before it runs: that is part of what it takes

    @cached_property
    def _hashes(self) -> dict[str, str]:
        return {name: hash_file(path) for name, path in self._inputs.items()}

    @property
    def _fingerprint(self) -> str:
        return fingerprint(self._stage, self._hashes, self._config)

    def current(self) -> StageManifest | None:
        """The manifest in the folder where `run` would have nothing to do; None where it would.

        No input is read where there is no manifest.
        """
        done = read_manifest(self._out_dir)
        if done is None or done.fingerprint != self._fingerprint or not outputs_present(self._out_dir, done):
            return None
        return done

    def current_but_for(self, setting: str) -> StageManifest | None:
        """The manifest in the folder where `setting` is all of the config that may have changed since; None elsewhere.

        Its outputs are not looked at.
        """
        done = read_manifest(self._out_dir)
        if done is None or setting not in done.config:
            return None
        as_it_was = self._config | {setting: done.config[setting]}
        return done if done.fingerprint == fingerprint(self._stage, self._hashes, as_it_was) else None

    def run(self, body: Callable[[], Mapping[str, Any]], outputs: Iterable[str]) -> StageManifest:
        """Call `body`, which does the work inside the folder and returns counts, and write the manifest.

        `outputs` names the files or folders in the folder that later stages read; it is looked at after the body.
        """
        out_dir, hashes, print_ = self._out_dir, self._hashes, self._fingerprint
        with environment_faults(out_dir):
            out_dir.mkdir(parents=True, exist_ok=True)
            (out_dir / MANIFEST).unlink(missing_ok=True)
            failpoint("stage.begun", self._stage)
            counts = dict(body())
            failpoint("stage.ended", self._stage)
            manifest = StageManifest(
                stage=self._stage,
                fingerprint=print_,
                inputs=hashes,
                config=self._config,
                outputs={name: hash_file(out_dir / name) for name in outputs},
                versions={name: version_of(name) for name in VERSIONED},
                counts=counts,
                seconds=round(time.monotonic() - self._begun, 3),
                peak_rss_bytes=peak_rss_bytes(),
                device=device_name(),
            )
            _write_manifest(out_dir, manifest)
        return manifest


def run_stage(
    stage: str,
    inputs: Mapping[str, Path],
    config: Mapping[str, Any],
    out_dir: Path,
    body: Callable[[], Mapping[str, Any]],
    outputs: Iterable[str],
) -> StageManifest:
    """The manifest of the stage, which runs unless `out_dir` already holds its result (see `StageRun`)."""
    stage_run = StageRun(stage, inputs, config, out_dir)
    return stage_run.current() or stage_run.run(body, outputs)


def current(stage: str, inputs: Mapping[str, Path], config: Mapping[str, Any], out_dir: Path) -> StageManifest | None:
    """The manifest in `out_dir` where `run_stage` with these arguments would have nothing to do; None where it would.

    An input that is not there is something to do: the stage says what is missing.
    """
    if not all(path.exists() for path in inputs.values()):
        return None
    return StageRun(stage, inputs, config, out_dir).current()


def peak_rss_bytes() -> int:
    """The most memory this process or any one of its ended children held."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def outputs_present(folder: Path, manifest: StageManifest) -> bool:
    """Whether what the manifest lists is there as it was written."""
    return all(
        (folder / name).exists() and hash_file(folder / name) == value for name, value in manifest.outputs.items()
    )


def version_of(package: str) -> str:
    """The installed version of a package, or `not installed`."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
