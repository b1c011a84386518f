"""Generation that is stopped in every way and goes on: the same traces, each asked for once."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from distill.errors import CheckpointError, DataError, EnvironmentFault, Preempted, RecipeError
from distill.ledger import Ledger
from distill.manifest import read_manifest
from distill.recipe import Recipe
from distill.records import Completion, Problem, Sampling, TeacherIdentity, Trace, TraceRequest
from distill.tables import read_records
from pipelines.asking import FLUSH_SAMPLES
from pipelines.context import Context
from pipelines.stages.generate import generate
from tests.repository import REPOSITORY

IDENTITY = TeacherIdentity(name="sums", weights="w", template="t", backend="test", backend_version="1")


class SumTeacher:
    """Writes what its request says, in an order of its own; `on_sample` sees each sample before it is handed over."""

    def __init__(
        self, *, identity: TeacherIdentity = IDENTITY, seed: int = 0, on_sample: Callable[[int], None] = lambda n: None
    ) -> None:
        self.identity = identity
        self.asked: list[TraceRequest] = []
        self.closed = 0
        self._order = random.Random(seed)
        self._on_sample = on_sample

    def generate(self, requests: Sequence[TraceRequest], sampling: Sampling) -> Iterator[Completion]:
        for number, request in enumerate(self._order.sample(list(requests), len(requests))):
            self._on_sample(number)
            self.asked.append(request)
            text = f"<think>\n{request.seed(sampling)}\n</think>\n\n\\boxed{{{request.problem.answer}}}"
            reason = "length" if request.sample_index == 3 else "stop"
            yield Completion(request=request, text=text, finish_reason=reason, num_prompt_tokens=5, num_tokens=7)

    def close(self) -> None:
        self.closed += 1


def recipe(num_samples: int = 2, count: int = 100, **teacher: Any) -> Recipe:
    tree = {
        "name": "t",
        "problems": [{"kind": "reasoning_gym", "families": {"gcd": {}, "products": {}}, "count": count}],
        "teacher": {"backend": "openai", "model": "sums", **teacher},
        "generate": {"num_samples": num_samples, "grade": False},
        "distill": {"students": ["x"]},
        "eval": {"held_out": {"families": {"gcd": {}}, "count": 9, "split": "held_out"}},
    }
    return Recipe.model_validate(tree)


def local_recipe(folder: Path) -> Recipe:
    """The same without reasoning-gym, which takes a child process seconds to import."""
    (folder / "p.jsonl").write_text("".join(f'{{"prompt": "{n} + 1?", "answer": {n + 1}}}\n' for n in range(100)))
    return Recipe.model_validate({**recipe().model_dump(), "problems": [{"kind": "local", "path": "p.jsonl"}]})


def run(run_dir: Path, teacher: SumTeacher, what: Recipe | None = None) -> Any:
    context = Context(run_dir.parent, open_teacher=lambda config: teacher)
    return generate(what or recipe(), run_dir, context)


def test_traces_follow_the_order_of_problems_and_indices(tmp_path: Path) -> None:
    teacher = SumTeacher()
    manifest = run(tmp_path / "g", teacher)
    problems = read_records(tmp_path / "g/generate" / "problems.parquet", Problem)
    traces = read_records(tmp_path / "g/generate" / "traces", Trace)
    assert len(problems) == 100
    assert [(t.problem_id, t.sample_index) for t in traces] == [(p.id, i) for p in problems for i in range(2)]
    assert len({t.text for t in traces}) == len({t.key for t in traces}) == 200
    assert manifest.counts == {
        **{"problems": 100, "samples": 200, "reused": 0, "tokens": 1400, "truncated": 0, "no_answer": 0},
        "samples_per_problem": {"2": 100},
        "identity": IDENTITY.model_dump(),
    }
    assert teacher.closed == 1


def test_the_second_run_does_nothing_and_opens_no_teacher(tmp_path: Path) -> None:
    first = run(tmp_path / "g", SumTeacher())
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "g/generate").iterdir()}

    def refuse(config: object) -> SumTeacher:
        raise AssertionError("the teacher is not needed")

    faster = recipe(max_concurrency=3, timeout_s=5)
    assert generate(faster, tmp_path / "g", Context(tmp_path, open_teacher=refuse)) == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "g/generate").iterdir()} == stamps


def test_the_cost_is_that_of_the_samples_however_often_it_was_resumed(tmp_path: Path) -> None:
    prices = {"price_per_million_prompt_tokens": 1e5, "price_per_million_completion_tokens": 1e6}
    assert "cost" not in run(tmp_path / "free", SumTeacher(), recipe(2, 20)).counts
    with pytest.raises(EnvironmentFault):
        run(tmp_path / "g", SumTeacher(on_sample=stop_with(EnvironmentFault, 15)), recipe(2, 20, **prices))
    counts = run(tmp_path / "g", SumTeacher(), recipe(2, 20, **prices)).counts
    assert counts["cost"] == pytest.approx(40 * (5 * 0.1 + 7 * 1.0))
    assert run(tmp_path / "g", SumTeacher(), recipe(2, 20)).counts == counts, "prices ask for nothing again"


def test_topping_up_asks_for_the_new_samples_alone(tmp_path: Path) -> None:
    run(tmp_path / "g", SumTeacher(), recipe(4, 20))
    more = SumTeacher()
    manifest = run(tmp_path / "g", more, recipe(16, 20))
    assert len(more.asked) == 12 * 20
    assert min(request.sample_index for request in more.asked) == 4
    assert (manifest.counts["reused"], manifest.counts["samples"], manifest.counts["truncated"]) == (80, 320, 20)
    fewer = SumTeacher()
    assert run(tmp_path / "g", fewer, recipe(2, 10)).counts["samples"] == 20
    assert not fewer.asked


def test_another_teacher_is_asked_for_everything(tmp_path: Path) -> None:
    run(tmp_path / "g", SumTeacher())
    other = SumTeacher(identity=IDENTITY.model_copy(update={"backend_version": "2"}))
    run(tmp_path / "g", other, recipe(revision="two"))
    assert len(other.asked) == 200
    with Ledger.open(tmp_path / "g/generate" / "ledger.sqlite") as ledger:
        assert len(ledger) == 400


def stop_with(error: type[BaseException], at: int) -> Callable[[int], None]:
    def stop(number: int) -> None:
        if number == at:
            raise error("stopped")

    return stop


@settings(max_examples=8, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 120), st.sampled_from([KeyboardInterrupt, Preempted, EnvironmentFault]))))
def test_any_interruptions_leave_the_same_bytes_and_ask_nothing_twice(
    tmp_path_factory: pytest.TempPathFactory, stops: list[tuple[int, type[BaseException]]]
) -> None:
    folder = tmp_path_factory.mktemp("g")
    run(folder / "straight", SumTeacher(), recipe(2, 60))
    asked: list[tuple[str, int]] = []
    for turn, (at, error) in enumerate([*stops, (10_000, KeyboardInterrupt)]):
        teacher = SumTeacher(seed=turn, on_sample=stop_with(error, at))
        expected: AbstractContextManager[Any] = nullcontext()
        if at < 120 - len(asked):
            expected = pytest.raises(error)
        with expected:
            run(folder / "stopped", teacher, recipe(2, 60))
        asked += [(request.problem.id, request.sample_index) for request in teacher.asked]
        done = read_manifest(folder / "stopped/generate")
        assert (done is not None) == (len(asked) == 120)
    assert len(asked) == len(set(asked)) == 120
    for name in ("traces/part-00000.parquet", "problems.parquet"):
        assert (folder / "stopped/generate" / name).read_bytes() == (folder / "straight/generate" / name).read_bytes()


CHILD = """
    import signal, sys, time
    from pathlib import Path
    from tests.pipelines.test_stage_generate import SumTeacher, run, local_recipe
    def wait(number):
        if number == int(sys.argv[3]):
            print("waiting", flush=True)
            time.sleep(600)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background hands on that it is ignored
    try:
        run_dir = Path(sys.argv[1])
        run(run_dir, SumTeacher(seed=int(sys.argv[2]), on_sample=wait), local_recipe(run_dir.parent))
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as exc:
        print(exc)
        sys.exit(exc.exit_code)
