"""One model as it was scored: its cards, what its samples add up to, and the first sample of each question.

A run may hold a million samples and more text than memory. So what is counted is read as columns, and texts pass by
batch for batch, each cut to what a page shows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from distill.curate.shown import cut
from distill.errors import DataError
from distill.manifest import read_manifest
from distill.recipe import LM_EVAL
from distill.records import ScoreCard, StageManifest
from eval.harness import SAMPLES, SCORES
from eval.tasks.processors import NO_VERDICT

METRIC = "pass@1"
COUNTED = ("suite", "problem_id", "verdict", "num_tokens", "extracted")
MIXED = "mixed_scripts"
SHOWN = ("family", "prompt", "answer", "text", "verdict", "extracted", "num_tokens")
BATCH_ROWS = 1_024
MAX_TEXT_CHARACTERS = 6_000  # of a text that a page shows: its beginning and its end, where the answer stands


@dataclass(frozen=True)
class Answers:
    """What a model's samples of one suite add up to.

    `means` has for each question the share of its graded samples that is right; `ungraded` are samples without a
    verdict, `unverifiable` those whose reference no rule can read, which count as not right. `truncated` is a share of
    the graded samples. Of all samples are the tokens of an answer (mean, median, 95th percentile), `format_rate`, the
    share whose reasoning is closed and followed by an answer in the form that was asked for, and `language_mixing`, the
    share that leaves the question's script (`eval.metrics.mixes_scripts`; None where no question has words, or where
    the samples were written before it was counted).
    """

    means: Mapping[str, float]
    num_samples: int
    samples_per_question: int
    ungraded: int
    unverifiable: int
    truncated: float
    mean_tokens: float
    p50_tokens: float
    p95_tokens: float
    format_rate: float
    language_mixing: float | None


@dataclass(frozen=True)
class Model:
    """One scored model: its cards, its answers by suite, the manifest that it was scored under, lm-eval's own tasks."""

    name: str
    cards: tuple[ScoreCard, ...]
    answers: Mapping[str, Answers]
    manifest: StageManifest | None
    samples: Path
    tasks: tuple[ScoreCard, ...] = ()
    run: str = ""  # of several that are compared; then every name begins with it

    @property
    def role(self) -> str:
        return (*self.cards, *self.tasks)[0].role

    @property
    def student(self) -> str:
        """`qwen2-0.4m` of `qwen2-0.4m-distilled`."""
        return self.name.removesuffix(f"-{self.role}")

    @property
    def num_parameters(self) -> int:
        return (*self.cards, *self.tasks)[0].num_parameters

    @property
    def suites(self) -> list[str]:
        """Whole suites, in the order in which they were scored."""
        return list(dict.fromkeys(card.suite for card in self.cards if "/" not in card.suite))

    def card(self, suite: str, metric: str = METRIC) -> ScoreCard | None:
        return next((card for card in self.cards if (card.suite, card.metric) == (suite, metric)), None)

    def cards_of(self, suite: str) -> list[ScoreCard]:
        """Every metric of a whole suite: pass@1, and pass@k and cons@k where there are samples enough."""
        return [card for card in self.cards if card.suite == suite]

    def consensus(self, suite: str) -> ScoreCard | None:
        """cons@k of a whole suite, where there are samples enough."""
        return next((card for card in self.cards_of(suite) if card.metric.startswith("cons@")), None)

    @property
    def identity(self) -> Mapping[str, str]:
        """What wrote its answers: weights, template, backend and its version; empty where that is not known."""
        return self.manifest.counts.get("identity", {}) if self.manifest else {}


@dataclass(frozen=True)
class ShownAnswer:
    """One sample as a page shows it; its text is cut."""

    family: str
    prompt: str
    reference: str
    text: str
    verdict: str
    extracted: str
    num_tokens: int


def read_model(folder: Path) -> Model:
    """Raises DataError for a file that is not what it should be."""
    try:
        cards = tuple(ScoreCard.model_validate(card) for card in json.loads((folder / SCORES).read_text("utf-8")))
    except (OSError, ValueError, ValidationError) as exc:
        raise DataError(f"not a list of score cards ({exc})", where=folder / SCORES) from exc
    if not cards:
        raise DataError("holds no score card", where=folder / SCORES)
    tasks = tuple(card for card in cards if card.suite.startswith(LM_EVAL))
    cards = tuple(card for card in cards if not card.suite.startswith(LM_EVAL))
    answers = _read_answers(folder / SAMPLES) if cards else {}
    for card in cards:
        if card.suite.partition("/")[0] not in answers:
            raise DataError(f"holds no sample of the suite {card.suite!r} that is scored", where=folder / SAMPLES)
    return Model(folder.name, cards, answers, read_manifest(folder), folder / SAMPLES, tasks)


