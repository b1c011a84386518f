"""Pushing a checkpoint folder to the Hugging Face Hub, and showing beforehand what would go.

The client is huggingface_hub's own: it finds the token (`HF_TOKEN` or `hf auth login`) and the endpoint
(`HF_ENDPOINT`). Its errors become one line here that never holds a header, and so never the token.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from distill.errors import EnvironmentFault, RecipeError
from distill.recipe import StudentConfig

LEFT_OUT = ("manifest.json",)  # the stage's own
README = "README.md"


@dataclass(frozen=True)
class Pushed:
    repo_id: str
    url: str
    commit: str


def tree(folder: Path, readme: str) -> dict[str, int]:
    """Names and sizes in bytes of what a push of `folder` with that README.md uploads. No network."""
    sizes = {path.name: path.stat().st_size for path in _files(folder)}
    return dict(sorted({**sizes, README: len(readme.encode())}.items()))


def lay_out(folder: Path, readme: str, out_dir: Path) -> None:
    """The folder to upload: the checkpoint's files (hard links where the disk allows) and README.md."""
    shutil.rmtree(out_dir, ignore_errors=True)
    out_dir.mkdir(parents=True)
    for path in _files(folder):
        if path.name == README:
            continue
        try:
            os.link(path, out_dir / path.name)
        except OSError:
            shutil.copy2(path, out_dir / path.name)
    (out_dir / README).write_text(readme, encoding="utf-8")


def check_repo_name(repo: str, student: StudentConfig) -> None:
    """Raise RecipeError for a name that the Hub does not take, or that the base's licence does not allow."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as exc:
        raise RecipeError(f"not a repository name: {exc}", where="recipe", field="push.repo") from exc
    if student.licence.startswith("llama") and not repo.rpartition("/")[2].lower().startswith("llama"):
        raise RecipeError(
            f"the licence {student.licence} asks for a name that begins with Llama, got {repo!r}",
            where="recipe",
            field="push.repo",
        )


def push_folder(folder: Path, repo: str, *, private: bool, message: str) -> Pushed:
    """Create the repository if it is not there, and upload the folder's files in one commit.

    `repo` without a namespace goes to the token's owner. A repository that is there already keeps its visibility.
    Raises EnvironmentFault for a refusal (401, 403), any other answer that is an error, and a Hub that is not reached.
    """
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    api = HfApi()
    try:
        created = api.create_repo(repo, private=private, exist_ok=True)
        done = api.upload_folder(repo_id=created.repo_id, folder_path=folder, commit_message=message)
    except HfHubHTTPError as exc:
        status = exc.response.status_code if exc.response is not None else 0
        raise EnvironmentFault(_refusal(status, repo), where=api.endpoint) from exc
    except (httpx.HTTPError, OSError) as exc:
        raise EnvironmentFault(f"cannot be reached ({type(exc).__name__})", where=api.endpoint) from exc
    return Pushed(repo_id=created.repo_id, url=str(created), commit=done.oid)


def _refusal(status: int, repo: str) -> str:
    if status == 401:
        return f"no valid token to push {repo!r} with (401); set HF_TOKEN or run `hf auth login`"
    if status == 403:
        return f"the token may not write {repo!r} (403); it needs the write permission"
    return f"refused to take {repo!r} ({status or 'no answer'}); try again later"


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file() and path.name not in LEFT_OUT)
