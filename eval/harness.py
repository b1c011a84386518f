"""Score one model on suites: lm-eval drives, the model writes k distinct samples a question, `distill.verify` grades.

Answers come from `eval.answers`, which keeps them one by one. Leaves two files in the model's folder:
`samples.parquet`, one row a sample, and `scores.json`, the ScoreCards: per suite pass@1, pass@k for powers of two,
cons@k from four samples on, and pass@1 of each family of a suite that has several. Verdicts that are our failure
(`timeout`, `infra_error`) are left out of the means and counted; above a small share they stop the stage.
"""

from __future__ import annotations

import io
import json
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.errors import DataError, EnvironmentFault
from distill.manifest import write_atomically
from distill.recipe import DEFAULT_LIMITS, ContestDates, EvalConfig, ReadLimits
from distill.records import Role, Sampling, ScoreCard
from eval.answers import Answer, KeptAnswers, NotKept
from eval.metrics import ks, mixes_scripts, pass_at_k
from eval.statistics import Estimate, consensus, mean_estimate, pass_at_1
from eval.suites import HELD_OUT, TASKS
from eval.tasks.processors import NO_VERDICT
from eval.votes import votes

SAMPLES, SCORES = "samples.parquet", "scores.json"
MIN_VOTES = 4  # cons@k over fewer samples says little more than pass@1
MAX_UNGRADED = 0.02  # share of samples without a verdict; above it the score would be a guess


@dataclass(frozen=True)
class Subject:
    """The model under evaluation, as its ScoreCards name it."""

    name: str
    role: Role
    architecture: str
    num_parameters: int
    num_active_parameters: int


def score_model(
    kept: KeptAnswers,
    subject: Subject,
    suites: Sequence[str],
    out_dir: Path,
    *,
    seed: int,
    num_samples: int | None = None,
    sampling: Sampling | None = None,
    question_alone: bool = False,
    limit: int | None = None,
    held_out: Path | None = None,
    own: Mapping[str, Path] | None = None,
    compared: Collection[str] = (),
    bench_data: Path | None = None,
    contest_dates: ContestDates | None = None,
    limits: ReadLimits = DEFAULT_LIMITS,
    max_unverifiable: float = EvalConfig().max_unverifiable,
    num_answers: int | None = None,
) -> list[ScoreCard]:
    """Write samples.parquet and scores.json to `out_dir` and return the ScoreCards.

    `num_samples` and `sampling` replace what the task files say (R1's protocol), `question_alone` leaves out the words
    in which they ask for a boxed answer; `limit` is questions a suite; `own` are files of problems of suites that have
    no task file; those that are `compared` are answered and not scored. Raises EnvironmentFault where more than 2% of
    the samples could not be graded, DataError where more than `max_unverifiable` of a suite's have a reference that
    cannot be read (those count as not correct), NotKept where the suites do not want just `num_answers`, the number
    that is kept.
    """
    for left in [*out_dir.glob(f".{SAMPLES}.*.tmp"), *out_dir.glob(f".{SCORES}.*.tmp")]:
        left.unlink()  # a killed run's: who holds the ledger writes here alone
    rows: list[dict[str, Any]] = []
    cards: list[ScoreCard] = []
    metadata = {
        "held_out": str(held_out or ""),
        "bench_data": bench_data and str(bench_data),
        "limits": limits.model_dump(),
        "contest_dates": contest_dates and contest_dates.model_dump(mode="json"),
    }
    for suite in suites:
        how = {"num_samples": num_samples, "sampling": sampling, "question_alone": question_alone}
        config = task_config(suite, own=(own or {}).get(suite), **how)  # type: ignore[arg-type]
        answers, results = _run_task(kept, config, seed, limit, metadata, subject)
        ballot = votes(answers, kept.verifier)
        of_suite = [_row(suite, answer, vote) for answer, vote in zip(answers, ballot, strict=True)]
        rows += of_suite
        if suite in compared:
            continue
        suite_cards = score_rows(of_suite, subject, suite, max_unverifiable)
        _agree(suite_cards[0], results)
        cards += suite_cards
    if num_answers not in (None, len(rows)):
        message = f"{num_answers} answers are kept, the suites now want {len(rows)}; run `potstill eval`"
        raise NotKept(message, where=out_dir)
    _write_rows(rows, out_dir / SAMPLES)
    write_scores(cards, out_dir)
    return cards


