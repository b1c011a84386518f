"""Loops: found where they are, with noise and counters in them; not found in honest work, however monotonous."""

from __future__ import annotations

import json
import os
import random
import re
import time
from pathlib import Path

import pytest

from distill.problems import load_problems
from distill.problems.stream import PICO_FAMILIES
from distill.problems.worked import worked_solution
from distill.recipe import ReasoningGymSource
from distill.verify.repetition import loop

WORDS = re.findall(
    r"\w+",
    "we know that the sum of all terms is even so let me try another way and check whether this value gives a triangle "
    "with integer sides since every prime divides one factor only then their product must equal twice what was found "
    "before hence both numbers are coprime which means no further case remains",
)


def prose(rng: random.Random, num_words: int) -> str:
    words = [rng.choice(WORDS) + str(rng.randrange(50)) * (rng.random() < 0.2) for _ in range(num_words)]
    return " ".join(word + "." * (rng.random() < 0.1) for word in words)


def loops(rng: random.Random, sentence: str, rounds: int, noise: float) -> str:
    words = (sentence + " ") * rounds
    return " ".join(word if rng.random() >= noise else rng.choice(WORDS) + "x" for word in words.split())


def hanoi(disks: int, source: int, target: int, spare: int) -> list[tuple[int, int, int]]:
    if not disks:
        return []
    before, after = hanoi(disks - 1, source, spare, target), hanoi(disks - 1, spare, target, source)
    return [*before, (disks, source, target), *after]


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.04])
@pytest.mark.parametrize("length", [1, 3, 12, 60, 200])
def test_a_text_that_ends_in_a_loop(length: int, noise: float) -> None:
    rng = random.Random(length)
    for seed in range(5):
        before = prose(rng, 50 * 10**seed // 10 ** (seed // 2))
        sentence = prose(rng, length)
        text = f"{before} {loops(rng, sentence, max(8, 160 // length), noise)}"
        found = loop(text)
        assert found is not None
        assert len(before) - 400 <= found.start <= len(before) + 0.35 * (len(text) - len(before))
        assert found.end >= len(text) - 0.2 * (len(text) - len(before))
        assert found.repeats >= 4


@pytest.mark.parametrize(
    "text",
    [
        "So x = 4. " + "Wait, let me check this once more, step by step. " * 12,
        "".join(
            f"Attempt {n}: wait, that is not right, so I go back to where I began, and find the sum in another way. "
            for n in range(20)
        ),
        "ha" * 2_000,
        "0 " * 1_000,
        "." * 1_000,
        "因此我们需要再次检查这个答案。" * 20,
        "好的" * 100,
        "<think>\n" + "The answer is 5. No, wait. " * 30 + "\n</think>\n\nThe answer is \\boxed{5}.",
        "A first thought. " + "I am not sure about that one. " * 40 + "Now then: the roots are 3 and 4, hence 12.",
        "Once. " + ("x" * 37 + " and so on ") * 30,
    ],
)
def test_loops_of_all_kinds(text: str) -> None:
    assert loop(text) is not None


def test_where_a_loop_begins_and_how_often_it_goes_round() -> None:
    before, sentence = "The sum of two odd numbers is even, and that settles it. ", "Hmm, let me think again. "
    found = loop(before + sentence * 20)
    assert found is not None
    assert (before + sentence * 20)[found.start : found.end].count("again") == 20
    assert found.period == 7
    assert found.repeats == pytest.approx(20, abs=0.5)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "Wait. Wait. Wait, let me see. It is 5.",
        "\n".join(f"n = {n}: n^2 = {n * n}, n^3 = {n**3}, their sum is {n * n + n**3}." for n in range(200)),
        "\n".join(f"Move disk {disk} from peg {a} to peg {b}." for disk, a, b in hanoi(7, 1, 3, 2)),
        "The matrix is\n" + "0 0 0 0 0 0 0 0 0 0\n" * 10,
        "\n".join(
            f"Case {n}: if x = {n}, then y = {n * 17 % 23}, and {n * 31 % 7} is not a square." for n in range(100)
        ),
        "12 | 34 | 56\n" * 3,
    ],
)
def test_honest_repetition_is_no_loop(text: str) -> None:
    assert loop(text) is None


def test_a_loop_that_was_left_again_counts_only_if_it_is_most_of_the_text() -> None:
    rng = random.Random(3)
    looped = "Let me check that once more, just to be sure. " * 12
    assert loop(f"{prose(rng, 300)} {looped} {prose(rng, 300)}") is None
    assert loop(f"{looped} {prose(rng, 40)}") is not None


def test_worked_solutions_do_not_loop() -> None:
    problems = load_problems([ReasoningGymSource(families=str(PICO_FAMILIES), count=400, seed=3)], base_dir=Path.cwd())
    assert [problem.prompt for problem in problems if loop(worked_solution(problem))] == []


def test_no_gold_solution_loops() -> None:
    if not (folder := os.environ.get("POTSTILL_BENCH_DATA")):
        pytest.skip("POTSTILL_BENCH_DATA is not set")
    count, flagged = 0, []
    for name, field in (
        ("gsm8k_train.jsonl", "answer"),
        ("gsm8k_test.jsonl", "answer"),
        ("math500.jsonl", "solution"),
        ("aime24.json", "reference_solution"),
    ):
        for line in (Path(folder) / name).read_text().splitlines():
            if line:
                count += 1
                flagged += [line[:80]] if loop(json.loads(line)[field]) else []
    assert count > 9_000
    assert flagged == []


def test_long_texts_take_linear_time() -> None:
    rng = random.Random(1)
    started = time.process_time()
    for text in (prose(rng, 100_000), "a " * 200_000, "x" * 1_000_000, prose(rng, 50) * 2_000):
        loop(text)
    assert time.process_time() - started < 30  # five seconds
