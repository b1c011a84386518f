"""Synthesise: seeds and a teacher to new questions with references, as a stage within `generate`.

    R/generate/ledger.sqlite     what the teacher wrote: questions, and the samples that answer them (the votes)
    R/generate/questions/NAME/
      problems.parquet           the questions that are kept, in the order in which they were asked for
      funnel.json                what each filter let through, with examples of what it did not
      dropped.parquet            every question that was written and is not kept: filter and detail

Each question is one request; what it gives is read, screened, answered `num_votes` times and kept where enough answers
agree. What is asked for is a fixed row of attempts (`distill.synthesis.plan`), gone through in rounds until `count` are
kept: a run that was killed, or that wants more questions than before, asks only for what the ledger lacks. The votes
are ordinary samples of the question, under the keys that `generate` looks for, so none is asked for a second time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from distill.benchmarks import bench_folder, hub_identities
from distill.errors import DataError
from distill.ledger import Ledger
from distill.manifest import StageRun, write_atomically
from distill.problems import benchmark_parts, iterate_problems, source_files
from distill.problems.packed import PackedProblems
from distill.protocols import Teacher, Verifier
from distill.recipe import Recipe, SynthesisedSource
from distill.records import Problem, Sampling, StageManifest, Trace
from distill.synthesis import PROMPTS_ID, Attempt, Screen, WritingPlan, agreements, read_question
from distill.synthesis.agreement import Agreement, enough
from distill.synthesis.funnel import DroppedQuestion, QuestionFunnel
from distill.tables import RecordWriter, record_writer
from distill.verify import open_verifier
from distill.verify.extract import answer_of, bare_answer
from distill.verify.kept import grading_settings
from distill.wanted import Place, Requests
from eval.suites import parts_asked
from pipelines.asking import Asker
from pipelines.context import Context
from pipelines.preemption import preemptible
from pipelines.stages.curate import held_out_questions
from pipelines.teachers import teacher_folder

QUESTIONS = "questions"
PROBLEMS, FUNNEL, DROPPED = "problems.parquet", "funnel.json", "dropped.parquet"
QUESTIONS_A_PART = 512  # read, or counted, at a time
SPARE = 1.1  # of a round, over what the rounds before it let expect
MOST_GROWTH = 2  # a round is at most so many times all before it


def synthesise(
    source: SynthesisedSource,
    recipe: Recipe,
    out_dir: Path,
    context: Context,
    open_teacher: Callable[[], AbstractContextManager[Teacher]],
) -> StageManifest:
    """Run the stage for one source, in `out_dir`/questions/NAME, with the ledger of `out_dir`.

    Raises DataError where there are no seeds, and where not one question is kept (the funnel is written then too).
    """
    base_dir, folder = context.base_dir, out_dir / QUESTIONS / source.name
    bench_data = bench_folder(recipe.bench_data, base_dir)
    inputs = source_files([source], base_dir=base_dir, bench_data=bench_data)
    held_out = held_out_questions(recipe, base_dir, inputs)
    if (weights := teacher_folder(source.teacher or recipe.teacher, base_dir)) is not None:
        inputs["teacher"] = weights
    sampling = source.vote_sampling or recipe.generate.sampling
    config = {
        "source": source.model_dump(mode="json"),
        "teacher": (source.teacher or recipe.teacher).identity(),
        "votes": sampling.content(),
        "prompts": PROMPTS_ID,
        "verify": grading_settings(recipe.verify.model_copy(update={"judge": None})),
        "min_containment": recipe.curate.min_containment,
        "eval": recipe.eval.asked_of_all,
        **hub_identities([*benchmark_parts([source]), *parts_asked(recipe.eval)], bench_data),
    }
    stage_run = StageRun("synthesise", inputs, config, folder)
    if (done := stage_run.current()) is not None:
        return done
    seeds = list(iterate_problems(source.seeds, base_dir=base_dir, limits=recipe.limits, bench_data=bench_data))
    screen = Screen(held_out(), seeds, min_containment=recipe.curate.min_containment)
    plan = WritingPlan(source, (seed for seed in seeds if screen.of_evaluation(seed) is None))
    if not len(plan.seeds):
        raise DataError("every seed is a question of the evaluation", where="recipe", field=f"problems: {source.name}")

    def body() -> Mapping[str, Any]:
        for path in folder.glob(".*.tmp"):
            path.unlink()  # a killed run's
        with (
            preemptible(),
            open_teacher() as teacher,
            Ledger.open(out_dir / "ledger.sqlite") as ledger,
            open_verifier(recipe.verify) as verifier,
            record_writer(folder / PROBLEMS, Problem) as kept,
            record_writer(folder / DROPPED, DroppedQuestion) as dropped,
        ):
            work = Synthesis(source, plan, screen, teacher, sampling, verifier, Writers(ledger, kept, dropped), context)
            work.run()
        write_atomically(folder / FUNNEL, json.dumps(work.funnel.with_examples(), indent=2) + "\n")
        if not work.funnel.num_kept:
            raise DataError(f"no question is left: {work.funnel.why()}", where=folder / FUNNEL)
        seeds_left = {"seeds": len(plan.seeds), "contaminated_seeds": len(PackedProblems(seeds)) - len(plan.seeds)}
        return {**seeds_left, **work.counts(), "wanted": source.count}

    return stage_run.run(body, (PROBLEMS, FUNNEL, DROPPED))


class Writers(NamedTuple):
    """Where things go: samples, questions that are kept, and those that are not."""

    ledger: Ledger
    kept: RecordWriter[Problem]
    dropped: RecordWriter[DroppedQuestion]


class Screened(NamedTuple):
    """A question that is worth answers, and what asked for it."""

    problem: Problem
    attempt: Attempt
    key: str


class Synthesis:
    """The work of one source, round by round; `funnel` tells what came of it."""

    def __init__(
        self,
        source: SynthesisedSource,
        plan: WritingPlan,
        screen: Screen,
        teacher: Teacher,
        vote_sampling: Sampling,
        verifier: Verifier,
        writers: Writers,
        context: Context,
    ) -> None:
        self.funnel = QuestionFunnel()
        self.reused = self.num_votes = 0
        self._source = source
        self._plan = plan
        self._screen = screen
        self._teacher = teacher
        self._vote_sampling = vote_sampling
        self._verifier = verifier
        self._writers = writers
        self._progress = context.progress

    def run(self) -> None:
        """Go on until `count` questions are kept, or the most that may be are asked for."""
        asked = number = 0
        while self.funnel.num_kept < self._source.count and asked < self._source.most_asked:
            number += 1
            end = next_end(self._source, asked, self.funnel.num_kept)
            screened = list(self._written(asked, end, number))
            for question, agreement, keeps_answer in self._voted(screened, number):
                self._decide(question, agreement, keeps_answer=keeps_answer)
            asked = end

    def counts(self) -> dict[str, Any]:
        return {**self.funnel.counts(), "votes": self.num_votes, "reused": self.reused}

    def _written(self, begin: int, end: int, number: int) -> Iterator[Screened]:
        """Have the questions of a round written, and yield those that can be read and are new."""
        attempts = list(self._plan.attempts(begin, end))
        places: list[Place] = []
        numbers: dict[str, int] = {}

        def problems() -> Iterator[Problem]:
            for attempt in attempts:
                problem = attempt.problem()
                places.append((numbers.setdefault(problem.id, len(numbers)), attempt.turn))
                yield problem

        asker = self._asker(PackedProblems(problems()), self._source.sampling)
        asker.complete(Requests(asker.wanted.problems, places), f"write questions, round {number}")
        self.reused += asker.reused
        for start in range(0, len(places), QUESTIONS_A_PART):
            part = slice(start, start + QUESTIONS_A_PART)
            for attempt, trace in zip(attempts[part], asker.traces(places[part]), strict=True):
                if (question := self._screened(attempt, trace)) is not None:
                    yield question

    def _screened(self, attempt: Attempt, trace: Trace) -> Screened | None:
        self.funnel.ask(attempt.mode)
        text, why = read_question(trace.text, trace.finish_reason)
        if text is None:
            self._drop(attempt, trace.key, "readable", why, trace.text)
            return None
        problem = Problem(prompt=text, answer=None, grader="math", source=self._source.name)
        if (fault := self._screen.drop(problem, attempt)) is not None:
            self._drop(attempt, trace.key, *fault, text)
            return None
        return Screened(problem, attempt, trace.key)

    def _voted(self, screened: Sequence[Screened], number: int) -> Iterator[tuple[Screened, Agreement, bool]]:
        """Have the questions answered, and yield each with the answer that most samples give, and `_keep_answers`."""
        num_votes = self._source.num_votes
        asker = self._asker(PackedProblems(question.problem for question in screened), self._vote_sampling)
        places = ((place, vote) for place in range(len(screened)) for vote in range(num_votes))
        asker.complete(Requests(asker.wanted.problems, places), f"answer them, round {number}")
        self.reused += asker.reused
        self.num_votes += len(screened) * num_votes
        for start in range(0, len(screened), QUESTIONS_A_PART):
            part = screened[start : start + QUESTIONS_A_PART]
            traces = asker.traces([(start + place, vote) for place in range(len(part)) for vote in range(num_votes)])
            votes = [[_answer(trace) for trace in islice(traces, num_votes)] for _ in part]
            ballots = [(question.problem, of_question) for question, of_question in zip(part, votes, strict=True)]
            agreed = agreements(ballots, self._source.min_agreement, self._verifier)
            yield from zip(part, agreed, self._keep_answers(part, agreed), strict=True)

    def _decide(self, question: Screened, agreement: Agreement, *, keeps_answer: bool) -> None:
        """Keep the question, or drop it."""
        problem, attempt, key = question
        source = self._source
        if agreement.num_agreeing < enough(source.num_votes, source.min_agreement):
            self._drop(attempt, key, "agreement", agreement.in_words, problem.prompt)
        elif not keeps_answer:
            detail = f"{agreement.answer!r} is not the seed's {attempt.seed.answer!r}"
            self._drop(attempt, key, "same_answer", detail, problem.prompt)
        elif self.funnel.num_kept == source.count:
            self._drop(attempt, key, "count", f"{source.count} are enough", problem.prompt)
        else:
            votes = {"seed": attempt.seed.id, "mode": attempt.mode, "of": agreement.num_votes}
            votes["agreeing"] = agreement.num_agreeing
            self.funnel.keep(attempt.mode)
            self._writers.kept.write(
                problem.model_copy(update={"answer": agreement.answer, "metadata": {"votes": votes}})
            )

    def _keep_answers(self, part: Sequence[Screened], agreed: Sequence[Agreement]) -> Iterator[bool]:
        """Is the answer the seed's, where it must be: of a seed in other words that has a reference?"""
        compared = [
            question.attempt.mode == "rephrased" and question.attempt.seed.answer is not None and agreement.num_agreeing
            for question, agreement in zip(part, agreed, strict=True)
        ]
        verdicts = self._verifier.verify(
            [
                (
                    question.problem.model_copy(update={"answer": question.attempt.seed.answer}),
                    bare_answer(agreement.answer, "math"),
                    "stop",
                )
                for question, agreement, is_compared in zip(part, agreed, compared, strict=True)
                if is_compared
            ]
        )
        return (not is_compared or next(verdicts).correct for is_compared in compared)

    def _drop(self, attempt: Attempt, key: str, filter_: str, detail: str, text: str) -> None:
        one = DroppedQuestion(
            key=key, seed_id=attempt.seed.id, mode=attempt.mode, filter=filter_, detail=detail, text=text
        )
        self._writers.dropped.write(one)
        self.funnel.drop(one, attempt.seed.prompt)

    def _asker(self, problems: PackedProblems, sampling: Sampling) -> Asker:
        return Asker(problems, self._teacher, sampling, self._writers.ledger, self._progress)


def next_end(source: SynthesisedSource, asked: int, kept: int) -> int:
    """How many are asked for in all after the next round, given what came of the rounds before it."""
    if not asked:
        return min(source.count, source.most_asked)
    expected = math.ceil(SPARE * (source.count - kept) * asked / max(kept, 1))
    return min(asked + min(expected, MOST_GROWTH * asked), source.most_asked)


def _answer(trace: Trace) -> str | None:
    return answer_of(trace.text, "math") if trace.finish_reason == "stop" else None
