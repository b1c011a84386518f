"""lm-eval's own tasks, found by name and loaded as they are; no code comes from the Hub with them.

Where a task's data set has a folder in `bench_data`, its splits are read from there, else from the Hub:

    bench_data/lm_eval/<repository>/[<configuration>/]<split>.jsonl          or .parquet

so `bench_data/lm_eval/allenai/ai2_arc/ARC-Challenge/test.jsonl` is that of `arc_challenge`. A task is refused that runs
programs which a model wrote (lm-eval has no sandbox), that asks for pictures or sound, whose data set is a program, or
whose metric is one of the Hub's.

lm-eval takes some ten seconds to find out which tasks it has (12,000 files): the answer is kept in the cache folder.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from distill.errors import DataError, EnvironmentFault, PotstillError, RecipeError, nearest
from distill.hash_cache import cache_folder
from distill.manifest import write_atomically
from distill.problems.hub import quiet
from distill.progress import Progress, silent
from distill.recipe import LM_EVAL
from distill.records import content_id

FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
NEWER_THAN_SCRIPTS = "Dataset scripts are no longer supported"  # how `datasets` refuses one

Index = Mapping[str, Mapping[str, Any]]


def version() -> str:
    return importlib.metadata.version("lm-eval")


def check_tasks(names: Iterable[str], progress: Progress | None = None) -> None:
    """Raise RecipeError for a task that lm-eval does not have, or that is refused."""
    wanted = list(names)
    index = task_index(progress) if wanted else {}
    for name in wanted:
        if name not in index:
            message = f"lm-eval {version()} has no task {name!r}; {nearest(name, index)}".partition("; allowed:")[0]
            raise RecipeError(message, where="recipe", field="eval.suites")
        if unsafe := next((leaf for leaf in _leaves(name, index) if index[leaf]["unsafe"]), None):
            message = f"lm-eval's {unsafe!r} runs programs that the model wrote, without a sandbox; use a suite of ours"
            raise RecipeError(message, where="recipe", field="eval.suites")


def task_index(progress: Progress | None = None) -> Index:
    """Every name that lm-eval knows: its kind (a task, a group, a tag), its file and its members."""
    spec = importlib.util.find_spec("lm_eval")
    assert spec is not None
    folder = Path(str(spec.origin)).parent / "tasks"
    name = content_id([1, version(), str(folder), folder.stat().st_mtime_ns])
    kept = cache_folder() / "lm-eval-tasks" / f"{name}.json"
    with suppress(OSError, ValueError):
        index: Index = json.loads(kept.read_text(encoding="utf-8"))
        return index
    with (progress or silent()).task("find lm-eval's tasks", None):
        found = _found(folder)
    with suppress(OSError, EnvironmentFault):  # a cache that cannot be written costs time alone
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(kept, json.dumps(found))
    return found


def _found(folder: Path) -> Index:
    from lm_eval.tasks._index import TaskIndex

    return {
        name: {
            "kind": entry.kind.name,
            "file": None if entry.yaml_path is None else str(entry.yaml_path),
            "tags": sorted(entry.tags),
            "members": _members(entry.cfg or {}),
            "unsafe": bool((entry.cfg or {}).get("unsafe_code")),
            "data": [(entry.cfg or {}).get(field) for field in ("dataset_path", "dataset_name")],
        }
        for name, entry in TaskIndex.build([folder]).items()
    }


def _members(config: Mapping[str, Any]) -> list[str]:
    """Names in a group's `task` list, those of the groups that stand in it too."""
    members = config.get("task")
    names: list[str] = []
    for member in members if isinstance(members, list) else []:
        if isinstance(member, str):
            names.append(member)
        elif isinstance(member.get("task"), str):
            names.append(member["task"])
        else:
            names += [*_members(member), *([member["group"]] if "group" in member else [])]
    return names


def _leaves(name: str, index: Index, seen: frozenset[str] = frozenset()) -> Iterator[str]:
    """The tasks that a name stands for."""
    if name not in index or name in seen:
        return
    entry = index[name]
    members = {"GROUP": entry["members"], "TAG": entry["tags"]}.get(entry["kind"])
    if members is None:
        yield name
        return
    for member in members:
        yield from _leaves(member, index, seen | {name})


def data_files(name: str, bench_data: Path | None, progress: Progress | None = None) -> dict[str, Path]:
    """Folders of `bench_data` that a task reads its data sets from, by their names in a stage's inputs."""
    if bench_data is None:
        return {}
    index = task_index(progress)
    folders = [_data_folder(bench_data, *index[leaf]["data"]) for leaf in _leaves(name, index)]
    return {
        f"data:{LM_EVAL}{folder.relative_to(bench_data / 'lm_eval')}": folder
        for folder in folders
        if folder is not None
    }


