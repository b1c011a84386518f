"""A base's licence: what its own card says of it, and the texts that it asks to be handed on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import yaml

from distill.findings import Finding
from distill.licences import of_card
from distill.recipe import StudentConfig
from students.base_folder import LEGAL

_CARD = "README.md"
_MAX_FRONT_MATTER = 64 * 2**10  # characters; the Hub's own limit is below it
# Meta's community licences (1.b.iii) ask for this line in a file of that name.
_LLAMA_NOTICE = (
    "Llama {version} is licensed under the Llama {version} Community License, "
    "Copyright © Meta Platforms, Inc. All Rights Reserved.\n"
)


def check_licence(student: StudentConfig, folder: Path) -> Finding:
    """Compare the student's licence with the one in the front matter of the base's card, where that names one."""
    stated = published_licence(folder)
    if stated is not None and stated != student.licence:
        text = f"the student says {student.licence}, the base's {_CARD} says {stated}"
        return Finding("licence", "error", text)
    return Finding("licence", "ok", student.licence + ("" if stated else f"; no {_CARD} beside the base says so"))


def published_licence(folder: Path) -> str | None:
    """The licence of the base's card as a student file has it; None where there is no card, or none that says one."""
    front = _front_matter(folder / _CARD)
    return of_card(front.get("license"), front.get("license_name"))


def copy_legal_texts(student: StudentConfig, folder: Path, out_dir: Path) -> None:
    """Put the base's legal texts beside the student's weights, and for a Llama the notice that its licence asks for."""
    for pattern in LEGAL:
        for path in filter(Path.is_file, folder.glob(pattern)):
            shutil.copyfile(path, out_dir / path.name)
    if student.licence.startswith("llama") and not any(out_dir.glob("NOTICE*")):
        notice = _LLAMA_NOTICE.format(version=student.licence.removeprefix("llama"))
        (out_dir / "NOTICE").write_text(notice, encoding="utf-8")


def _front_matter(card: Path) -> dict[str, Any]:
    """YAML between the first two `---` lines. Empty where there is none: a card that cannot be read states nothing."""
    try:
        with card.open(encoding="utf-8", errors="replace") as file:
            text = file.read(_MAX_FRONT_MATTER)
    except OSError:
        return {}
    if not text.startswith("---\n"):
        return {}
    try:
        front = yaml.safe_load(text[4:].partition("\n---")[0])
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return front if isinstance(front, dict) else {}