def write_scores(cards: Sequence[ScoreCard], out_dir: Path) -> None:
    write_atomically(out_dir / SCORES, json.dumps([card.model_dump(mode="json") for card in cards], indent=2) + "\n")


def task_config(
    suite: str,
    *,
    num_samples: int | None = None,
    sampling: Sampling | None = None,
    question_alone: bool = False,
    own: Path | None = None,
) -> dict[str, Any]:
    """A task file as lm-eval reads it, with what the recipe states itself laid over it.

    A suite of the recipe's own, whose problems are in `own`, is asked like `held_out`.
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    config = dict(load_yaml(TASKS / f"{HELD_OUT if own else suite}.yaml"))
    if own is not None:
        config |= {"task": suite, "dataset_kwargs": {"own": str(own)}}
    if num_samples is not None:
        config["repeats"] = num_samples
        config["filter_list"] = [{"name": "all", "filter": [{"function": "take_first_k", "k": num_samples}]}]
    if question_alone:
        config["doc_to_text"] = "{{question}}"
    if sampling is not None:
        config["generation_kwargs"] = {
            **config["generation_kwargs"],
            "do_sample": sampling.temperature > 0,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_gen_toks": sampling.max_tokens,
        }
    return config


def score_rows(
    rows: Sequence[Mapping[str, Any]],
    subject: Subject,
    suite: str,
    max_unverifiable: float = EvalConfig().max_unverifiable,
) -> list[ScoreCard]:
    """ScoreCards of one suite from its sample rows: pass@1 and pass@k, cons@k, then pass@1 of families.

    Raises EnvironmentFault where graders failed too often, DataError where too many references cannot be read.
    """
    states = Counter(row["verdict"] for row in rows)
    ungraded = sum(states[state] for state in NO_VERDICT)
    if ungraded > MAX_UNGRADED * len(rows):
        raise EnvironmentFault(
            f"{ungraded} of {len(rows)} answers could not be graded ({dict(states)}), at most {MAX_UNGRADED:.0%} "
            "may be; raise verify.timeout_s or give it more memory",
            where=subject.name,
            field=suite,
        )
    unverifiable = [row for row in rows if row["verdict"] == "unverifiable"]
    if len(unverifiable) > max_unverifiable * len(rows):
        raise DataError(
            f"{len(unverifiable)} of {len(rows)} answers have a reference that cannot be read, the first is "
            f"{unverifiable[0]['answer']!r}; at most {max_unverifiable:.0%} may (eval.max_unverifiable)",
            where=subject.name,
            field=suite,
        )
    graded = [row for row in rows if row["verdict"] not in NO_VERDICT]

    def card(name: str, metric: str, estimate: Estimate) -> ScoreCard:
        return ScoreCard(**vars(subject), suite=name, metric=metric, **vars(estimate))

    def outcomes(of: Sequence[Mapping[str, Any]]) -> list[list[bool]]:
        return list(group_outcomes(of).values())

    questions = outcomes(graded)
    most = max(map(len, questions))
    cards = [card(suite, "pass@1", pass_at_1(questions))]
    for k in ks(most):
        enough = [question for question in questions if len(question) >= k]
        if len(enough) < (1 - MAX_UNGRADED) * len(questions):
            break  # of a few questions it says nothing of the suite
        values = [pass_at_k(len(question), sum(question), k) for question in enough]
        cards.append(card(suite, f"pass@{k}", mean_estimate(values, sum(map(len, enough)))))
    ballots: dict[str, list[tuple[str | None, bool]]] = defaultdict(list)
    for row in graded:
        ballots[row["problem_id"]].append((row["vote"], row["verdict"] == "correct"))
    if most >= MIN_VOTES and any(row["vote"] is not None for row in graded):
        values = [consensus(ballot) for ballot in ballots.values()]
        cards.append(card(suite, f"cons@{most}", mean_estimate(values, len(graded))))
    families = sorted({row["family"] for row in graded})
    if len(families) > 1:
        for family in families:
            of = [row for row in graded if row["family"] == family]
            cards.append(card(f"{suite}/{family}", "pass@1", pass_at_1(outcomes(of))))
    return cards


def group_outcomes(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[bool]]:
    """Graded rows as `problem id -> correct?` lists, what `eval.statistics` works on; ungraded rows are left out."""
    grouped: dict[str, list[bool]] = defaultdict(list)
    for row in rows:
        if row["verdict"] not in NO_VERDICT:
            grouped[row["problem_id"]].append(row["verdict"] == "correct")
    return dict(grouped)


def _run_task(
    kept: KeptAnswers, config: dict[str, Any], seed: int, limit: int | None, metadata: dict[str, Any], subject: Subject
) -> tuple[list[Answer], dict[str, Any]]:
    """One suite through lm-eval's evaluator. Returns our answers and lm-eval's own aggregate."""
    with quiet_lm_eval():
        from lm_eval.evaluator import evaluate
        from lm_eval.tasks import TaskManager

        from eval.adapter import PotstillLM

        tasks = TaskManager(include_path=str(TASKS), include_defaults=False, metadata=metadata).load([config])
        for task in tasks["tasks"].values():
            task.build_all_requests = without_bar(task.build_all_requests)
        lm = PotstillLM(kept, seed=seed, title=f"{subject.name} {config['task']}")
        results = evaluate(lm=lm, task_dict=tasks, limit=limit, bootstrap_iters=0, log_samples=False)
    return lm.answers, results["results"][config["task"]]


@contextmanager
def quiet_lm_eval() -> Iterator[None]:
    """Keep lm-eval's remarks about defaults off the terminal."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def without_bar(build_requests: Callable[..., None]) -> Callable[..., None]:
    """Keep the bar that lm-eval draws while it builds its requests off the terminal: it takes no option for that."""

    def build(**arguments: Any) -> None:
        with redirect_stderr(io.StringIO()):
            build_requests(**arguments)

    return build


