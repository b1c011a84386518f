"""The nodes that a job's recipe speaks of, where the recipe can be read before the job is submitted."""

from __future__ import annotations

from pathlib import Path

from distill.errors import RecipeError
from distill.recipe import SERVER_KEY_ENV, NativeTeacher, TeacherConfig, VllmTeacher, load_recipe, load_settings
from pipelines.launch.config import LaunchConfig
from pipelines.serving import LOOPBACK


def check_recipe(config: LaunchConfig) -> str | None:
    """The file that was checked; None where it is on the nodes alone.

    Raises RecipeError for a recipe that cannot be loaded with the job's overrides, and for one whose nodes, ranks or
    keys are not the job's.
    """
    if config.job == "train":
        return _check_student(config)
    assert config.recipe is not None
    candidates = (Path(config.workdir) / config.recipe, Path(config.recipe))
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        return None
    if config.job == "pretrain":
        from teacher.train.config import PretrainConfig  # brings torch in

        layout = load_settings(PretrainConfig, path, config.overrides).layout
        if layout.num_ranks != (num_processes := config.nodes * config.processes):
            raise RecipeError(
                f"is for {layout.num_ranks} ranks, the job has {num_processes}", where=path, field="layout"
            )
    else:
        head = ["teacher.head_address=HEAD"] if config.nodes > 1 else []
        _check_teacher(load_recipe(path, [*config.overrides, *head]).teacher, config, path)
    return str(path)


def _check_teacher(teacher: TeacherConfig, config: LaunchConfig, path: Path) -> None:
    num_nodes = teacher.num_nodes if isinstance(teacher, (NativeTeacher, VllmTeacher)) else 1
    if num_nodes != config.nodes:
        message = f"the recipe's teacher is for {num_nodes}, the job has {config.nodes}"
        raise RecipeError(message, where=path, field="teacher.num_nodes")
    if isinstance(teacher, NativeTeacher):
        per_node = teacher.num_ranks // num_nodes
        if 0 < config.gpus_per_node < per_node:
            message = f"{per_node} ranks of a node need a GPU each, the job has {config.gpus_per_node}"
            raise RecipeError(message, where=path, field="teacher.num_ranks")
        needed, why = SERVER_KEY_ENV, "nodes know each other by it" if num_nodes > 1 else ""
    else:
        needed, why = getattr(teacher, "api_key_env", ""), ""
    if config.job == "serve" and config.host not in LOOPBACK:
        why = f"{config.host} can be reached from outside"
    if why and needed not in config.secrets:
        raise RecipeError(f"{needed} must be among them: {why}", field="secrets")


def _check_student(config: LaunchConfig) -> str:
    from students.zoo import find_student, sft_overrides

    assert config.student is not None
    return find_student(config.student, sft_overrides(config.overrides)).name
