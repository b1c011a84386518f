"""Identity: a sample's key changes with whatever can change the sample, and with nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st
from pydantic import ValidationError

from distill.records import (
    Completion,
    Example,
    Problem,
    Sampling,
    ScoreCard,
    TeacherIdentity,
    Trace,
    TraceRequest,
    Verdict,
    content_id,
)
from tests.repository import REPOSITORY

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
PROBLEMS = st.builds(
    Problem,
    prompt=TEXT,
    answer=st.none() | TEXT,
    grader=st.sampled_from(["reasoning_gym", "math", "choice"]),
    source=TEXT,
    metadata=st.dictionaries(TEXT, JSON, max_size=3),
)
SAMPLINGS = st.builds(
    Sampling,
    temperature=st.floats(0, 5),
    top_p=st.floats(0.01, 1),
    max_tokens=st.integers(1, 10**6),
    seed=st.integers(0, 2**40),
)
IDENTITIES = st.builds(TeacherIdentity, name=TEXT, weights=TEXT, template=TEXT, backend=TEXT, backend_version=TEXT)
REQUESTS = st.builds(TraceRequest, problem=PROBLEMS, sample_index=st.integers(0, 1000))

PROBLEM = Problem(prompt="1 + 1?", answer="2", grader="math", source="s", metadata={"a": 1})
REQUEST = TraceRequest(problem=PROBLEM, sample_index=3)
SAMPLING = Sampling(temperature=0.6, top_p=0.95, max_tokens=100, seed=17)
IDENTITY = TeacherIdentity(name="n", weights="w", template="t", backend="b", backend_version="1")
KEY = REQUEST.key(IDENTITY, SAMPLING)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("problem", {"prompt": "1 + 2?"}),
        ("problem", {"prompt": "1 + 1? "}),
        ("problem", {"answer": "3"}),
        ("problem", {"answer": None}),
        ("problem", {"grader": "choice"}),
        ("request", {"sample_index": 4}),
        ("sampling", {"temperature": 0.7}),
        ("sampling", {"top_p": 0.9}),
        ("sampling", {"max_tokens": 101}),
        ("sampling", {"seed": 18}),
        ("sampling", {"top_logprobs": 5}),
        ("sampling", {"max_thinking_tokens": 50}),
        *(("identity", {name: "other"}) for name in TeacherIdentity.model_fields),
    ],
)
def test_the_key_changes_with_each_thing_that_can_change_the_sample(part: str, change: dict[str, Any]) -> None:
    assert key_with(part, change) != KEY


@pytest.mark.parametrize(
    ("part", "change"), [("problem", {"source": "elsewhere"}), ("problem", {"metadata": {"b": 2}})]
)
def test_the_key_changes_with_nothing_else(part: str, change: dict[str, Any]) -> None:
    assert key_with(part, change) == KEY


def test_a_feature_that_is_off_leaves_the_keys_of_older_ledgers_as_they_are() -> None:
    """The key of `REQUEST` as it was before `top_logprobs` and `max_thinking_tokens` existed."""
    assert KEY == "6f03a66b1e2803f194d610a1ef56ebd3"
    assert key_with("sampling", {"top_logprobs": 0, "max_thinking_tokens": None}) == KEY
    on = [{"top_logprobs": 1}, {"top_logprobs": 2}, {"max_thinking_tokens": 1}, {"max_thinking_tokens": 2}]
    assert len({key_with("sampling", change) for change in on} | {KEY}) == 5


def key_with(part: str, change: dict[str, Any]) -> str:
    """The key after one field of one part has another value; validated again, so that nothing cached carries over."""
    parts: dict[str, Any] = {"problem": PROBLEM, "request": REQUEST, "sampling": SAMPLING, "identity": IDENTITY}
    changed = {name: {**value.model_dump(), **(change if name == part else {})} for name, value in parts.items()}
    request = TraceRequest.model_validate({**changed["request"], "problem": changed["problem"]})
    return request.key(
        TeacherIdentity.model_validate(changed["identity"]), Sampling.model_validate(changed["sampling"])
    )


@settings(max_examples=80, deadline=None)
@given(REQUESTS, REQUESTS, SAMPLINGS, SAMPLINGS, IDENTITIES, IDENTITIES)
def test_keys_are_equal_exactly_when_their_parts_are(
    one: TraceRequest, two: TraceRequest, s: Sampling, t: Sampling, i: TeacherIdentity, j: TeacherIdentity
) -> None:
    same = (one.problem.id, one.sample_index, s, i) == (two.problem.id, two.sample_index, t, j)
    assert (one.key(i, s) == two.key(j, t)) == same
    assert one.key(i, s) == TraceRequest.model_validate_json(one.model_dump_json()).key(
        TeacherIdentity.model_validate_json(i.model_dump_json()), Sampling.model_validate_json(s.model_dump_json())
    )


def test_keys_are_the_same_in_another_process_with_another_hash_seed() -> None:
    code = f"from {__name__} import *; print(KEY, REQUEST.seed(SAMPLING), PROBLEM.id)"
    said = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert said == {f"{KEY} {REQUEST.seed(SAMPLING)} {PROBLEM.id}\n"}


def test_seeds_are_distinct_and_fit_what_takes_them() -> None:
    problems = [PROBLEM.model_copy(update={"prompt": f"{n}?"}) for n in range(100)]
    problems = [Problem.model_validate(problem.model_dump()) for problem in problems]
    seeds = [TraceRequest(problem=p, sample_index=i).seed(SAMPLING) for p in problems for i in range(20)]
    assert len(set(seeds)) == 2_000
    assert all(0 <= seed < 2**63 for seed in seeds)


RECORDS = st.one_of(
    PROBLEMS,
    SAMPLINGS,
    IDENTITIES,
    REQUESTS,
    st.builds(
        Completion, request=REQUESTS, text=TEXT, num_prompt_tokens=st.integers(0, 9), num_tokens=st.integers(0, 9)
    ),
    st.builds(Trace, text=TEXT),
    st.builds(Verdict),
    st.builds(Example, question=TEXT, completion=TEXT),
    st.builds(
        ScoreCard, value=st.floats(0, 1), stderr=st.floats(0, 1), ci95=st.tuples(st.floats(0, 1), st.floats(0, 1))
    ),
)


@settings(max_examples=80, deadline=None)
@given(RECORDS)
def test_records_survive_json_and_are_frozen(record: Any) -> None:
    back = type(record).model_validate_json(record.model_dump_json())
    assert back == record
    if isinstance(record, Problem | Example):
        assert back.id == record.id
    field = next(iter(type(record).model_fields))
    with pytest.raises(ValidationError):
        setattr(record, field, getattr(record, field))


@settings(max_examples=80, deadline=None)
@given(st.dictionaries(TEXT, JSON, max_size=4))
def test_content_ids_do_not_see_the_order_of_keys(content: dict[str, Any]) -> None:
    turned = dict(reversed(content.items()))
    assert content_id(content) == content_id(turned) == content_id(json.loads(json.dumps(content)))


def test_content_ids_refuse_what_json_has_no_word_for() -> None:
    with pytest.raises(ValueError, match="Out of range"):
        content_id([float("nan")])
    with pytest.raises(TypeError):
        content_id([object()])
