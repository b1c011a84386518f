"""The Python API: `docs/api.md` describes it, `pipelines.api` is its code.

What `__all__` names is stable; all else may change from one version to the next. A name is looked up when it is asked
for, so that processes which need only a part of the packages import no more than that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.api import (
        CheckpointError,
        DataError,
        EnvironmentFault,
        PlainProgress,
        PotstillError,
        Preempted,
        Recipe,
        RecipeError,
        Run,
        ScoreCard,
        TrainingFailure,
        UserInputError,
        __version__,
    )

__all__ = [
    "CheckpointError",
    "DataError",
    "EnvironmentFault",
    "PlainProgress",
    "PotstillError",
    "Preempted",
    "Recipe",
    "RecipeError",
    "Run",
    "ScoreCard",
    "TrainingFailure",
    "UserInputError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pipelines import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return __all__
