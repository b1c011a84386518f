"""All cases, family by family."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.kernels import dense, elementwise, mla, moe
from benchmarks.kernels.case import Case


def all_cases(*, toy: bool) -> Iterator[Case]:
    for family in (dense, moe, mla, elementwise):
        yield from family.cases(toy=toy)
