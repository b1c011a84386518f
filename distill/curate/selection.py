"""Filters that compare samples with one another: difficulty, duplicates, the best of a problem, the mix of sources.

Each is a function from the samples that are left to the reasons (by position) why some of them go. None looks at the
order in which the samples stand: where one of several has to go, `Sample.precedence` decides.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

from distill.curate.candidates import Sample
from distill.recipe import BestOfN, Difficulty
from distill.records import Verdict

NO_VERDICT = ("timeout", "infra_error")  # failures of ours say nothing of the problem

Reasons = dict[int, str]
SetFilter = Callable[[Sequence[Sample]], Reasons]


class PassRates:
    """Pass rates of the problems, over all samples that were graded, also those that other filters drop."""

    def __init__(self) -> None:
        self._correct: Counter[str] = Counter()
        self._graded: Counter[str] = Counter()

    def add(self, problem_id: str, verdict: Verdict) -> None:
        if verdict.state not in NO_VERDICT:
            self._graded[problem_id] += 1
            self._correct[problem_id] += verdict.correct

    def of(self, problem_id: str) -> tuple[int, int]:
        """Correct samples, graded samples."""
        return self._correct[problem_id], self._graded[problem_id]


def outside_difficulty(bounds: Difficulty, rates: PassRates) -> SetFilter:
    """Problems whose pass rate is not within the bounds, both inclusive, go with all their samples."""

    def reasons(samples: Sequence[Sample]) -> Reasons:
        found = {}
        for sample in samples:
            correct, graded = rates.of(sample.problem_id)
            if not graded:
                found[sample.position] = "no sample of the problem could be graded"
            elif not bounds.min_pass_rate <= correct / graded <= bounds.max_pass_rate:
                found[sample.position] = f"{correct} of {graded} samples are correct"
        return found

    return reasons


def duplicates(samples: Sequence[Sample]) -> Reasons:
    """Samples with the question and the text of one that has precedence."""
    first: dict[bytes, Sample] = {}
    for sample in samples:
        if sample.digest not in first or sample.precedence < first[sample.digest].precedence:
            first[sample.digest] = sample
    return {
        sample.position: f"the same as sample {first[sample.digest].key}"
        for sample in samples
        if first[sample.digest] is not sample
    }


def not_best(choice: BestOfN) -> SetFilter:
    """All but the `keep` shortest or longest correct samples of each problem, in teacher tokens."""
    sign = 1 if choice.by == "shortest" else -1

    def rank(sample: Sample) -> tuple[int, int, str]:
        return sign * sample.num_tokens, *sample.precedence

    def reasons(samples: Sequence[Sample]) -> Reasons:
        found = {sample.position: "not correct" for sample in samples if not sample.correct}
        for of_problem in _by_problem(sample for sample in samples if sample.correct).values():
            ranked = sorted(of_problem, key=rank)
            for place, sample in enumerate(ranked[choice.keep :], start=choice.keep + 1):
                found[sample.position] = f"{sample.num_tokens} tokens, number {place} of {len(ranked)} by length"
        return found

    return reasons


def beyond(max_per_problem: int) -> SetFilter:
    """Return the samples that a problem has over `max_per_problem`."""

    def reasons(samples: Sequence[Sample]) -> Reasons:
        return {
            sample.position: f"{max_per_problem} are enough"
            for of_problem in _by_problem(samples).values()
            for sample in sorted(of_problem, key=lambda sample: sample.precedence)[max_per_problem:]
        }

    return reasons


def _by_problem(samples: Iterable[Sample]) -> Mapping[str, list[Sample]]:
    groups: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        groups[sample.problem_id].append(sample)
    return groups
