"""How often the 95% intervals hold the truth, and how often a model is called different from itself.

    python -m benchmarks.coverage [--evaluations 1000] [--families 2000]

Evaluations are simulated: questions with a difficulty of their own, k samples each, and the intervals are those of
`eval.statistics` and `eval.bootstrap`, as a run computes them. Regimes that no interval from 30 questions can serve,
one answer in twenty right, are in the table with the others. A minute or two on one core; results go to
benchmarks/results/<device>/coverage.json.
"""

from __future__ import annotations

import argparse
import datetime
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from benchmarks.device import device_name, write_result
from eval.bootstrap import bootstrap_interval
from eval.statistics import Difference, holm, mean_estimate, paired_difference

SIZES = (30, 198, 500)
SAMPLES = (1, 16)
RATES = (0.05, 0.1, 0.3, 0.5, 0.9, 0.95)
BOOTSTRAPPED = 200  # questions at most: enough to compare
NUM_SUITES = 10


@dataclass(frozen=True)
class Questions:
    """Questions that are answered rightly with a chance of their own: logit-normal around `centre`.

    `spread` is the standard deviation over questions, `own` that of each model about what is common to both, `gain` the
    shift of the first model against the second; all in logits.
    """

    centre: float
    spread: float = 1.5
    own: float = 0.5
    gain: float = 0.0

    def chances(self, rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        common = rng.normal(np.log(self.centre / (1 - self.centre)), self.spread, count)
        first, second = (common + rng.normal(0, self.own, count) for _ in range(2))
        return _expit(first + self.gain), _expit(second)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluations", type=int, default=1_000, help="of each regime")
    parser.add_argument("--families", type=int, default=2_000, help="of a model against itself, and of ten suites")
    asked = parser.parse_args()
    started = time.process_time()
    rows = []
    for row in coverage(asked.evaluations):
        rows.append(row)
        print(row)
    itself = [called_different(asked.families, size, samples) for size in SIZES for samples in SAMPLES]
    families = [families_with_a_rejection(asked.families, size, samples) for size in SIZES for samples in SAMPLES]
    result = {
        "device": device_name(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "evaluations": asked.evaluations,
        "coverage": rows,
        "a_model_against_itself": itself,
        "families_of_ten_suites": families,
        "cpu_seconds": round(time.process_time() - started, 1),
    }
    for row in (*itself, *families):
        print(row)
    print(write_result("coverage", result))


def coverage(
    evaluations: int, sizes: Sequence[int] = SIZES, samples: Sequence[int] = SAMPLES, rates: Sequence[float] = RATES
) -> Iterator[dict[str, Any]]:
    """Percent of the intervals that hold the truth, by the number of questions and samples and the share right."""
    for num_questions in sizes:
        for k in samples:
            for rate in rates:
                rng = np.random.default_rng([num_questions, k, round(1000 * rate)])
                seen = [_evaluation(rng, num_questions, k, rate) for _ in range(evaluations)]
                shares = {name: round(100 * float(np.mean([one[name] for one in seen])), 1) for name in seen[0]}
                yield {"num_questions": num_questions, "samples": k, "rate": rate, **shares}


def _evaluation(rng: np.random.Generator, num_questions: int, k: int, rate: float) -> dict[str, bool]:
    """One evaluation of two models: does each interval hold what it estimates?"""
    apart = Questions(_centre(rate), gain=1.0 if rate < 0.5 else -1.0)
    alike = Questions(_centre(rate))
    values = _means(rng, alike.chances(rng, num_questions)[1], k)
    held = {"mean": _holds(mean_estimate(values.tolist(), k * num_questions).ci95, rate)}
    if num_questions <= BOOTSTRAPPED:
        held["mean_bootstrap"] = _holds(bootstrap_interval(values.tolist()), rate)
    for name, questions in (("paired_no_gain", alike), ("paired_gain", apart)):
        truth = _rates(questions)[0] - _rates(questions)[1]
        held[name] = _holds(_compared(rng, questions, num_questions, k).ci95, truth)
    return held


def called_different(evaluations: int, num_questions: int, k: int) -> dict[str, Any]:
    """Percent of the evaluations in which a model is called different from itself."""
    rng = np.random.default_rng([num_questions, k])
    clear = [_itself(rng, num_questions, k).clear for _ in range(evaluations)]
    return {"num_questions": num_questions, "samples": k, "percent": round(100 * float(np.mean(clear)), 2)}


def families_with_a_rejection(families: int, num_questions: int, k: int) -> dict[str, Any]:
    """Percent of families of ten suites in which some difference is called clear though there is none."""
    rng = np.random.default_rng([num_questions, k, NUM_SUITES])
    found = [
        any(one.clear for one in holm([_itself(rng, num_questions, k) for _ in range(NUM_SUITES)]))
        for _ in range(families)
    ]
    return {"num_questions": num_questions, "samples": k, "percent": round(100 * float(np.mean(found)), 2)}


def _itself(rng: np.random.Generator, num_questions: int, k: int) -> Difference:
    """One model twice, at any level of ability."""
    centre = float(rng.uniform(0.05, 0.95))
    return _compared(rng, Questions(centre, own=0.0), num_questions, k)


def _compared(rng: np.random.Generator, questions: Questions, num_questions: int, k: int) -> Difference:
    a, b = (_means(rng, chances, k) for chances in questions.chances(rng, num_questions))
    return paired_difference(*(dict(enumerate(means.tolist())) for means in (a, b)), samples_each=(k, k))


def _means(rng: np.random.Generator, chances: np.ndarray, k: int) -> np.ndarray:
    return rng.binomial(k, chances) / k


def _holds(interval: tuple[float, float] | None, truth: float) -> bool:
    return interval is not None and interval[0] <= truth <= interval[1]


@cache
def _rates(questions: Questions) -> tuple[float, float]:
    """The mean of either model's chances, by Gauss-Hermite quadrature."""
    points, weights = np.polynomial.hermite_e.hermegauss(100)
    logits = np.log(questions.centre / (1 - questions.centre)) + np.hypot(questions.spread, questions.own) * points
    first, second = (float(weights @ _expit(logits + gain) / weights.sum()) for gain in (questions.gain, 0.0))
    return first, second


@cache
def _centre(rate: float) -> float:
    """The centre of questions that are answered rightly at this rate on average, by bisection."""
    low, high = 1e-6, 1 - 1e-6
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if _rates(Questions(middle))[1] < rate else (low, middle)
    return (low + high) / 2


def _expit(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits))


if __name__ == "__main__":
    main()
