"""An endless seeded stream of reasoning-gym problems of one family on one side of the split, repeats included.

For training text, where a family may have fewer distinct problems than training has places. `load_problems` is the one
to use where problems must be distinct.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from distill.problems.split import Split, split_of
from distill.records import Problem

PICO_FAMILIES = Path(__file__).with_name("pico.yaml")


def pico_families() -> dict[str, dict[str, Any]]:
    """Family -> reasoning-gym parameters of the pico problem set."""
    families: dict[str, dict[str, Any]] = yaml.safe_load(PICO_FAMILIES.read_text(encoding="utf-8"))["families"]
    return families


def stream(family: str, parameters: Mapping[str, Any], *, seed: int, split: Split) -> Iterator[Problem]:
    """Problems in the order of reasoning-gym's own index, those of the other side left out. `seed` below 2**31."""
    import reasoning_gym  # seconds to import

    dataset = reasoning_gym.create_dataset(family, seed=seed, size=2**31 - 1, **parameters)
    for index in range(2**31 - 1):
        entry = dataset[index]
        if split_of(entry["question"]) == split:
            yield Problem(
                prompt=entry["question"],
                answer=entry["answer"],
                grader="reasoning_gym",
                source=family,
                metadata={"dataset": family, "entry": entry},
            )
