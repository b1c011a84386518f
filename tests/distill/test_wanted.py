"""What a run wants, without an object each: the same keys and requests as with one."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, strategies as st

from distill.problems.packed import BLOCK, BLOCKS_OPEN, PackedProblems
from distill.records import Problem, SampleKeys, Sampling, TeacherIdentity, TraceRequest, content_id
from distill.wanted import Requests, WantedSamples

IDENTITY = TeacherIdentity(name="t", weights='größe "w"', template="t", backend="b", backend_version="1")


def problem(number: int) -> Problem:
    return Problem(
        prompt=f'{number} + 1 = ? ⊢ \\ "',
        answer=None if number % 3 == 0 else str(number),
        grader="math",
        source="s",
        metadata={"entry": {"numbers": [number, None, 0.5]}} if number % 2 else {},
    )


PROBLEMS = [problem(number) for number in range(BLOCK * (BLOCKS_OPEN + 2) + 5)]
PACKED = PackedProblems(PROBLEMS)


def test_packed_problems_are_the_same_in_any_order() -> None:
    assert len(PACKED) == len(PROBLEMS)
    assert list(PACKED) == PROBLEMS
    assert [PACKED.id(index) for index in range(len(PACKED))] == [one.id for one in PROBLEMS]
    for index in random.Random(1).sample(range(len(PROBLEMS)), 300):
        assert PACKED[index] == PROBLEMS[index]
        assert PACKED[index].id == PROBLEMS[index].id
    with pytest.raises(IndexError):
        PACKED[len(PROBLEMS)]


def test_a_question_that_comes_twice_is_there_once_and_first() -> None:
    again = PROBLEMS[3].model_copy(update={"source": "another"})
    assert list(PackedProblems([*PROBLEMS[:5], again, PROBLEMS[5]])) == PROBLEMS[:6]
    assert len(PackedProblems([])) == 0


@given(
    st.builds(
        TeacherIdentity,
        **dict.fromkeys(("name", "weights", "template", "backend", "backend_version"), st.text(max_size=20)),
    ),
    st.builds(Sampling, temperature=st.floats(0, 5), seed=st.integers(0, 2**40)),
    st.integers(0, 10_000),
)
def test_a_key_made_in_passing_is_the_hash_of_its_content(
    identity: TeacherIdentity, sampling: Sampling, index: int
) -> None:
    one = PROBLEMS[0]
    expected = content_id([one.id, identity.model_dump(), sampling.content(), index])
    assert SampleKeys(identity, sampling).of(one.id, index) == expected
    assert TraceRequest(problem=one, sample_index=index).key(identity, sampling) == expected


def test_wanted_samples_come_by_problem_and_index() -> None:
    sampling = Sampling(seed=4)
    wanted = WantedSamples(PACKED, IDENTITY, sampling)
    assert len(wanted) == 0
    for number in range(len(PACKED)):
        wanted.num_samples[number] = number % 4
    requests = [TraceRequest(problem=one, sample_index=i) for n, one in enumerate(PROBLEMS) for i in range(n % 4)]
    assert len(wanted) == len(requests)
    assert list(wanted.keys()) == [request.key(IDENTITY, sampling) for request in requests]
    lazy = Requests(PACKED, [(n, i) for n in range(len(PROBLEMS)) for i in range(n % 4)])
    assert list(lazy) == requests
    assert (lazy[-1], list(lazy[2:5]), len(lazy)) == (requests[-1], requests[2:5], len(requests))
    assert wanted.key((7, 2)) == TraceRequest(problem=PROBLEMS[7], sample_index=2).key(IDENTITY, sampling)
    with pytest.raises(IndexError):
        lazy[len(lazy)]
