"""Pushing a folder to the Hugging Face Hub, as a model or as a data set.

The client is huggingface_hub's own: it finds the token (`HF_TOKEN` or `hf auth login`) and the endpoint
(`HF_ENDPOINT`). Its errors become one line here that never holds a header, and so never the token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from distill.errors import EnvironmentFault, RecipeError


@dataclass(frozen=True)
class PushResult:
    repo_id: str
    url: str
    commit: str


def check_name(repo: str, *, field: str) -> None:
    """Raise RecipeError for a name that the Hub does not take; `field` is where the recipe says it."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as exc:
        raise RecipeError(f"not a repository name: {exc}", where="recipe", field=field) from exc


def require_token() -> None:
    """Raise EnvironmentFault where there is no token to push with; whether it is a good one, only the Hub can say."""
    from huggingface_hub import get_token

    if get_token() is None:
        raise EnvironmentFault("no token to push with; set HF_TOKEN or run `hf auth login`", where="Hugging Face Hub")


def push_folder(
    folder: Path,
    repo: str,
    *,
    repo_type: Literal["model", "dataset"],
    private: bool,
    message: str,
    replace: Sequence[str] = (),
) -> PushResult:
    """Create the repository if it is not there, and upload the folder's files in one commit.

    `repo` without a namespace goes to the token's owner. A repository that is there already keeps its visibility.
    Files of the repository that match a pattern of `replace` and are not in the folder are deleted in that commit.
    Raises EnvironmentFault for a refusal (401, 403), any other answer that is an error, and a Hub that is not reached.
    """
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    api = HfApi()
    try:
        created = api.create_repo(repo, repo_type=repo_type, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=created.repo_id,
            repo_type=repo_type,
            folder_path=folder,
            commit_message=message,
            delete_patterns=list(replace) or None,
        )
    except HfHubHTTPError as exc:
        status = exc.response.status_code if exc.response is not None else 0
        # `from None`: the cause holds what the Hub, or a proxy before it, said, and that may be the token.
        raise EnvironmentFault(_refusal(status, repo), where=api.endpoint) from None
    except (httpx.HTTPError, OSError) as exc:
        raise EnvironmentFault(f"cannot be reached ({type(exc).__name__})", where=api.endpoint) from None
    return PushResult(repo_id=created.repo_id, url=str(created), commit=done.oid)


def _refusal(status: int, repo: str) -> str:
    if status == 401:
        return f"no valid token to push {repo!r} with (401); set HF_TOKEN or run `hf auth login`"
    if status == 403:
        return f"the token may not write {repo!r} (403); it needs the write permission"
    return f"refused to take {repo!r} ({status or 'no answer'}); try again later"
