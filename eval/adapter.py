"""A `Teacher` as an lm-eval language model: lm-eval asks, any backend of ours writes, our verifier grades in bulk
(`eval.answers`).

lm-eval clones a request `repeats` times; each clone becomes a sample index of its own, hence a seed of its own, so that
k repeats are k distinct samples. (lm-eval's API models send one seed with every repeat, and its response cache keys on
request arguments alone: neither is used here.)
"""

from __future__ import annotations

from collections import Counter

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from distill.records import Sampling, TraceRequest, Verdict
from eval.answers import Answer, KeptAnswers
from eval.tasks.processors import problem_of


class GradedResponse(str):
    """A response as lm-eval passes it about, with its verdict."""

    verdict: Verdict

    def __new__(cls, text: str, verdict: Verdict) -> GradedResponse:
        graded = super().__new__(cls, text)
        graded.verdict = verdict
        return graded


class PotstillLM(LM):
    """`answers` fills in the order of lm-eval's requests. A prompt is the user's message: backends apply templates."""

    def __init__(self, kept: KeptAnswers, *, seed: int, title: str) -> None:
        super().__init__()
        self._kept, self._seed, self._title = kept, seed, title
        self.answers: list[Answer] = []

    def generate_until(self, requests: list[Instance]) -> list[str]:
        num_seen: Counter[str] = Counter()
        traces: list[TraceRequest] = []
        for instance in requests:
            problem = problem_of(instance.doc, prompt=instance.args[0])
            # Counted by problem, not by document: a question that occurs twice gets new samples the second time.
            traces.append(TraceRequest(problem=problem, sample_index=num_seen[problem.id]))
            num_seen[problem.id] += 1
        answers = self._kept.of(traces, _sampling(requests[0].args[1], self._seed), self._title)
        self.answers += answers
        return [GradedResponse(answer.trace.text, answer.verdict) for answer in answers]

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
