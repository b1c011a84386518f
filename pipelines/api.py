"""The Python API, public as `potstill`: a run, from its recipe to scored students, over the stages of the command line.

A `Run` is a recipe and the folder of what comes of it. Its methods call the stages of `pipelines.chain`, so that what
is done already is not done again, whoever did it: a run that was begun here goes on with `potstill run` and the other
way round.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

# `X as X`: potstill hands it on.
from distill.errors import (
    CheckpointError as CheckpointError,
    DataError as DataError,
    EnvironmentFault as EnvironmentFault,
    PotstillError as PotstillError,
    Preempted as Preempted,
    RecipeError as RecipeError,
    TrainingFailure as TrainingFailure,
    UserInputError as UserInputError,
)
from distill.manifest import version_of
from distill.plain_progress import PlainProgress as PlainProgress
from distill.progress import Progress, silent
from distill.recipe import PushConfig, Recipe, load_recipe, parse
from distill.records import ScoreCard, StageManifest
from pipelines import chain
from pipelines.context import Context
from pipelines.draft import check_draft, draft_recipe
from pipelines.recipes import find_recipe

__version__ = version_of("potstill")


class Run:
    """One run: `learn`, then `score`, then `push`. Each does what is missing, and goes on where it was stopped.

    `recipe` is a recipe, its file, or the name of a bundled one. `settings` lay values over its fields, by their dotted
    names: `{"generate.sampling.max_tokens": 512}`. All that comes of it is in `out`/NAME; relative paths start in the
    current folder. Stages report to `progress`, `PlainProgress(sys.stderr)` for one; without it nothing is shown.

    Raises RecipeError. The methods raise the tree of `PotstillError`, with everything that was finished kept.
    """

    def __init__(
        self,
        recipe: Recipe | str | Path,
        *,
        settings: Mapping[str, Any] | None = None,
        out: str | Path = "runs",
        progress: Progress | None = None,
    ) -> None:
        if isinstance(recipe, Recipe):
            if settings:
                raise RecipeError("are for a recipe's file; this recipe is made already", where="settings")
            self.recipe = recipe
        else:
            self.recipe = load_recipe(find_recipe(recipe), _overrides(settings))
        self.folder = Path(out) / self.recipe.name
        self._progress = progress or silent()

    @classmethod
    def draft(
        cls,
        *,
        student: str,
        teacher: str,
        problems: str | Path,
        name: str | None = None,
        grader: str | None = None,
        prompt_field: str | None = None,
        answer_field: str | None = None,
        limit: int | None = None,
        num_samples: int = 1,
        system_prompt: str | None = None,
        settings: Mapping[str, Any] | None = None,
        out: str | Path = "runs",
        progress: Progress | None = None,
    ) -> Self:
        """A run by the recipe that `potstill init` would write of the same answers.

        `student` is a name of `potstill zoo list` or a student's file, `teacher` one of `native:FOLDER`, `vllm:NAME`,
        `openai:MODEL`, `openai:MODEL@URL` and `ollama:NAME`, `problems` a file of questions with answers, or `pico` for
        the bundled ones. Left out, `grader` and fields are read off the file; `limit` is the most questions to use,
        `num_samples` the teacher's answers a question.

        Raises UserInputError for what cannot be used.
        """
        here = Path.cwd()
        draft = draft_recipe(
            problems=str(problems),
            teacher=teacher,
            student=student,
            base_dir=here,
            name=name,
            grader=grader,
            prompt_field=prompt_field,
            answer_field=answer_field,
            limit=limit,
            num_samples=num_samples,
            system_prompt=system_prompt,
        )
        recipe = check_draft(draft.text(), _overrides(settings), where=draft.name, base_dir=here)
        return cls(recipe, out=out, progress=progress)

    @property
    def report(self) -> Path:
        """The page that compares all models; `score` writes it."""
        return self.folder / "report" / "index.html"

    def learn(self) -> dict[str, Path]:
        """Have the teacher write its traces, verify and filter them, train the students: checkpoint folders by name."""
        self._do("generate")
        self._do("distill")
        checkpoints = sorted((self.folder / "distill").glob("*/config.json"))
        return {path.parent.name: path.parent for path in checkpoints}

    def score(self) -> list[ScoreCard]:
        """Score teacher, bases and students on the recipe's suites, pass@1 of each, and write the report."""
        self._do("eval")
        self._do("compare")
        summary = json.loads(self.report.with_name("summary.json").read_text(encoding="utf-8"))
        return [ScoreCard.model_validate(card) for card in summary["models"]]

    def push(self, repo: str | None = None, *, private: bool | None = None, dry_run: bool = False) -> dict[str, Any]:
        """Push the best student, with its card, to the Hugging Face Hub; a dry run only says what would go.

        `repo` and `private` are for the recipe's own. Returns repository, URL, files and their sizes in bytes.
        """
        given = {name: value for name, value in (("repo", repo), ("private", private)) if value is not None}
        push = parse(PushConfig, self.recipe.push.model_dump() | given, where="push")
        self.recipe = self.recipe.model_copy(update={"push": push})
        (manifest,) = self._do("push", dry_run=dry_run)
        return manifest.counts

    def _do(self, command: str, *, dry_run: bool = False) -> list[StageManifest]:
        context = Context(base_dir=Path.cwd(), progress=self._progress, dry_run=dry_run)
        return [stage.run().manifest for stage in chain.prepare(command, self.recipe, self.folder, context)]


def _overrides(settings: Mapping[str, Any] | None) -> list[str]:
    """The same in the command line's form: JSON is YAML."""
    return [f"{name}={json.dumps(value)}" for name, value in (settings or {}).items()]