"""


def start(run_dir: Path, seed: int, at: int) -> subprocess.Popen[str]:
    """A run whose teacher has handed `at` samples over and hangs at the next one, after a line that says so."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(CHILD), str(run_dir), str(seed), str(at)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )


@pytest.mark.timeout(120)
@pytest.mark.slow
def test_signals_leave_a_run_that_goes_on(tmp_path: Path) -> None:
    """Ctrl-C and SIGTERM keep all that had arrived; SIGKILL at most loses what had come since the last flush."""
    expected = 0
    for seed, (number, code, at, kept) in enumerate(
        [
            (signal.SIGINT, 130, 10, 10),
            (signal.SIGTERM, 75, 20, 20),
            (signal.SIGKILL, -9, FLUSH_SAMPLES - 1, 0),
            (signal.SIGKILL, -9, FLUSH_SAMPLES + 1, FLUSH_SAMPLES),
        ]
    ):
        child = start(tmp_path / "g", seed, at)
        assert child.stdout is not None
        assert child.stdout.readline() == "waiting\n"
        child.send_signal(number)
        out = child.stdout.read()
        assert child.wait() == code
        assert ("stopped by SIGTERM" in out) == (number == signal.SIGTERM)
        assert read_manifest(tmp_path / "g/generate") is None
        expected += kept
        with Ledger.open(tmp_path / "g/generate" / "ledger.sqlite") as ledger:
            # What comes slowly is flushed by time as well, so on a machine that crawls a kill loses less.
            assert expected <= len(ledger) <= expected + (at - kept if number == signal.SIGKILL else 0)
            expected = len(ledger)
    teacher = SumTeacher()
    manifest = run(tmp_path / "g", teacher, local_recipe(tmp_path))
    assert manifest.counts["reused"] == 200 - len(teacher.asked) == expected
    run(tmp_path / "straight", SumTeacher(), local_recipe(tmp_path))
    for name in ("traces/part-00000.parquet", "problems.parquet"):
        assert (tmp_path / "g/generate" / name).read_bytes() == (tmp_path / "straight/generate" / name).read_bytes()


