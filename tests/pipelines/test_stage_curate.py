"""The curate stage over what generation leaves: graded once, filtered as often as the recipe changes, resumable."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from distill.curate import DroppedTrace, GradedTrace
from distill.errors import DataError, EnvironmentFault, RecipeError
from distill.manifest import read_manifest
from distill.problems import load_problems
from distill.problems.stream import PICO_FAMILIES
from distill.problems.worked import worked_solution
from distill.recipe import Recipe
from distill.records import Example, FinishReason, Problem, Trace, Verdict
from distill.tables import read_records, write_records
from distill.verify import kept as kept_module
from distill.verify.verifier import RuleVerifier
from pipelines.context import Context
from pipelines.stages import curate as stage_module
from pipelines.stages.curate import curate


def recipe(**changed: Any) -> Recipe:
    tree = {
        "name": "t",
        "problems": [{"kind": "reasoning_gym", "families": str(PICO_FAMILIES), "count": 40}],
        "teacher": {"backend": "openai", "model": "x"},
        "verify": {"num_workers": 1, "timeout_s": 10},
        "distill": {"students": ["x"]},
        "eval": {"held_out": {"families": str(PICO_FAMILIES), "count": 16, "split": "held_out"}},
    }
    return Recipe.model_validate({**tree, **changed})


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Forty questions, four samples each: two right (one of them twice), one wrong, one cut off."""
    problems = load_problems(recipe().problems, base_dir=tmp_path)
    traces = []
    for problem in problems:
        right = worked_solution(problem)
        wrong = f"<think>\nno\n</think>\n\n\\boxed{{-7{problem.answer}}}"
        written = [(right, "stop"), (right, "stop"), (wrong, "stop"), ("<think>\nand so", "length")]
        for index, (text, reason) in enumerate(written):
            traces.append(trace_of(problem, text, reason, index))
    write_records(tmp_path / "generate" / "problems.parquet", problems, Problem)
    write_records(tmp_path / "generate" / "traces" / "part-00000.parquet", traces, Trace)
    return tmp_path


def run(run_dir: Path, what: Recipe | None = None) -> Any:
    return curate(what or recipe(), run_dir, Context(run_dir))


def test_from_traces_to_examples(run_dir: Path) -> None:
    manifest = run(run_dir)
    out = run_dir / "curate"
    funnel = json.loads((out / "funnel.json").read_text())
    shown = {step["filter"]: step.pop("examples") for step in funnel}
    assert manifest.counts == {"traces": 160, "examples": 40, "questions": 40, "funnel": funnel}
    assert [len(examples) for examples in shown.values()] == [3, 0, 0, 0, 0, 3]
    assert shown["verdict"][0]["detail"].startswith("wrong")
    assert shown["verdict"][0]["completion"].startswith("<think>\nno\n</think>")
    graded = read_records(out / "verdicts.parquet", GradedTrace)
    assert [one.state for one in graded] == ["correct", "correct", "wrong", "truncated"] * 40
    assert [one.key for one in graded] == [t.key for t in read_records(run_dir / "generate" / "traces", Trace)]
    assert funnel[0] == {"filter": "verdict", "in": 160, "out": 80}
    assert {"filter": "deduplicate", "in": 80, "out": 40} in funnel
    examples, direct = (read_records(out / f"{name}.parquet", Example) for name in ("examples", "direct"))
    assert [e.question for e in examples] == [d.question for d in direct]
    assert all(
        e.completion.startswith("<think>\n") and d.completion.startswith("\\boxed{")
        for e, d in zip(examples, direct, strict=True)
    )
    assert len(read_records(out / "dropped.parquet", DroppedTrace)) == 120


