"""The place of a student's base: a folder here, one bundled with these packages, one that was fetched, or the Hub.

Apart from `students.bases` so that looking a folder up costs no import of torch.
"""

from __future__ import annotations

from pathlib import Path

from distill import bundled
from distill.errors import CheckpointError, EnvironmentFault
from distill.recipe import StudentConfig

FETCHED = "models"  # where `potstill models fetch` puts a repository, under the last part of its name
# A base's texts that go with a student wherever it goes: licence, notices, what use is allowed.
LEGAL = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")


def locate(path: str) -> Path:
    """A path of a student file: from the current folder, else from these packages."""
    return bundled.locate(path, Path())


def is_repository(base: str) -> bool:
    """Tell whether `base` is formed like the name of a repository of the Hub: `organisation/model`."""
    return base.count("/") == 1 and not base.startswith((".", "/", "~"))


def local_base(base: str) -> Path | None:
    """The base's folder on this machine: a path, or where a repository of that name was fetched to."""
    folder = locate(base)
    if folder.is_dir():
        return folder
    fetched = locate(f"{FETCHED}/{base.rpartition('/')[2]}")
    return fetched if is_repository(base) and (fetched / "config.json").is_file() else None


def resolve_base(student: StudentConfig) -> Path:
    """The base's checkpoint folder; a repository that is not here is fetched from the Hub into its cache first.

    Raises CheckpointError where neither a folder nor a repository has that name, EnvironmentFault where the Hub cannot
    be reached or refuses.
    """
    folder = local_base(student.base)
    if folder is not None:
        return folder
    if not is_repository(student.base):
        raise CheckpointError("no such checkpoint folder", where=student.base)
    return _fetch(student)


def _fetch(student: StudentConfig) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "README.md", *LEGAL]
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
        raise EnvironmentFault(
            f"neither in {FETCHED}/ nor in the cache, and the Hub cannot be reached", where=student.base
        ) from exc
