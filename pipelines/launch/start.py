"""A job file to a job that runs, or, in a dry run, to what would have started it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path

from distill.manifest import write_atomically
from distill.recipe import load_settings
from pipelines.launch.check import check, submit
from pipelines.launch.config import LaunchConfig
from pipelines.launch.recipes import check_recipe
from pipelines.launch.render import render


def start(
    job: Path,
    overrides: Iterable[str],
    *,
    out: Path | None,
    dry_run: bool,
    announce: Callable[..., object],
    show: Callable[[str], object],
) -> int:
    """The exit code of what started it. A dry run without `out` shows what was rendered, and writes nothing.

    Raises RecipeError for what is wrong with the job or its recipe, EnvironmentFault where its launcher is missing.
    """
    config = load_settings(LaunchConfig, job, overrides)
    text = render(config)
    recipe = check_recipe(config)
    checked = ", ".join(filter(None, (check(config, text), recipe)))
    if dry_run and out is None:
        show(text)
        announce(f"potstill: {config.name} for {config.launcher}: {checked}; nothing is started", err=True)
        return 0
    path = out or Path(f"{config.name}.{'yaml' if config.launcher == 'skypilot' else 'sh'}")
    command = [] if dry_run else submit(config, path)
    write_atomically(path, text)
    announce(f"{path}: {checked}")
    return subprocess.run(command, check=False).returncode if command else 0
