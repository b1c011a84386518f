"""The split over the pico families: what is trained on and what is held out never meet, whatever drew it."""

from __future__ import annotations

import itertools
import random
import re

import pytest
from hypothesis import given, settings, strategies as st

from distill.problems.split import HELD_OUT_SHARE, split_of
from distill.problems.stream import pico_families, stream

PER_FAMILY = 3_000


def words(prompt: str) -> tuple[str, ...]:
    return tuple(sorted(re.findall(r"[-\w.]*\w", prompt.lower())))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 10**6).map(str) | st.from_regex(r"[a-z]{1,8}", fullmatch=True)), st.randoms())
def test_the_order_of_words_and_numbers_does_not_matter(parts: list[str], rng: random.Random) -> None:
    shuffled = rng.sample(parts, len(parts))
    assert split_of(" ".join(parts)) == split_of(", ".join(shuffled) + "?")


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(10, 99), min_size=2, max_size=6), st.sampled_from("+-*"), st.randoms())
def test_sums_of_the_same_terms_share_a_side(terms: list[int], sign: str, rng: random.Random) -> None:
    shuffled = rng.sample(terms, len(terms))
    both = {split_of(f"What is {f' {sign} '.join(map(str, order))}?") for order in (terms, shuffled)}
    assert len(both) == 1


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_case_does_not_matter(text: str) -> None:
    ascii_text = text.encode("ascii", "ignore").decode()
    assert split_of(ascii_text.upper()) == split_of(ascii_text.lower())


@pytest.mark.parametrize("family", sorted(pico_families()))
def test_train_and_held_out_streams_of_a_family_never_meet(family: str) -> None:
    parameters = pico_families()[family]

    def prompts(split: str, count: int, seeds: tuple[int, ...]) -> set[str]:
        return {
            problem.prompt
            for seed in seeds
            for problem in itertools.islice(stream(family, parameters, seed=seed, split=split), count)
        }

    train = prompts("train", PER_FAMILY, (5, 6))
    held_out = prompts("held_out", PER_FAMILY // 8, (5, 7))
    assert len(train) > 1_000
    assert len(held_out) > 100
    assert not train & held_out
    assert not {words(prompt) for prompt in train} & {words(prompt) for prompt in held_out}
    assert {split_of(prompt) for prompt in train} == {"train"}
    assert {split_of(prompt) for prompt in held_out} == {"held_out"}


@pytest.mark.parametrize("family", sorted(pico_families()))
def test_about_one_question_in_eight_of_a_family_is_held_out(family: str) -> None:
    import reasoning_gym

    dataset = reasoning_gym.create_dataset(family, seed=11, size=PER_FAMILY, **pico_families()[family])
    distinct = {words(dataset[index]["question"]): dataset[index]["question"] for index in range(PER_FAMILY)}
    held_out = sum(split_of(question) == "held_out" for question in distinct.values())
    share = 1 / HELD_OUT_SHARE
    tolerance = 4 * (len(distinct) * share * (1 - share)) ** 0.5  # four standard errors of the binomial
    assert abs(held_out - len(distinct) * share) < tolerance


def test_the_split_is_the_one_that_the_bundled_models_were_trained_under() -> None:
    """Another hash would put questions that they have seen on the held-out side."""
    held_out = [n for n in range(100) if split_of(f"What is {n} + {n * n}?") == "held_out"]
    assert held_out == [18, 24, 30, 55, 67, 74, 77, 93, 96]
