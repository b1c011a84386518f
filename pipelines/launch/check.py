"""Checks of a rendered job before it is submitted, and the program that submits it.

A bash script must parse. Slurm's own judge, `sbatch --test-only`, is asked where it is there; else every `#SBATCH` line
must be an option that is known, with a value of its form. A SkyPilot task must have none but the fields of its schema
(SkyPilot 0.14), each of its type.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import yaml

from distill.errors import EnvironmentFault, RecipeError
from pipelines.launch.config import LaunchConfig
from pipelines.launch.render import node_script

_WORD = r"[A-Za-z0-9][A-Za-z0-9_.,:@=+/-]*"
_NUMBER = r"\d+"
SBATCH = {
    "job-name": _WORD, "nodes": _NUMBER, "ntasks-per-node": _NUMBER, "gpus-per-node": _NUMBER,
    "time": r"(\d+-)?\d{1,2}:\d{2}:\d{2}", "partition": _WORD, "account": _WORD, "qos": _WORD, "constraint": _WORD,
    "output": r"[A-Za-z0-9_./%-]+", "open-mode": "append|truncate", "requeue": "", "signal": r"(B:)?[A-Z]+@\d+",
}  # fmt: skip
SKY_TASK: dict[str, type] = {
    "name": str, "workdir": str, "num_nodes": int, "resources": dict, "envs": dict, "secrets": dict,
    "file_mounts": dict, "setup": str, "run": str,
}  # fmt: skip
SKY_RESOURCES: dict[str, type] = {
    "infra": str, "accelerators": str, "instance_type": str, "use_spot": bool, "disk_size": int, "job_recovery": dict,
}  # fmt: skip


def check(config: LaunchConfig, text: str) -> str:
    """Check the job and say what was checked, in a few words. Raises RecipeError for what the launcher would refuse."""
    _check_bash(node_script(config))
    if config.launcher == "skypilot":
        return _check_task(text)
    _check_bash(text)
    if config.launcher != "slurm":
        return "bash -n"
    if (sbatch := shutil.which("sbatch")) is None:
        return _check_headers(text)
    judged = subprocess.run([sbatch, "--test-only"], input=text, capture_output=True, text=True, check=False)
    if judged.returncode:
        raise RecipeError(f"sbatch refuses it: {judged.stderr.strip().splitlines()[-1]}", where="slurm")
    return "bash -n, sbatch --test-only"


def submit(config: LaunchConfig, path: Path) -> list[str]:
    """The command that starts a rendered file. Raises EnvironmentFault where its program is not installed."""
    secrets = [part for name in config.secrets for part in ("--secret", name)]
    command = {
        "torchrun": ["bash", str(path)],
        "slurm": ["sbatch", str(path)],
        "ray": ["bash", str(path)],
        "skypilot": ["sky", "jobs", "launch", "--yes", *secrets, str(path)],
    }[config.launcher]
    needed = "ray" if config.launcher == "ray" else command[0]
    if shutil.which(needed) is None:
        raise EnvironmentFault("is not installed here; --dry-run renders the job without it", where=needed)
    return command


def _check_bash(text: str) -> None:
    judged = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
    if judged.returncode:
        raise RecipeError(f"the script is no bash: {judged.stderr.strip().splitlines()[0]}", where="setup")


def _check_headers(text: str) -> str:
    for line in (line for line in text.splitlines() if line.startswith("#SBATCH")):
        name, _, value = line.removeprefix("#SBATCH --").partition("=")
        if name not in SBATCH or not re.fullmatch(SBATCH[name], value):
            raise RecipeError(f"is no option of sbatch's as it stands: {line}", where="slurm")
    return "bash -n, sbatch's options"


def _check_task(text: str) -> str:
    task = yaml.safe_load(text)
    _check_fields(task, SKY_TASK, "skypilot")
    _check_fields(task["resources"], SKY_RESOURCES, "skypilot.resources")
    return "bash -n, SkyPilot's fields"


def _check_fields(tree: dict[str, Any], known: dict[str, type], where: str) -> None:
    for name, value in tree.items():
        if name not in known or type(value) is not known[name]:
            raise RecipeError(f"SkyPilot knows no such field with {value!r}", where=where, field=name)
