"""A `Teacher` as an lm-eval language model: lm-eval asks, any backend of ours writes, our verifier grades in bulk.

lm-eval clones a request `repeats` times; each clone becomes a sample index of its own, hence a seed of its own, so that
k repeats are k distinct samples. (lm-eval's API models send one seed with every repeat, and its response cache keys on
request arguments alone: neither is used here.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from distill.progress import Progress
from distill.protocols import Teacher, Verifier
from distill.records import Completion, Sampling, TraceRequest, Verdict
from distill.teacher_facts import with_teacher_facts
from eval.tasks.processors import problem_of


class GradedResponse(str):
    """A response as lm-eval passes it about, with its verdict."""

    verdict: Verdict

    def __new__(cls, text: str, verdict: Verdict) -> GradedResponse:
        graded = super().__new__(cls, text)
        graded.verdict = verdict
        return graded


@dataclass(frozen=True)
class Sample:
    """One answer with its verdict: a row of samples.parquet."""

    suite: str
    completion: Completion
    verdict: Verdict


class PotstillLM(LM):
    """`samples` fills in the order of lm-eval's requests. A prompt is the user's message: backends apply templates."""

    def __init__(self, model: Teacher, verifier: Verifier, *, seed: int, progress: Progress, title: str) -> None:
        super().__init__()
        self._model, self._verifier, self._seed = model, verifier, seed
        self._progress, self._title = progress, title
        self.samples: list[Sample] = []

    def generate_until(self, requests: list[Instance]) -> list[str]:
        num_seen: Counter[str] = Counter()
        traces: list[TraceRequest] = []
        for instance in requests:
            problem = problem_of(instance.doc, prompt=instance.args[0])
            # Counted by problem, not by document: a question that occurs twice gets new samples the second time.
            traces.append(TraceRequest(problem=problem, sample_index=num_seen[problem.id]))
            num_seen[problem.id] += 1
        completions = self._generate(traces, _sampling(requests[0].args[1], self._seed))
        verdicts = self._verifier.verify([(c.request.problem, c.text, c.finish_reason) for c in completions])
        graded = []
        with self._progress.task(f"grade {self._title}", len(completions), unit="answers") as task:
            for instance, completion, verdict in zip(requests, completions, verdicts, strict=True):
                self.samples.append(Sample(instance.task_name or "", completion, verdict))
                graded.append(GradedResponse(completion.text, verdict))
                task.advance()
        return graded

    def _generate(self, traces: Sequence[TraceRequest], sampling: Sampling) -> list[Completion]:
        """Completions in the order of `traces`, whatever order the backend finishes them in."""
        done: dict[tuple[str, int], Completion] = {}
        with (
            self._progress.task(self._title, len(traces), unit="samples") as plain,
            with_teacher_facts(plain, self._model) as task,
        ):
            for completion in self._model.generate(traces, sampling):
                done[completion.request.problem.id, completion.request.sample_index] = completion
                task.advance()
        return [done[trace.problem.id, trace.sample_index] for trace in traces]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("these suites generate; a Teacher gives no likelihoods")

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        raise NotImplementedError("these suites generate; a Teacher gives no likelihoods")


def _sampling(arguments: dict[str, object], seed: int) -> Sampling:
    """lm-eval's generation arguments as ours."""
    greedy = not arguments.get("do_sample", True)
    return Sampling(
        temperature=0.0 if greedy else arguments["temperature"],
        top_p=arguments.get("top_p", 1.0),
        max_tokens=arguments["max_gen_toks"],
        seed=seed,
    )