def _agree(card: ScoreCard, results: Mapping[str, Any]) -> None:
    """Our pass@1 and the one that lm-eval aggregated are the same number, computed twice."""
    theirs = results[f"{card.metric},all"]
    assert abs(theirs - card.value) < 1e-9, f"{card.name} {card.suite}: lm-eval says {theirs}, we say {card.value}"


def _row(suite: str, answer: Answer, vote: str | None) -> dict[str, Any]:
    problem, trace, verdict = answer.problem, answer.trace, answer.verdict
    mixed = mixes_scripts(problem.prompt, trace.text)
    return {
        "suite": suite,
        "problem_id": problem.id,
        "family": str(problem.metadata.get("family", problem.source)),
        "sample_index": trace.sample_index,
        "prompt": problem.prompt,
        "answer": problem.answer,
        "text": trace.text,
        "finish_reason": trace.finish_reason,
        "num_prompt_tokens": trace.num_prompt_tokens,
        "num_tokens": trace.num_tokens,
        "verdict": verdict.state,
        "extracted": verdict.extracted,
        "vote": vote,
        "mixed_scripts": None if mixed is None else int(mixed),
        "detail": verdict.detail,
    }


def _write_rows(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    whole = {"sample_index", "num_prompt_tokens", "num_tokens", "mixed_scripts"}
    schema = pa.schema([(name, pa.int64() if name in whole else pa.string()) for name in rows[0]])
    buffer = io.BytesIO()
    # A model may write half a surrogate pair; Parquet strings are UTF-8.
    clean = [
        {k: v.encode("utf-8", "replace").decode() if isinstance(v, str) else v for k, v in r.items()} for r in rows
    ]
    pq.write_table(pa.Table.from_pylist(clean, schema=schema), buffer)
    write_atomically(path, buffer.getvalue())
