"""A sample is asked for once: what another suite, more samples, another grader or a stop in the middle ask again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from distill.errors import EnvironmentFault
from distill.recipe import CodeLimits, VerifyConfig
from distill.records import Completion, Problem, Sampling, TraceRequest
from distill.tables import write_records
from distill.verify import open_verifier
from eval.answers import AbsentModel, NotKept
from tests.eval.scripted import Exact, Scripted, scored
from tests.pipelines.recorded_progress import RecordedProgress

QUESTIONS = 6
SAMPLING = Sampling(temperature=0.9, max_tokens=50, seed=5)


class Counting(Scripted):
    """Right on even questions; keeps every request of every call, and may stop with an error or leave samples out."""

    def __init__(self) -> None:
        super().__init__(lambda question, sample: question % 2 == 0)
        self.asked: list[tuple[str, int]] = []
        self.most: int | None = None
        self.fault: Exception | None = None

    def generate(self, requests: Sequence[TraceRequest], sampling: Sampling) -> Iterator[Completion]:
        self.asked += [(request.problem.prompt, request.sample_index) for request in requests]
        for number, completion in enumerate(super().generate(requests, sampling)):
            if number == self.most:
                if self.fault is not None:
                    raise self.fault
                return
            yield completion


@pytest.fixture
def score(tmp_path: Path) -> Callable[..., tuple[dict[str, float], int]]:
    """Score `model` in one folder, and say pass@1 by suite and how many samples were asked for."""
    problems = [
        Problem(prompt=f"{i} + 1 = ?", answer=str(i + 1), grader="reasoning_gym", source="sums", metadata={"i": i})
        for i in range(QUESTIONS)
    ]
    write_records(tmp_path / "held_out.parquet", problems, Problem)
    for name in ("gsm8k_test", "math500"):
        rows = [{"question": f"{name} {i}", "problem": f"{name} {i}", "answer": f"#### {i}"} for i in range(QUESTIONS)]
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))

    def score(model: Scripted, suites: Sequence[str] = ("pico",), num_samples: int = 2, **more) -> tuple:
        how = {"seed": 5, "num_samples": num_samples, "sampling": SAMPLING, "held_out": tmp_path / "held_out.parquet"}
        cards, asked = scored(model, suites, tmp_path / "out", bench_data=str(tmp_path), **how, **more)
        return {card.suite: card.value for card in cards if card.metric == "pass@1"}, asked

    return score


def test_more_samples_and_another_suite_ask_for_what_is_new_alone(score, tmp_path) -> None:
    model = Counting()
    assert score(model) == ({"pico": 0.5}, 2 * QUESTIONS)
    assert score(model) == ({"pico": 0.5}, 0)
    before = set(model.asked)
    assert score(model, num_samples=8) == ({"pico": 0.5}, 6 * QUESTIONS)
    assert not before & set(model.asked[len(before) :])
    assert {index for _, index in model.asked} == set(range(8))
    rows = pq.read_table(tmp_path / "out" / "samples.parquet").to_pylist()
    assert [row["sample_index"] for row in rows] == [*range(8)] * QUESTIONS
    values, asked = score(model, ["pico", "gsm8k"], num_samples=4)
    assert asked == 4 * QUESTIONS
    assert values.keys() == {"pico", "gsm8k"}
    assert score(model, ["gsm8k"], num_samples=3)[1] == 0
    assert len(model.asked) == len(set(model.asked)), "nothing was asked twice"


def test_suites_that_share_their_questions_share_the_answers(score) -> None:
    assert score(Counting(), ["pico", "held_out"]) == ({"pico": 0.5, "held_out": 0.5}, 2 * QUESTIONS)


@pytest.mark.parametrize(
    "change",
    [
        {"sampling": SAMPLING.model_copy(update={"temperature": 0.8})},
        {"sampling": SAMPLING.model_copy(update={"max_tokens": 51})},
        {"seed": 6},
    ],
    ids=["temperature", "max_tokens", "seed"],
)
def test_what_can_change_a_sample_asks_again(score, tmp_path, change) -> None:
    model = Counting()
    score(model)
    how = {"seed": 5, "num_samples": 2, "sampling": SAMPLING, "held_out": tmp_path / "held_out.parquet"}
    assert scored(model, ["pico"], tmp_path / "out", **{**how, **change})[1] == 2 * QUESTIONS


class Harsh(Exact):
    """A grader that has changed its mind about everything, and counts what it is asked."""

    graded = 0

    def verify(self, answers):
        self.graded += len(answers)
        for verdict in super().verify(answers):
            yield verdict.model_copy(update={"state": "wrong"})


def test_another_grader_asks_for_nothing_and_its_verdicts_are_kept(score) -> None:
    score(Counting(), grading={"version": 1})
    asked = Counting().identity
    absent, harsh = AbsentModel(asked, Path("ledger")), Harsh()
    assert score(absent, grading={"version": 2}, verifier=harsh) == ({"pico": 0.0}, 0)
    assert score(absent, grading={"version": 1}, verifier=harsh) == ({"pico": 0.5}, 0)
    assert score(absent, grading={"version": 2}, verifier=harsh) == ({"pico": 0.0}, 0)
    assert harsh.graded == 2 * QUESTIONS
    with pytest.raises(NotKept, match=rf"ledger: {QUESTIONS} samples of 'sums' are not kept; run `potstill eval`"):
        score(absent, num_samples=3)


@pytest.mark.parametrize("fault", [KeyboardInterrupt(), EnvironmentFault("gone")], ids=["stopped", "lost"])
def test_what_had_arrived_is_not_asked_again(score, tmp_path, fault) -> None:
    model = Counting()
    model.most, model.fault = 7, fault
    with pytest.raises(type(fault)):
        score(model)
    assert not (tmp_path / "out" / "scores.json").exists()
    model.most = None
    shown = RecordedProgress()
    assert score(model, progress=shown) == ({"pico": 0.5}, 2 * QUESTIONS - 7)
    assert shown.totals["scripted pico"] == 2 * QUESTIONS
    assert shown.done["scripted pico"] == 2 * QUESTIONS - 7
    whole = pq.read_table(tmp_path / "out" / "samples.parquet")
    assert scored(Counting(), ["pico"], tmp_path / "straight", seed=5, num_samples=2, sampling=SAMPLING,
                  held_out=tmp_path / "held_out.parquet")[1] == 2 * QUESTIONS  # fmt: skip
    assert pq.read_table(tmp_path / "straight" / "samples.parquet") == whole


def test_a_model_that_leaves_samples_out_is_a_fault(score) -> None:
    model = Counting()
    model.most = 9
    with pytest.raises(EnvironmentFault, match="s: the model left 3 samples out"):
        score(model)


class Programmer(Scripted):
    def text(self, request: TraceRequest, *, right: bool) -> str:
        return f"```python\n{'print(2)' if right else 'while True: pass'}\n```"


def test_a_program_that_does_not_end_has_failed(tmp_path):
    """Elsewhere a grader that runs out of time says nothing of the answer."""
    case = {"input": "", "output": "2"}
    endless = VerifyConfig(num_workers=1, code=CodeLimits(timeout_s=0.5))
    problem = Problem(prompt="2?", answer=None, grader="code", source="s", metadata={"cases": [case]})
    path = tmp_path / "held_out.parquet"
    write_records(path, [problem], Problem)
    model = Programmer(lambda _, sample: sample == 0)
    with open_verifier(endless) as verifier:
        (card, *_), _ = scored(model, ["held_out"], tmp_path, seed=1, num_samples=2, verifier=verifier, held_out=path)
    assert (card.value, card.num_samples) == (0.5, 2)