def load_tasks(name: str, bench_data: Path | None, progress: Progress | None = None) -> Mapping[str, Any]:
    """lm-eval's task objects, as `TaskManager.load` gives them. Raises DataError, RecipeError, EnvironmentFault."""
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._index import Entry, Kind

    check_tasks([name], progress)
    manager = TaskManager(include_defaults=False)
    # The two that it would make itself, in ten seconds: what it knows, and what reads a definition.
    manager._index = {
        known: Entry(
            name=known,
            kind=Kind[entry["kind"]],
            yaml_path=None if entry["file"] is None else Path(entry["file"]),
            tags=set(entry["tags"]),
        )
        for known, entry in task_index().items()
    }
    manager._factory = _factory(bench_data)
    with quiet(), _nothing_of_the_hub_runs(name):
        loaded: Mapping[str, Any] = manager.load([name])
    for task in loaded["tasks"].values():
        if getattr(task, "MULTIMODAL", False):
            raise RecipeError(f"lm-eval's {name!r} asks for more than text", where="recipe", field="eval.suites")
    return loaded


def _factory(bench_data: Path | None) -> Any:
    from lm_eval.tasks._factory import TaskFactory

    class LocalFactory(TaskFactory):
        def _load_full_config(self, entry: Any, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
            return _with_local_data(super()._load_full_config(entry, overrides), bench_data)

    return LocalFactory()


def _data_folder(bench_data: Path, repository: Any, configuration: Any) -> Path | None:
    """The folder of a data set; None where it has none there."""
    if not isinstance(repository, str) or Path(repository).is_absolute() or ".." in repository:
        return None
    folder = bench_data / "lm_eval" / repository / str(configuration or "")
    return folder if folder.is_dir() else None


def _with_local_data(config: dict[str, Any], bench_data: Path | None) -> dict[str, Any]:
    given = {name: value for name, value in (config.get("dataset_kwargs") or {}).items() if name != "trust_remote_code"}
    config = {**config, "dataset_kwargs": given} if "dataset_kwargs" in config else config
    folder = (
        None if bench_data is None else _data_folder(bench_data, config.get("dataset_path"), config.get("dataset_name"))
    )
    if folder is None:
        return config
    files = {path.stem: path for path in sorted(folder.iterdir()) if path.suffix in FORMATS}
    formats = {FORMATS[path.suffix] for path in files.values()}
    if len(formats) != 1:
        raise DataError(f"must hold its splits as {', '.join(FORMATS)}, of one format", where=folder)
    named = {config.get(f"{use}_split") for use in ("training", "validation", "test", "fewshot")} - {None}
    if missing := sorted(split for split in named if split.partition("[")[0] not in files):
        raise DataError(f"has no file of the split {missing[0]!r}, which {config['task']} asks for", where=folder)
    data_files = {split: str(path) for split, path in files.items()}
    return {**config, "dataset_path": formats.pop(), "dataset_name": None, "dataset_kwargs": {"data_files": data_files}}


@contextmanager
def _nothing_of_the_hub_runs(task: str) -> Iterator[None]:
    """Loading a task asks the Hub for data alone. `evaluate.load` would fetch a program and run it: it is shut."""
    import evaluate

    wanted: list[str] = []

    def shut(metric: str, *_: Any, **__: Any) -> None:
        wanted.append(metric)
        raise ImportError(f"the metric {metric!r} is a program of the Hub")

    load, evaluate.load = evaluate.load, shut
    try:
        yield
    except Exception as exc:
        if isinstance(exc, PotstillError):
            raise
        raise _fault(task, exc, wanted) from exc
    finally:
        evaluate.load = load


def _fault(task: str, exc: Exception, metrics: Sequence[str]) -> PotstillError:
    """What keeps a task from being loaded, in one line; `metrics` are those that it wanted of the Hub."""
    said = str(exc).strip().partition("\n")[0]
    if metrics:
        message = f"lm-eval's {task!r} needs the metric {metrics[0]!r} of the Hub, a program, which potstill never runs"
        return RecipeError(message, where="recipe", field="eval.suites")
    if NEWER_THAN_SCRIPTS in str(exc):
        message = f"the data set of lm-eval's {task!r} is a program of the Hub, which potstill never runs ({said})"
        return RecipeError(message, where="recipe", field="eval.suites")
    message = f"cannot be loaded ({type(exc).__name__}: {said})"
    if not isinstance(exc, ImportError):
        message += "; bench_data/lm_eval may have its data set instead of the Hub"
    return EnvironmentFault(message, where=f"{LM_EVAL}{task}")
