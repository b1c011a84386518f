"""The graders accept what is known to be right: gold solutions of public benchmarks, as they are and in other forms."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.graders import (
    MAX_REJECTED,
    SUITES,
    agreement,
    in_other_forms,
    measure,
    of_other_questions,
    read_gold,
)
from distill.protocols import Verifier
from distill.recipe import VerifyConfig
from distill.verify import open_verifier

SEED = 20261123


@pytest.fixture(scope="module")
def folder() -> Path:
    if not (name := os.environ.get("POTSTILL_BENCH_DATA")):
        pytest.skip("POTSTILL_BENCH_DATA is not set")
    return Path(name)


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    with open_verifier(VerifyConfig(num_workers=2, timeout_s=30)) as verifier:
        yield verifier


@pytest.mark.parametrize("suite", SUITES)
def test_a_sample_of_gold_solutions_is_accepted(verifier: Verifier, folder: Path, suite: str) -> None:
    gold = read_gold(suite, folder)
    gold = random.Random(SEED).sample(gold, min(100, len(gold)))
    as_they_are = [(one.problem, one.text, "") for one in gold]
    for answers in (as_they_are, in_other_forms(gold, sample=150, seed=SEED)):
        row = agreement(verifier, suite, "", answers)
        assert row["share"] >= 1 - MAX_REJECTED, row["rejections"]
    assert agreement(verifier, suite, "", of_other_questions(gold))["share"] <= 0.02


@pytest.mark.torture
@pytest.mark.parametrize("suite", SUITES)
def test_all_gold_solutions_are_accepted(verifier: Verifier, folder: Path, suite: str) -> None:
    solutions, forms, others = measure(verifier, suite, read_gold(suite, folder))
    assert solutions["share"] >= 1 - MAX_REJECTED, solutions["rejections"]
    assert forms["share"] >= 1 - MAX_REJECTED, forms["rejections"][:10]
    assert others["share"] <= 0.005, others["acceptances"]
