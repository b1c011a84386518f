"""The place of a student's base: a folder here, one of those bundled with these packages, or a repository of the Hub.

Apart from `students.bases` so that looking a folder up costs no import of torch.
"""

from __future__ import annotations

from pathlib import Path

from distill import bundled
from distill.errors import CheckpointError, EnvironmentFault
from distill.recipe import StudentConfig


def locate(path: str) -> Path:
    """A path of a student file: from the current folder, else from these packages."""
    return bundled.locate(path, Path())


def resolve_base(student: StudentConfig) -> Path:
    """The base's checkpoint folder; a repository of the Hub is fetched into its cache first.

    Raises CheckpointError where neither a folder nor a repository has that name, EnvironmentFault where the Hub cannot
    be reached or refuses.
    """
    folder = locate(student.base)
    if folder.is_dir():
        return folder
    if student.base.count("/") != 1 or student.base.startswith((".", "/", "~")):
        raise CheckpointError("no such checkpoint folder", where=student.base)
    return _fetch(student)


def _fetch(student: StudentConfig) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "LICENSE*"]
    try:
        return Path(snapshot_download(student.base, revision=student.revision, allow_patterns=patterns))
    except RepositoryNotFoundError as exc:
        raise CheckpointError("neither a checkpoint folder nor a repository of the Hub", where=student.base) from exc
    except HfHubHTTPError as exc:
        status = exc.response.status_code if exc.response is not None else "no answer"
        raise EnvironmentFault(
            f"the Hub refused the base ({status}); its licence may need accepting", where=student.base
        ) from exc
    except (LocalEntryNotFoundError, OSError) as exc:
        raise EnvironmentFault("not in the cache, and the Hub cannot be reached", where=student.base) from exc
