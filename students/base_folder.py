"""The place of a student's base: a folder or GGUF file here, bundled with these packages or fetched, or the Hub.

Apart from `students.bases` so that looking a folder up costs no import of torch.
"""

from __future__ import annotations

from pathlib import Path

from distill import bundled
from distill.errors import CheckpointError, EnvironmentFault
from distill.gguf import checkpoint_folder, is_gguf
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
    """The base's folder or GGUF file on this machine: a path, or where a repository of that name was fetched to."""
    path = locate(base)
    if path.is_dir() or is_gguf(path):
        return path
    fetched = locate(f"{FETCHED}/{base.rpartition('/')[2]}")
    return fetched if is_repository(base) and (fetched / "config.json").is_file() else None


def resolve_base(student: StudentConfig) -> Path:
    """The base's checkpoint folder; a GGUF file is converted first, a repository that is not here fetched from the Hub.

    Raises CheckpointError where neither a folder nor a repository has that name and for a GGUF file that cannot be
    read, EnvironmentFault where the Hub cannot be reached or refuses.
    """
    local = local_base(student.base)
    if local is not None:
        return checkpoint_folder(local)
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
