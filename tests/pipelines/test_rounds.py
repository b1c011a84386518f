"""Adaptive sampling through the generate stage: what is asked for, what a stop changes (nothing), what is reused."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from distill.adaptive import wants_more
from distill.errors import EnvironmentFault
from distill.ledger import Ledger
from distill.manifest import read_manifest
from distill.progress import Task, silent
from distill.recipe import Recipe
from distill.records import Completion, FinishReason, Problem, Sampling, TeacherIdentity, Trace, TraceRequest, Verdict
from distill.tables import read_records
from distill.verify.judge import DIFFERENT, SAME
from distill.verify.verifier import RuleVerifier
from pipelines.context import Context
from pipelines.stages import generate as generate_stage
from pipelines.stages.curate import curate
from pipelines.stages.generate import generate
from tests.distill.test_judge import ScriptedJudge, always

ADAPTIVE = {"max_samples": 16, "min_correct": 3, "give_up_after": 8, "pass_rate": [0.0, 0.9]}


def passes(number: int, index: int) -> bool:
    """Problem 0 is hopeless, the last one is easy, and in between the odds rise."""
    return random.Random(f"{number} {index}").random() < number / 39


class ScriptedTeacher:
    """Answers problem `n` right at the odds of `passes`; hands its answers over in an order of its own."""

    identity = TeacherIdentity(name="scripted", weights="w", template="t", backend="test", backend_version="1")

    def __init__(self, seed: int = 0, on_sample: Callable[[int], None] = lambda n: None) -> None:
        self.asked: list[tuple[int, int]] = []
        self._order = random.Random(seed)
        self._on_sample = on_sample

    def generate(self, requests: Sequence[TraceRequest], sampling: Sampling) -> Iterator[Completion]:
        for request in self._order.sample(list(requests), len(requests)):
            self._on_sample(len(self.asked))
            number = int(request.problem.prompt.split()[0])
            self.asked.append((number, request.sample_index))
            letter = request.problem.answer if passes(number, request.sample_index) else "C"
            text = f"<think>\n{request.seed(sampling)}\n</think>\n\n\\boxed{{{letter}}}"
            yield Completion(request=request, text=text, finish_reason="stop", num_prompt_tokens=5, num_tokens=7)

    def close(self) -> None:
        pass


def recipe(folder: Path, **generate_: Any) -> Recipe:
    """Forty questions with choices, which are graded without any worker process."""
    rows = [
        {"prompt": f"{number} is", "answer": number % 2, "choices": ["even", "odd", "neither"]} for number in range(40)
    ]
    (folder / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = {
        "name": "t",
        "problems": [{"kind": "local", "path": "p.jsonl", "choices_field": "choices", "grader": "choice"}],
        "teacher": {"backend": "openai", "model": "scripted"},
        "generate": {"num_samples": 4, "adaptive": ADAPTIVE, **generate_},
        "curate": {"decontaminate": False, "max_repetition": None},
        "distill": {"students": ["x"]},
        "eval": {"held_out": {"families": {"gcd": {}}, "count": 9, "split": "held_out"}},
    }
    return Recipe.model_validate(tree)


def run(folder: Path, teacher: ScriptedTeacher, what: Recipe | None = None, progress: Any = None) -> Any:
    context = Context(folder, progress or silent(), open_teacher=lambda config: teacher)
    return generate(what or recipe(folder), folder, context)


def expected(what: Recipe) -> dict[int, int]:
    """Samples of every problem, by the rule alone."""
    policy = what.generate.adaptive
    assert policy is not None
    counts = {}
    for number in range(40):
        asked = 4
        while wants_more(
            policy, correct=sum(passes(number, index) for index in range(asked)), judged=asked, asked=asked
        ):
            asked += 4
        counts[number] = asked
    return counts


def exported(folder: Path) -> dict[str, bytes]:
    names = ("problems.parquet", "traces/part-00000.parquet")
    return {name: (folder / "generate" / name).read_bytes() for name in names}


def test_every_problem_gets_what_the_rule_gives_it(tmp_path: Path) -> None:
    teacher = ScriptedTeacher()
    manifest = run(tmp_path, teacher)
    wanted = expected(recipe(tmp_path))
    assert set(wanted.values()) == {4, 8, 12, 16}, "the case must hold every ending"
    assert Counter(number for number, _ in teacher.asked) == wanted
    assert sorted(teacher.asked) == [(number, index) for number in range(40) for index in range(wanted[number])]
    histogram = {str(n): count for n, count in sorted(Counter(wanted.values()).items())}
    assert manifest.counts["samples_per_problem"] == histogram
    assert manifest.counts["samples"] == sum(wanted.values())
    assert manifest.counts["correct"] == sum(passes(*one) for one in teacher.asked)
    problems = {problem.id: problem for problem in read_records(tmp_path / "generate/problems.parquet", Problem)}
    traces = read_records(tmp_path / "generate/traces", Trace)
    assert [(int(problems[t.problem_id].prompt.split()[0]), t.sample_index) for t in traces] == sorted(teacher.asked)


@pytest.mark.parametrize("seed", range(4))
def test_stops_in_any_round_change_nothing_and_ask_nothing_twice(tmp_path: Path, seed: int) -> None:
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    for folder in (straight, stopped):
        folder.mkdir()
    run(straight, ScriptedTeacher())
    rng, asked = random.Random(seed), []

    def stop_at(number: int) -> Callable[[int], None]:
        def stop(at: int) -> None:
            if at == number:
                raise KeyboardInterrupt

        return stop

    for turn in range(100):
        teacher = ScriptedTeacher(seed=turn, on_sample=stop_at(rng.randrange(20, 120)))
        try:
            run(stopped, teacher)
        except KeyboardInterrupt:
            assert read_manifest(stopped / "generate") is None
        asked += teacher.asked
        if read_manifest(stopped / "generate"):
            break
    assert turn > 2, "the stops must fall into several rounds"
    assert len(asked) == len(set(asked)) == sum(expected(recipe(tmp_path)).values())
    assert exported(stopped) == exported(straight)


def test_a_ledger_with_more_samples_gives_the_same_run(tmp_path: Path) -> None:
    run(tmp_path, ScriptedTeacher(), recipe(tmp_path, adaptive=None, num_samples=16))
    teacher = ScriptedTeacher()
    manifest = run(tmp_path, teacher)
    assert not teacher.asked
    assert manifest.counts["samples"] == manifest.counts["reused"] == sum(expected(recipe(tmp_path)).values())
    straight = tmp_path / "straight"
    straight.mkdir()
    run(straight, ScriptedTeacher())
    assert exported(tmp_path) == exported(straight)


def test_verdicts_made_on_the_way_are_not_made_again_by_curation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    grade = RuleVerifier.verify

    def counted(self: RuleVerifier, answers: Sequence[tuple[Problem, str, FinishReason]]) -> Iterator[Verdict]:
        asked.append(len(answers))
        return grade(self, answers)

    manifest = run(tmp_path, ScriptedTeacher())
    monkeypatch.setattr(RuleVerifier, "verify", counted)
    curated = curate(recipe(tmp_path), tmp_path, Context(tmp_path))
    assert sum(asked) == 0
    verified = read_manifest(tmp_path / "curate" / "verify")
    assert verified is not None
    assert verified.counts["reused"] == manifest.counts["samples"]
    assert verified.counts["correct"] == manifest.counts["correct"] == curated.counts["examples"]


def test_the_progress_shows_the_yield(tmp_path: Path) -> None:
    facts: list[dict[str, Any]] = []

    class Recorded:
        def advance(self, amount: float = 1, **shown: str | float) -> None:
            facts.append(shown)

    class Recorder:
        def task(self, name: str, total: float, *, done: float = 0, unit: str = "it") -> Any:
            task: Task = Recorded()
            return nullcontext(task)

    class Patient(ScriptedTeacher):
        """Hands the rest over when the grader has begun to report; a tenth is cut off, a tenth has no answer."""

        def generate(self, requests: Sequence[TraceRequest], sampling: Sampling) -> Iterator[Completion]:
            until = time.monotonic() + 60
            for number, completion in enumerate(super().generate(requests, sampling)):
                ending = {0: {"finish_reason": "length"}, 1: {"text": "<think>\n</think>\nC"}}.get(number % 10, {})
                yield completion.model_copy(update=ending)
                while number == 300 and not background.num_verdicts and time.monotonic() < until:
                    time.sleep(0.01)

    class Counting:
        num_verdicts = 0

    background = Counting()
    add = Ledger.add_verdicts

    def counted(self: Ledger, verdicts: Any) -> int:
        verdicts = list(verdicts)
        background.num_verdicts += len(verdicts)
        return add(self, verdicts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ledger, "add_verdicts", counted)
        counts = run(tmp_path, Patient(), recipe(tmp_path, adaptive=None, num_samples=16), Recorder()).counts
    assert (counts["truncated"], counts["no_answer"]) == (64, 64)
    assert 0 < counts["right"] < counts["graded"] <= 640
    last = [shown for shown in facts if "right" in shown][-1]
    right, graded = map(int, last["right"].split("/"))
    assert 0 < graded <= 640
    assert 0 < right < graded
    assert (last["cut_off"], last["no_answer"]) == (64, 64)


def test_grading_that_cannot_work_stops_adaptive_sampling_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: RuleVerifier, answers: object) -> Iterator[Verdict]:
        raise EnvironmentFault("grading workers do not start")
        yield

    monkeypatch.setattr(RuleVerifier, "verify", broken)
    assert run(tmp_path, ScriptedTeacher(), recipe(tmp_path, adaptive=None)).counts["samples"] == 160
    with pytest.raises(EnvironmentFault, match="do not start"):
        run(tmp_path, ScriptedTeacher())
    with Ledger.open(tmp_path / "generate" / "ledger.sqlite") as ledger:
        assert len(ledger) == 160


@pytest.mark.parametrize(("vote", "num_samples"), [(SAME, 4), (DIFFERENT, 8)])
def test_between_rounds_a_judge_decides_where_the_recipe_names_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vote: str, num_samples: int
) -> None:
    rows = [{"prompt": f"{number} is", "answer": f"number {number}"} for number in range(5)]
    judged = {"grader": "judge", "choices_field": None}
    tree = recipe(tmp_path).model_dump()
    tree["problems"][0].update(judged)
    tree["verify"]["judge"] = {"teacher": {"backend": "openai", "model": "j"}}
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    judge = ScriptedJudge(always(vote))
    monkeypatch.setattr(generate_stage, "open_judge", lambda *arguments: nullcontext(judge))
    manifest = run(tmp_path, ScriptedTeacher(), Recipe.model_validate(tree))
    assert manifest.counts["samples_per_problem"] == {str(num_samples): 5}
    assert judge.prompts


def test_parts_of_the_prompts_are_whole_together(tmp_path: Path) -> None:
    seen: list[str] = []
    for part in ("1/3", "2/3", "3/3"):
        folder = tmp_path / part.replace("/", "-")
        folder.mkdir()
        run(folder, ScriptedTeacher(), recipe(folder, adaptive=None, part=part))
        seen += [problem.id for problem in read_records(folder / "generate/problems.parquet", Problem)]
    whole = tmp_path / "whole"
    whole.mkdir()
    run(whole, ScriptedTeacher(), recipe(whole, adaptive=None))
    assert sorted(seen) == sorted(p.id for p in read_records(whole / "generate/problems.parquet", Problem))
