"""Files of a checkpoint folder that go to the Hub, and the name they go under; `distill.publish.hub` sends it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from distill.errors import RecipeError
from distill.publish.hub import check_name
from distill.publish.origin import published_name
from distill.recipe import StudentConfig, parse
from students.base_folder import locate

LEFT_OUT = ("manifest.json",)  # the stage's own
README = "README.md"
LOG = "train_log.json"


def tree(folder: Path, readme: str) -> dict[str, int]:
    """Names and sizes in bytes of what a push of `folder` with that README.md uploads. No network."""
    sizes = {path.name: path.stat().st_size for path in _files(folder)}
    if (folder / LOG).is_file():
        sizes[LOG] = len(_log_without_paths(folder / LOG))
    return dict(sorted({**sizes, README: len(readme.encode())}.items()))


def lay_out(folder: Path, readme: str, out_dir: Path) -> None:
    """The folder to upload: the checkpoint's files (hard links where the disk allows), with a training log in which no
    path of this machine stands, and README.md."""
    shutil.rmtree(out_dir, ignore_errors=True)
    out_dir.mkdir(parents=True)
    for path in _files(folder):
        if path.name in (README, LOG):
            continue
        try:
            os.link(path, out_dir / path.name)
        except OSError:
            shutil.copy2(path, out_dir / path.name)
    if (folder / LOG).is_file():
        (out_dir / LOG).write_bytes(_log_without_paths(folder / LOG))
    (out_dir / README).write_text(readme, encoding="utf-8")


def check_repo_name(repo: str, student: StudentConfig) -> None:
    """Raise RecipeError for a name that the Hub does not take, or that the base's licence does not allow."""
    check_name(repo, field="push.repo")
    if student.licence.startswith("llama") and not repo.rpartition("/")[2].lower().startswith("llama"):
        raise RecipeError(
            f"the licence {student.licence} asks for a name that begins with Llama, got {repo!r}",
            where="recipe",
            field="push.repo",
        )


def _log_without_paths(path: Path) -> bytes:
    """The training log with the base's published name, and of a template of one's own the name alone."""
    log = json.loads(path.read_text(encoding="utf-8"))
    student = parse(StudentConfig, log["student"], where=path)
    template = None if student.chat_template is None else Path(student.chat_template).name
    names = {"base": published_name(student.base, locate(student.base)).replace("`", ""), "chat_template": template}
    log["student"] |= names
    return f"{json.dumps(log, indent=1)}\n".encode()


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file() and path.name not in LEFT_OUT)
