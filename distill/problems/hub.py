"""Questions from a data set of the Hugging Face Hub (or a folder in its layout), read with `datasets`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from distill.errors import DataError, EnvironmentFault, RecipeError
from distill.problems.rows import problem_of
from distill.recipe import DatasetSource
from distill.records import Problem


def read(source: DatasetSource) -> Iterator[Problem]:
    """Yield the data set's problems.

    Raises RecipeError (no such data set, configuration or split), DataError (a row without the named fields),
    EnvironmentFault (the Hub cannot be reached, the disk is full).
    """
    number = 0
    for number, row in enumerate(_load(source), start=1):
        yield problem_of(row, source, name=source.repo, where=f"{source.repo}[{source.split}]: row {number}")
        if number == source.limit:
            return
    if number == 0:
        raise DataError("holds no questions", where=source.repo, field=source.split)


def _load(source: DatasetSource) -> Any:
    import datasets
    import httpx
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError, DefunctDatasetError
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return datasets.load_dataset(source.repo, source.config, revision=source.revision, split=source.split)
    except (DatasetNotFoundError, DefunctDatasetError, datasets.builder.InvalidConfigName) as exc:
        raise RecipeError(f"no such data set ({exc})", where=source.repo, field="problems.repo") from exc
    except (ConnectionError, httpx.TransportError, HfHubHTTPError) as exc:
        raise EnvironmentFault(f"cannot be fetched ({exc})", where=source.repo) from exc
    except DatasetGenerationError as exc:
        kind = EnvironmentFault if isinstance(exc.__cause__, OSError) else DataError
        raise kind(f"cannot be read ({exc.__cause__ or exc})", where=source.repo) from exc
    except RuntimeError as exc:  # of a data set that is a Python script
        raise RecipeError(f"names code, which is not run ({exc})", where=source.repo, field="problems.repo") from exc
    except ValueError as exc:  # what `datasets` raises for an unknown configuration or split
        raise RecipeError(str(exc), where=source.repo, field="problems.split") from exc