def test_a_teacher_that_leaves_samples_out_is_not_complete(tmp_path: Path) -> None:
    class Lazy(SumTeacher):
        def generate(self, requests: Sequence[TraceRequest], sampling: Sampling) -> Iterator[Completion]:
            yield from super().generate(requests[:-3], sampling)

    with pytest.raises(EnvironmentFault, match="left 3 samples out"):
        run(tmp_path / "g", Lazy())
    assert read_manifest(tmp_path / "g/generate") is None


def test_a_full_disk_is_exit_three_and_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(EnvironmentFault, match="No space left") as caught:
            run(tmp_path / "g", SumTeacher())
    assert caught.value.exit_code == 3
    assert not list((tmp_path / "g/generate").glob("*.parquet"))
    assert run(tmp_path / "g", SumTeacher()).counts["samples"] == 200


def test_bad_inputs_write_nothing(tmp_path: Path) -> None:
    tree = recipe().model_dump()
    native = Recipe.model_validate({**tree, "teacher": {"backend": "native", "model": "nowhere"}})
    with pytest.raises(CheckpointError, match=r"nowhere: teacher\.model: no such checkpoint folder"):
        run(tmp_path / "g", SumTeacher(), native)
    (tmp_path / "p.jsonl").write_text('{"prompt": ')
    torn = Recipe.model_validate({**tree, "problems": [{"kind": "local", "path": "p.jsonl"}]})
    with pytest.raises(DataError, match=r"p\.jsonl:1: not a JSON line"):
        run(tmp_path / "g", SumTeacher(), torn)
    assert not (tmp_path / "g").exists()


def test_questions_that_spell_special_tokens_are_refused_by_choice(tmp_path: Path) -> None:
    questions = ["1 + 1?", "What does <|eos|> do?"]
    (tmp_path / "p.jsonl").write_text("".join(f"{json.dumps({'prompt': q, 'answer': '2'})}\n" for q in questions))
    tree = {**recipe().model_dump(), "problems": [{"kind": "local", "path": str(tmp_path / "p.jsonl")}]}
    tree["generate"] = {"special_tokens_in_text": "refuse", "grade": False}
    native = {"backend": "native", "model": str(REPOSITORY / "teacher" / "pico")}
    with pytest.raises(DataError, match=r"prompt 'What does <\|eos\|> do\?': spells out the special token '<\|eos\|>'"):
        run(tmp_path / "g", SumTeacher(), Recipe.model_validate({**tree, "teacher": native}))
    with pytest.raises(RecipeError, match=r"generate\.special_tokens_in_text: refuse: needs a teacher whose folder is"):
        run(tmp_path / "g", SumTeacher(), Recipe.model_validate(tree))
    assert not (tmp_path / "g").exists()
    asked = Recipe.model_validate({**tree, "teacher": native, "generate": {"grade": False}})
    assert run(tmp_path / "g", SumTeacher(), asked).counts["samples"] == 2
