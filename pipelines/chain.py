"""Commands: the stages that each runs, in which order, and what must hold before the first of them writes anything.

    generate -> curate -> distill -> eval -> compare          push and push-traces stand beside it

A stage that is up to date does nothing (see `distill.manifest`), so that running a command again costs a look at the
hashes. A command checks first everything that can be checked without work: the recipe's files, the models' weights, and
that earlier stages are complete and were run with this very recipe; it names the command that makes what is missing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from distill.errors import DataError
from distill.manifest import MANIFEST, hash_file, read_manifest, write_atomically
from distill.recipe import Recipe
from distill.records import StageManifest
from pipelines.checks import check_recipe, check_weights
from pipelines.context import Context
from pipelines.run_folder import check_run_folder, held

# The function behind each stage, `(recipe, run_dir, context) -> StageManifest`. Its module, named from this package on,
# is imported when it runs: some need seconds for that.
STAGES = {
    "generate": ".stages.generate:generate",
    "curate": ".stages.curate:curate",
    "distill": ".stages.distill:distill",
    "eval": ".stages.eval:evaluate",
    "compare": ".stages.compare:compare",
    "push": ".stages.push:push",
    "push-traces": ".stages.push_traces:push_traces",
}
COMMANDS: dict[str, tuple[str, ...]] = {
    "generate": ("generate",),
    "distill": ("curate", "distill"),
    "eval": ("eval",),
    "compare": ("compare",),
    "push": ("push",),
    "push-traces": ("push-traces",),
    "run": ("generate", "curate", "distill", "eval", "compare"),
}
# Stages that must be complete before one.
NEEDS: dict[str, tuple[str, ...]] = {
    "generate": (),
    "curate": ("generate",),
    "distill": ("curate",),
    "eval": ("distill",),
    "compare": ("eval",),
    "push": ("distill", "eval"),
    "push-traces": ("generate", "curate"),
}
FOLDERS = {"compare": "report"}


@dataclass(frozen=True)
class StageOutcome:
    """The end of one stage; `ran` is False where it was up to date."""

    stage: str
    manifest: StageManifest
    ran: bool

    def line(self) -> str:
        """`generate   done in 61.2 s: problems 4096, traces 4096`"""
        if not self.ran:
            return f"{self.stage:<9} up to date"
        plain = ((name, value) for name, value in self.manifest.counts.items() if type(value) in (int, float))
        counts = [f"{name} {value}" for name, value in plain]
        return f"{self.stage:<9} done in {self.manifest.seconds:.1f} s" + (f": {', '.join(counts)}" if counts else "")


@dataclass(frozen=True)
class Stage:
    """One stage of one run, ready to go; `function` is `module:name`, as in `STAGES`."""

    name: str
    function: str
    recipe: Recipe
    run_dir: Path
    context: Context

    def run(self) -> StageOutcome:
        module, _, name = self.function.partition(":")
        function: Callable[[Recipe, Path, Context], StageManifest] = getattr(import_module(module, __package__), name)
        folder = folder_of(self.name, self.run_dir)
        before = _stamp(folder)
        with self.context.progress.task(self.name, None):  # whatever a stage does, it does not do it in silence
            manifest = function(self.recipe, self.run_dir, self.context)
        return StageOutcome(self.name, manifest, ran=before is None or before != _stamp(folder))


def prepare(command: str, recipe: Recipe, run_dir: Path, context: Context) -> Iterator[Stage]:
    """The stages of a command, after every check that can be made beforehand; nothing is written until one is taken.

    Raises UserInputError for what the user gave, EnvironmentFault for what the machine lacks.
    """
    names = COMMANDS[command]
    check_recipe(recipe, names, base_dir=context.base_dir, progress=context.progress)
    if not context.dry_run:
        _check_pushes(names, run_dir)
        check_run_folder(run_dir, [folder_of(name, run_dir) for name in names])
    for name in names:
        for needed in NEEDS[name]:
            if needed not in names:
                require_complete(needed, recipe, run_dir)
    with context.progress.task("check the weights", None):
        check_weights(recipe, names, known=_known_hashes(run_dir), base_dir=context.base_dir)
    stages = [Stage(name, STAGES[name], recipe, run_dir, context) for name in names]
    if context.dry_run and command == "push":
        return iter(stages)  # it writes nothing
    return _with_recipe(stages, recipe, run_dir)


def folder_of(stage: str, run_dir: Path) -> Path:
    return run_dir / FOLDERS.get(stage, stage)


def require_complete(stage: str, recipe: Recipe, run_dir: Path) -> None:
    """Raise DataError unless the stage is complete, was run with this recipe, and its files are as it left them."""
    folder = folder_of(stage, run_dir)
    command = next(name for name, stages in COMMANDS.items() if stage in stages)
    remedy = f"run `potstill {command}` with this recipe first"
    manifest = read_manifest(folder)
    if manifest is None:
        raise DataError(f"not there yet; {remedy}", where=folder / MANIFEST)
    changed = _first_difference(manifest.config, recipe.model_dump(mode="json"))
    if changed is not None:
        raise DataError(
            f"made with another setting than the recipe's; {remedy}", where=folder / MANIFEST, field=changed
        )
    if stage == "eval":
        _require_graders(manifest, recipe, folder / MANIFEST)
    for name, digest in manifest.outputs.items():
        path = folder / name
        if not path.exists() or hash_file(path) != digest:
            raise DataError(f"not as the stage `{stage}` left it; {remedy}", where=path)


def _require_graders(manifest: StageManifest, recipe: Recipe, where: Path) -> None:
    """Raise DataError for scores that other versions of the graders gave: nothing is made of them any more."""
    from distill.verify.kept import grading_settings

    then = manifest.config.get("verify", {}).get("grader_versions")
    now = grading_settings(recipe.verify.model_copy(update={"judge": None}))["grader_versions"]
    if then is not None and then != now:
        name = next(name for name in {**then, **now} if then.get(name) != now.get(name))
        message = f"graded by {name} {then.get(name)}, here is {now.get(name)}; run `potstill regrade` first"
        raise DataError(message, where=where, field="verify.grader_versions")


def _first_difference(config: Any, recipe: Any, at: str = "") -> str | None:
    """The first field of a manifest's config that the recipe says otherwise, among those that the recipe has."""
    if isinstance(config, dict) and isinstance(recipe, dict):
        for key in config.keys() & recipe.keys():
            found = _first_difference(config[key], recipe[key], f"{at}.{key}" if at else key)
            if found is not None:
                return found
        return None
    return None if json.dumps(config, sort_keys=True) == json.dumps(recipe, sort_keys=True) else at


def _with_recipe(stages: list[Stage], recipe: Recipe, run_dir: Path) -> Iterator[Stage]:
    """Keep the resolved recipe beside what it made, and the folder to this command, as long as stages are taken.

    An unchanged recipe is not written again.
    """
    path = run_dir / "recipe.yaml"
    text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    with held(run_dir):
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            write_atomically(path, text)
        yield from stages


def _check_pushes(names: Collection[str], run_dir: Path) -> None:
    """A push that is done needs no token; one that is not says so before a file is read for it."""
    pushes = {"push", "push-traces"} & set(names)
    if not all(read_manifest(folder_of(name, run_dir)) for name in pushes):
        from distill.publish.hub import require_token

        require_token()


def _known_hashes(run_dir: Path) -> set[str]:
    """Hashes of all that complete stages of this run have read: no need to look into it again."""
    manifests = (read_manifest(path.parent) for path in run_dir.glob(f"**/{MANIFEST}"))
    return {digest for manifest in manifests if manifest for digest in manifest.inputs.values()}


def _stamp(folder: Path) -> tuple[int, int] | None:
    try:
        stat = (folder / MANIFEST).stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_mtime_ns
