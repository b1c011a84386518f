"""The words in which a teacher is asked for questions, and for a second try: `prompts.yaml`."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from distill.recipe import Mode
from distill.records import Problem, content_id

PROMPTS: dict[str, str] = yaml.safe_load(Path(__file__).with_name("prompts.yaml").read_text(encoding="utf-8"))
PROMPTS_ID = content_id(PROMPTS)
SLOT = re.compile(r"\{(question|answer)\}")


def writing_problem(mode: Mode, seed: Problem) -> Problem:
    """What asks for a question in `mode` after the seed: a text to write, so that no instruction stands around it."""
    return Problem(prompt=_filled(mode, seed), answer=None, grader="none", source=seed.source)


def hinted(problem: Problem) -> Problem:
    """The problem, asked with its reference as a hint. Needs one."""
    assert problem.answer is not None
    return Problem(**problem.model_dump() | {"prompt": _filled("hint", problem)})  # a copy would keep the id


def _filled(name: str, problem: Problem) -> str:
    """In one pass: a question may spell out a slot."""
    texts = {"question": problem.prompt.strip(), "answer": problem.answer or ""}
    return SLOT.sub(lambda slot: texts[slot[1]], PROMPTS[name])
