"""A model's files from its repository on the Hub, at the commit that the catalogue names."""

from __future__ import annotations

from pathlib import Path

from distill.errors import EnvironmentFault
from distill.manifest import hash_file
from distill.progress import Progress
from pipelines.models.catalogue import PublishedModel
from pipelines.models.packages import growth_shown

PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.txt", "README.md", "LICENSE*", "NOTICE*"]
PATIENCE_S = 10.0


class HubOutOfReachError(EnvironmentFault):
    """The Hub does not answer, or not for this commit: another source may have the model."""


def fetch_from_hub(model: PublishedModel, work: Path, progress: Progress) -> Path:
    """A folder in `work` with the repository's files, checked by the hashes that the commit itself names.

    Raises HubOutOfReachError before anything is downloaded, EnvironmentFault for a download that breaks off (the next
    one goes on from there) and for a file with another hash.
    """
    import httpx
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    where = f"{model.repository}@{model.revision}"
    try:
        info = HfApi().model_info(model.repository, revision=model.revision, timeout=PATIENCE_S, files_metadata=True)
    except (HfHubHTTPError, httpx.HTTPError, OSError) as exc:
        raise HubOutOfReachError(f"the Hub cannot be reached or refuses ({type(exc).__name__})", where=where) from exc
    folder = work / "hub"
    folder.mkdir(exist_ok=True)
    try:
        with progress.task("download", model.size_bytes / 1e6, unit="MB") as task, growth_shown(folder, task):
            snapshot_download(model.repository, revision=model.revision, local_dir=folder, allow_patterns=PATTERNS)
    except (HfHubHTTPError, httpx.HTTPError, OSError) as exc:
        message = f"the download broke off ({exc}); the same command goes on from here"
        raise EnvironmentFault(message, where=where) from exc
    for file in info.siblings or ():
        path = folder / file.rfilename
        if file.lfs is not None and path.is_file() and hash_file(path) != file.lfs.sha256:
            path.unlink()
            raise EnvironmentFault(f"has another SHA-256 than {file.lfs.sha256}; fetch it again", where=path)
    return folder
