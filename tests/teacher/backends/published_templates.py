"""The chat templates of published models, from the copies that TRL keeps."""

from __future__ import annotations

from pathlib import Path

import trl

FOLDER = Path(trl.__file__).with_name("chat_templates")


def template(name: str) -> str:
    """The text of `qwen2_5`, `llama3_1`, `deepseek_r1_distill`, ..."""
    return (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