def read_prompts(samples: Path) -> dict[tuple[str, str], str]:
    """The text of every question, by suite and question. Raises DataError."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    prompts = {}
    with _readable(samples), pq.ParquetFile(samples) as file:
        for batch in file.iter_batches(BATCH_ROWS, columns=["suite", "problem_id", "sample_index", "prompt"]):
            for row in batch.filter(pc.equal(batch["sample_index"], 0)).to_pylist():
                prompts[row["suite"], row["problem_id"]] = row["prompt"]
    return prompts


def first_answers(samples: Path) -> dict[tuple[str, str], ShownAnswer]:
    """The first sample of every question, by suite and question. Raises DataError."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    shown = {}
    with _readable(samples), pq.ParquetFile(samples) as file:
        columns = ["suite", "problem_id", "sample_index", *SHOWN]
        for batch in file.iter_batches(BATCH_ROWS, columns=columns):
            for row in batch.filter(pc.equal(batch["sample_index"], 0)).to_pylist():
                shown[row["suite"], row["problem_id"]] = _shown(row)
    return shown


def _shown(row: Mapping[str, Any]) -> ShownAnswer:
    return ShownAnswer(
        family=row["family"],
        prompt=cut(row["prompt"], MAX_TEXT_CHARACTERS),
        reference=cut(row["answer"] or "", MAX_TEXT_CHARACTERS),
        text=cut(row["text"], MAX_TEXT_CHARACTERS),
        verdict=row["verdict"].replace("_", " "),
        extracted=cut(row["extracted"] or "", MAX_TEXT_CHARACTERS),
        num_tokens=row["num_tokens"],
    )


def _read_answers(path: Path) -> dict[str, Answers]:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    with _readable(path):
        present = [*COUNTED, *({MIXED} & set(pq.read_schema(path).names))]
        table = pq.read_table(path, columns=present)
        if MIXED not in present:
            table = table.append_column(MIXED, pa.nulls(table.num_rows, pa.int64()))
        columns = {
            "graded": pc.invert(pc.is_in(table["verdict"], value_set=pa.array(NO_VERDICT))),
            "right": pc.equal(table["verdict"], "correct"),
            "truncated": pc.equal(table["verdict"], "truncated"),
            "unverifiable": pc.equal(table["verdict"], "unverifiable"),
            "formed": pc.is_valid(table["extracted"]),
        }
        for name, column in columns.items():
            table = table.append_column(name, pc.cast(column, pa.int64()))
        # One thread: the order of the questions, and with it every sum, is the file's.
        questions = table.group_by(["suite", "problem_id"], use_threads=False).aggregate(
            [("graded", "count"), (MIXED, "count"), *((name, "sum") for name in (*columns, "num_tokens", MIXED))]
        )
        tokens = {
            suite: pc.quantile(table.filter(pc.equal(table["suite"], suite))["num_tokens"], [0.5, 0.95]).to_pylist()
            for suite in pc.unique(table["suite"]).to_pylist()
        }
        by_suite: dict[str, list[dict[str, Any]]] = {}
        for question in questions.to_pylist():
            by_suite.setdefault(question["suite"], []).append(question)
    return {suite: _answers(of_suite, *tokens[suite]) for suite, of_suite in by_suite.items()}


def _answers(questions: list[dict[str, Any]], p50_tokens: float, p95_tokens: float) -> Answers:
    num_compared = sum(question[f"{MIXED}_count"] for question in questions)
    num_samples = sum(question["graded_count"] for question in questions)
    num_graded = sum(question["graded_sum"] for question in questions)
    return Answers(
        means={q["problem_id"]: q["right_sum"] / q["graded_sum"] for q in questions if q["graded_sum"]},
        num_samples=num_samples,
        samples_per_question=max(question["graded_count"] for question in questions),
        ungraded=num_samples - num_graded,
        unverifiable=sum(question["unverifiable_sum"] for question in questions),
        truncated=sum(question["truncated_sum"] for question in questions) / num_graded if num_graded else 0.0,
        mean_tokens=sum(question["num_tokens_sum"] for question in questions) / num_samples,
        p50_tokens=p50_tokens,
        p95_tokens=p95_tokens,
        format_rate=sum(question["formed_sum"] for question in questions) / num_samples,
        language_mixing=sum(question[f"{MIXED}_sum"] or 0 for question in questions) / num_compared
        if num_compared
        else None,
    )


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (OSError, KeyError, pa.ArrowException) as exc:
        raise DataError(f"not a readable Parquet file of samples ({exc})", where=path) from exc