def test_nothing_runs_twice_and_other_filters_need_no_new_grading(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(run_dir)
    graded = read_manifest(run_dir / "curate" / "verify")

    def refuse(self: object, answers: object) -> Iterator[Verdict]:
        raise AssertionError("graded again")

    monkeypatch.setattr(RuleVerifier, "verify", refuse)
    assert run(run_dir) == first
    assert run(run_dir, recipe(verify={"num_workers": 3, "timeout_s": 10})) == first
    other = run(run_dir, recipe(curate={"deduplicate": False}))
    assert other.counts["examples"] == 80
    assert read_manifest(run_dir / "curate" / "verify") == graded
    assert run(run_dir, recipe(curate={"decontaminate": False})).fingerprint != first.fingerprint


@pytest.mark.slow
def test_an_interrupted_grading_asks_for_no_answer_twice(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_module, "PART_SIZE", 30)
    graded: list[str] = []
    stop_at = [37, 50, 10**9]
    grade = RuleVerifier.verify

    def stopping(self: RuleVerifier, answers: Sequence[tuple[Problem, str, FinishReason]]) -> Iterator[Verdict]:
        for (problem, text, _), verdict in zip(answers, grade(self, answers), strict=True):
            if len(graded) == stop_at[0]:
                stop_at.pop(0)
                raise KeyboardInterrupt
            graded.append(problem.id + text)
            yield verdict

    with monkeypatch.context() as patch:
        patch.setattr(RuleVerifier, "verify", stopping)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                run(run_dir)
            assert read_manifest(run_dir / "curate") is None
        run(run_dir)
    assert len(graded) == 160
    verified = read_manifest(run_dir / "curate" / "verify")
    assert verified is not None
    assert verified.counts["reused"] == 50
    resumed = {path.name: path.read_bytes() for path in (run_dir / "curate").glob("*.parquet")}
    straight = run_dir / "straight"
    shutil.copytree(run_dir / "generate", straight / "generate", ignore=shutil.ignore_patterns("ledger*"))
    run(straight)
    assert resumed == {path.name: path.read_bytes() for path in (straight / "curate").glob("*.parquet")}


@pytest.mark.slow
def test_a_verdict_is_found_again_unless_something_can_change_it(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    grade = RuleVerifier.verify

    def counted(self: RuleVerifier, answers: Sequence[tuple[Problem, str, FinishReason]]) -> Iterator[Verdict]:
        asked.append(len(answers))
        return grade(self, answers)

    def graded_again() -> int:
        shutil.rmtree(run_dir / "curate", ignore_errors=True)
        asked.clear()
        run(run_dir, current)
        return sum(asked)

    monkeypatch.setattr(RuleVerifier, "verify", counted)
    current = recipe()
    assert [graded_again(), graded_again()] == [160, 0]
    current = recipe(verify={"num_workers": 2, "timeout_s": 10})
    assert graded_again() == 0
    current = recipe(verify={"num_workers": 1, "timeout_s": 11})
    assert graded_again() == 160
    monkeypatch.setattr(kept_module, "GRADING_VERSION", kept_module.GRADING_VERSION + 1)
    assert graded_again() == 160
    path = run_dir / "generate" / "problems.parquet"
    problems = read_records(path, Problem)
    problems[0] = problems[0].model_copy(update={"metadata": {**problems[0].metadata, "more": 1}})
    write_records(path, problems, Problem)
    assert graded_again() == 4


def test_questions_of_the_evaluation_are_dropped_with_their_text(run_dir: Path) -> None:
    bench = run_dir / "bench"
    bench.mkdir()
    problems = read_records(run_dir / "generate" / "problems.parquet", Problem)
    rows = [{"problem": problem.prompt, "answer": "1"} for problem in problems[:3]]
    (bench / "math500.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    suites = {**recipe().eval.model_dump(), "suites": ["pico", "math500"]}
    assert run(run_dir, recipe(eval=suites, bench_data=str(bench))).counts["examples"] == 37
    leaks = [
        d for d in read_records(run_dir / "curate" / "dropped.parquet", DroppedTrace) if d.filter == "decontaminate"
    ]
    assert {d.problem_id for d in leaks} == {problem.id for problem in problems[:3]}
    assert all(d.detail.startswith("is the held-out question") for d in leaks)


def test_what_is_missing_or_broken_is_named(run_dir: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere/aime24\.json: missing benchmark file"):
        run(run_dir, recipe(eval={"suites": ["aime24"]}, bench_data="nowhere"))
    traces = read_records(run_dir / "generate" / "traces", Trace)
    stray = [*traces[:2], traces[2].model_copy(update={"problem_id": "nobody"})]
    write_records(run_dir / "generate" / "traces" / "part-00000.parquet", stray, Trace)
    with pytest.raises(DataError, match=r"traces: row 3: problem_id: belongs to no problem"):
        run(run_dir)
    (run_dir / "generate" / "traces" / "part-00000.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(DataError, match=r"part-00000\.parquet: not a readable Parquet file"):
        run(run_dir)
    shutil.rmtree(run_dir / "generate" / "traces")
    with pytest.raises(DataError, match=r"traces: no such file; run `potstill generate` first"):
        run(run_dir)
    assert not (run_dir / "curate").exists()


def test_shares_of_sources_that_there_are_not_are_named_before_anything_is_graded(run_dir: Path) -> None:
    with pytest.raises(RecipeError, match=r"curate\.mix\.shares: 'gsm8k' is no source of the problems"):
        run(run_dir, recipe(curate={"mix": {"shares": {"gsm8k": 1}}}))
    assert not (run_dir / "curate").exists()


def test_a_run_without_a_single_example_says_why_and_what_to_set(run_dir: Path) -> None:
    with pytest.raises(DataError) as caught:
        run(run_dir, recipe(curate={"max_tokens": 1}))
    assert str(caught.value) == (
        f"{run_dir}/curate/funnel.json: no trace is left: 80 of 160 samples are too long (raise curate.max_tokens), "
        "40 have another answer than the reference (see audit.json, or set curate.correct_only=false), "
        "40 have no \\boxed{} after the reasoning (ask for one in the problems, in teacher.prompt_suffix or in "
        "teacher.system_prompt), "
        "40 were cut off at the token limit (raise generate.sampling.max_tokens)"
    )
    assert read_manifest(run_dir / "curate") is None
    funnel = json.loads((run_dir / "curate/funnel.json").read_text())
    assert [step["out"] for step in funnel][:3] == [80, 80, 0]
    assert funnel[2]["examples"][0]["detail"].endswith("tokens")
    assert len(read_records(run_dir / "curate/dropped.parquet", DroppedTrace)) == 160
    assert run(run_dir, recipe()).counts["examples"] == 40


@pytest.mark.parametrize(
    ("text", "reason", "says"),
    [
        (
            "The answer is 5.",
            "stop",
            (r"20 of 20 samples have no \boxed{}", "20 have no closed reasoning (teacher.reasoning=plain"),
        ),
        (
            "<think>\nand so",
            "length",
            (r"20 of 20 samples have no \boxed{}", "20 were cut off at the token limit", "20 have no closed"),
        ),
        ("<think>\n1\n</think>\n\n\\boxed{5}", "stop", ("20 of 20 samples have another answer than the",)),
    ],
)
def test_the_samples_of_a_teacher_that_was_asked_amiss(
    tmp_path: Path, text: str, reason: FinishReason, says: tuple[str, ...]
) -> None:
    problems = [Problem(prompt=f"{n} + {n}?", answer=str(2 * n), grader="math", source="s") for n in range(20)]
    traces = [trace_of(problem, text, reason) for problem in problems]
    write_records(tmp_path / "generate" / "problems.parquet", problems, Problem)
    write_records(tmp_path / "generate" / "traces" / "part-00000.parquet", traces, Trace)
    with pytest.raises(DataError) as caught:
        run(tmp_path, recipe(curate={"decontaminate": False}))
    message = str(caught.value)
    assert all(said in message for said in says), message
    assert sum(message.count(word) for word in ("set ", "ask ", "raise ", "learns", "takes")) == len(says)


PLAIN = {"backend": "openai", "model": "x", "reasoning": "plain", "prompt_suffix": "Box it.", "system_prompt": "Think."}


def written_by_a_plain_teacher(run_dir: Path) -> list[Problem]:
    """Of each question one finished text, one that was cut off behind its answer, one with a tag of its own."""
    problems = [Problem(prompt=f"{n} + {n}?", answer=str(2 * n), grader="math", source="s") for n in range(20)]
    texts = [("Twice {n} is\n\n\\boxed{{{m}}}.\n", "stop"), ("So \\boxed{{{m}}}, and", "length")]
    texts.append(("<think>\nno\n</think>\n\n\\boxed{{{m}}}", "stop"))
    traces = [
        trace_of(problem, text.format(n=n, m=2 * n), reason, index)
        for n, problem in enumerate(problems)
        for index, (text, reason) in enumerate(texts)
    ]
    write_records(run_dir / "generate" / "problems.parquet", problems, Problem)
    write_records(run_dir / "generate" / "traces" / "part-00000.parquet", traces, Trace)
    return problems


@pytest.mark.parametrize("instruction", ["drop", "keep"])
def test_plain_traces_are_learned_between_the_tags_with_their_answer_behind(tmp_path: Path, instruction: str) -> None:
    problems = written_by_a_plain_teacher(tmp_path)
    settings = {"decontaminate": False, "max_repetition": None, "instruction": instruction}
    manifest = run(tmp_path, recipe(teacher=PLAIN, curate=settings))
    assert manifest.counts["funnel"][:2] == [
        {"filter": "verdict", "in": 60, "out": 60},
        {"filter": "complete_reasoning", "in": 60, "out": 20},
    ]
    examples, direct = (
        read_records(tmp_path / "curate" / f"{name}.parquet", Example) for name in ("examples", "direct")
    )
    assert examples[3].completion == "<think>\nTwice 3 is\n\n\\boxed{6}.\n</think>\n\n\\boxed{6}"
    assert direct[3].completion == "\\boxed{6}"
    kept = instruction == "keep"
    for example, problem in zip(examples, problems, strict=True):
        assert example.question == (f"{problem.prompt}\n\nBox it." if kept else problem.prompt)
        assert [(turn.role, turn.content) for turn in example.history] == ([("system", "Think.")] if kept else [])
        assert example.problem_id == problem.id
    assert [(d.question, d.history) for d in direct] == [(e.question, e.history) for e in examples]
    stored = read_records(tmp_path / "generate" / "traces", Trace)
    assert stored[9].text == "Twice 3 is\n\n\\boxed{6}.\n", "what the teacher wrote stays as it wrote it"
    reasons = [one.detail for one in read_records(tmp_path / "curate" / "dropped.parquet", DroppedTrace)]
    assert set(reasons) == {"cut off at the token limit", "has reasoning tags, and teacher.reasoning is plain"}


def test_the_form_is_made_anew_when_the_recipe_says_another(tmp_path: Path) -> None:
    written_by_a_plain_teacher(tmp_path)
    curate_ = {"decontaminate": False, "complete_reasoning": False, "max_repetition": None}
    tagged = run(tmp_path, recipe(curate=curate_))
    first = read_records(tmp_path / "curate" / "examples.parquet", Example)
    plain = run(tmp_path, recipe(teacher=PLAIN, curate=curate_))
    second = read_records(tmp_path / "curate" / "examples.parquet", Example)
    assert tagged.fingerprint != plain.fingerprint
    assert first[0].completion == "Twice 0 is\n\n\\boxed{0}.\n"
    assert second[0].completion.startswith("<think>\nTwice 0 is")
    assert first[2].completion == second[2].completion == "<think>\nno\n</think>\n\n\\boxed{0}"


def trace_of(problem: Problem, text: str, reason: FinishReason, index: int = 0) -> Trace:
    return Trace(
        key=f"{problem.id}{index}",
        problem_id=problem.id,
        sample_index=index,
        text=text,
        finish_reason=reason,
        num_prompt_tokens=9,
        num_tokens=len(text),
        teacher="t",
    )


def test_graders_that_fail_throughout_are_no_verdict(run_dir: Path) -> None:
    problems = read_records(run_dir / "generate" / "problems.parquet", Problem)
    lost = [p.model_copy(update={"metadata": {"dataset": "gone", "entry": {}}}) for p in problems]
    write_records(run_dir / "generate" / "problems.parquet", lost, Problem)
    with pytest.raises(EnvironmentFault, match="grading fails for 120 of 160 answers"):
        run(run_dir)
    assert read_manifest(run_dir / "curate" / "verify") is None


def test_the_audit_and_references_relabelled_on_request(tmp_path: Path) -> None:
    """Eight samples a question: the second reference is wrong, seven of its eight answers agree."""
    problems = [
        Problem(prompt=f"What is {n} + {n}?", answer=answer, grader="math", source="s")
        for n, answer in ((3, "6"), (4, "9"))
    ]
    written = [["6", "6.0", "x=6", "5", "6", "6", "6", "6"], ["8", "8", "8.0", "x=8", "8", "8", "7", "8"]]
    traces = [
        Trace(
            key=f"{problem.id}{index}",
            problem_id=problem.id,
            sample_index=index,
            text=f"<think>\nSample {index} adds.\n</think>\n\n\\boxed{{{answer}}}",
            finish_reason="stop",
            num_prompt_tokens=9,
            num_tokens=9,
            teacher="t",
        )
        for problem, answers in zip(problems, written, strict=True)
        for index, answer in enumerate(answers)
    ]
    write_records(tmp_path / "generate" / "problems.parquet", problems, Problem)
    write_records(tmp_path / "generate" / "traces" / "part-00000.parquet", traces, Trace)
    out = tmp_path / "curate"

    first = run(tmp_path)
    audit = json.loads((out / "audit.json").read_text())
    assert (audit["decided_by_both"], audit["disagreements"]) == (16, 0)
    (suspect,) = audit["suspected_references"]
    assert (suspect["reference"], suspect["majority"], suspect["relabelled"]) == ("9", "8", False)
    assert (suspect["num_agreeing"], suspect["num_answers"]) == (7, 8)
    assert first.counts["examples"] == 7
    assert "relabelled" not in first.counts

    second = run(tmp_path, recipe(verify={"num_workers": 1, "timeout_s": 10, "relabel": "majority"}))
    assert (second.counts["examples"], second.counts["relabelled"]) == (14, 7)
    assert json.loads((out / "funnel.json").read_text())[0]["relabelled"] == 7
    assert json.loads((out / "audit.json").read_text())["suspected_references"][0]["relabelled"]
    graded = [one for one in read_records(out / "verdicts.parquet", GradedTrace) if one.relabelled]
    assert {(one.state, one.detail) for one in graded} == {
        ("correct", "relabelled: 7 of 8 samples against the reference")
    }
    examples, direct = (read_records(out / f"{name}.parquet", Example) for name in ("examples", "direct"))
    assert [one.relabelled for one in examples] == [False] * 7 + [True] * 7
    assert [(one.completion, one.relabelled) for one in direct] == [("\\boxed{6}", False), ("\\boxed{8}", True)]
    assert run(tmp_path).counts == first.counts  # and back again, without grading anew
