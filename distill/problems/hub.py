"""Questions from a data set of the Hugging Face Hub (or a folder in its layout), read with `datasets`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from logging import CRITICAL
from pathlib import Path
from typing import Any

from distill.errors import DataError, EnvironmentFault, RecipeError
from distill.problems.rows import problem_of
from distill.recipe import DatasetSource
from distill.records import Problem

ANSWER_TIMEOUT_S = 10.0


def read(source: DatasetSource) -> Iterator[Problem]:
    """Yield the data set's problems.

    Raises RecipeError (no such data set, configuration or split), DataError (a row without the named fields),
    EnvironmentFault (the Hub cannot be reached, the disk is full).
    """
    number = 0
    for number, row in enumerate(load_rows(source), start=1):
        yield problem_of(row, source, name=source.repo, where=f"{source.repo}[{source.split}]: row {number}")
        if number == source.limit:
            return
    if number == 0:
        raise DataError("holds no questions", where=source.repo, field=source.split)


def load_rows(source: DatasetSource) -> Any:
    """The rows of the source's split, downloaded where they are not in the cache. Raises what `read` raises."""

    def load(library: Any) -> Any:
        return library.load_dataset(source.repo, source.config, revision=source.revision, split=source.split)

    return _ask(source, load)


def check(source: DatasetSource) -> None:
    """Raise what `load_rows` would raise for a data set, configuration or split that is not there; no rows are fetched.

    Where the Hub cannot be reached, a data set that is in the cache passes.
    """

    def look(library: Any) -> None:
        builder = library.load_dataset_builder(source.repo, source.config, revision=source.revision)
        files = builder.config.data_files  # none in the cache
        if files is not None and source.split not in files:
            raise ValueError(f"Unknown split {source.split!r}. Should be one of {sorted(files)}.")

    _ask(source, look)


def _ask(source: DatasetSource, question: Callable[[Any], Any]) -> Any:
    """What `question` finds out from the library `datasets`, whose faults become ours."""
    import datasets
    import httpx
    from datasets.exceptions import DatasetGenerationError, DefunctDatasetError, FileNotFoundDatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    with quiet():
        try:
            _require_answer(source)
            return question(datasets)
        except (FileNotFoundDatasetsError, DefunctDatasetError, datasets.builder.InvalidConfigName) as exc:
            raise RecipeError(f"no such data set ({exc})", where=source.repo, field="problems.repo") from exc
        except (ConnectionError, FileNotFoundError, httpx.TransportError, HfHubHTTPError) as exc:
            raise EnvironmentFault(f"cannot be fetched ({exc})", where=source.repo) from exc
        except DatasetGenerationError as exc:
            kind = EnvironmentFault if isinstance(exc.__cause__, OSError) else DataError
            raise kind(f"cannot be read ({exc.__cause__ or exc})", where=source.repo) from exc
        except RuntimeError as exc:  # of a data set that is a Python script
            raise RecipeError(
                f"names code, which is not run ({exc})", where=source.repo, field="problems.repo"
            ) from exc
        except ValueError as exc:  # what `datasets` raises for an unknown configuration or split
            raise RecipeError(str(exc), where=source.repo, field="problems.split") from exc


def _require_answer(source: DatasetSource) -> None:
    """Raise ConnectionError at once where the Hub does not answer and the cache does not have it.

    The library itself tries for half a minute.
    """
    import httpx
    from datasets.load import CachedDatasetModuleFactory
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if Path(source.repo).exists():
        return
    try:
        HfApi().dataset_info(source.repo, revision=source.revision, timeout=ANSWER_TIMEOUT_S)
    except (HfHubHTTPError, OfflineModeIsEnabled):
        return  # `datasets` says it better, or has it in its cache
    except httpx.TransportError as exc:
        try:
            CachedDatasetModuleFactory(source.repo).get_module()
        except FileNotFoundError:
            raise ConnectionError(f"the Hub does not answer: {exc}") from exc


@contextmanager
def quiet() -> Iterator[None]:
    """Neither bars of the libraries nor what they log: that is in what they raise."""
    import datasets
    import huggingface_hub
    from datasets import utils as bars
    from huggingface_hub import utils as hub_bars

    loggers = (datasets.logging, huggingface_hub.logging)
    levels = [logger.get_verbosity() for logger in loggers]
    shown = [module for module in (bars, hub_bars) if not module.are_progress_bars_disabled()]
    for logger in loggers:
        logger.set_verbosity(CRITICAL + 1)
    for module in shown:
        module.disable_progress_bars()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.set_verbosity(level)
        for module in shown:
            module.enable_progress_bars()
