"""The report for programs and for text: `summary.json`, `scores.csv` and `summary.md`, every suite in each.

`summary.json` holds

    name, device, seconds, stages                the run, its cost by stage and together
    num_cores                                    of the machine that wrote the report
    best                                         the best student and the rule that says so
    suites                                       per suite: every model's scores and samples, the order of sizes, and
                                                 the smallest difference that it can show, by the spread of its gains;
                                                 `size_fit`, the line through its students (`eval.sizes`), or null;
                                                 of several runs, `run_pairs`: a model in a later run minus the first's
    students                                     per student what it gained, by suite over its base and its control
    retention                                    students' answers beside the teacher's, of suites without references
    contamination                                questions that students were trained on, scores without them
    models, funnel, audit                        ScoreCards of whole suites (pass@1), the filters, the second grader
    lm_eval                                      ScoreCards of lm-eval's own tasks, by lm-eval's metrics

A difference has `value`, `stderr`, `ci95`, `num_questions`, `within_interval` (its interval holds zero), `p_value`,
`bootstrap95` (a second interval: `eval.bootstrap`, null where all questions agree; models have one for pass@1),
`adjusted_p` (Holm, among all gains or all size steps of the run) and `clear` (that is below 5%). Shares and scores lie
in [0, 1].
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from distill.cores import num_cores
from distill.recipe import LM_EVAL
from distill.records import ScoreCard
from distill.verify.audit import AuditSummary, SuspectedReference
from eval.across import RunPair, run_pairs
from eval.bootstrap import bootstrap_interval
from eval.compare import Comparison, SizeStep, StudentRow, SuiteComparison, p_text
from eval.conditions import conditions, setting
from eval.leaks import leaks_summary
from eval.power import smallest_difference_measured
from eval.scored import METRIC, Model
from eval.sizes import size_fit
from eval.statistics import Difference
from eval.table import csv_text, markdown_cell as _cell, markdown_row as _row

MAX_SUSPECTS = 20  # suspected references that are shown, replaced ones first; audit.json has all
RIVALS = {"base": "base", "direct": "control"}


def summary(comparison: Comparison, stages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`summary.json`; `stages` are the costs of all stages, the report's own included."""
    totals = [card for model in comparison.models for suite in model.suites if (card := model.card(suite))]
    return {
        "name": comparison.name,
        "device": run_device(stages),
        "num_cores": num_cores(),
        "seconds": round(sum(stage["seconds"] for stage in stages), 3),
        "stages": list(stages),
        "best": _best(comparison),
        "suites": [_suite(comparison, suite) for suite in comparison.suites],
        "students": [_student(comparison, student) for student in comparison.students],
        "retention": list(comparison.retention),
        "models": [card.model_dump(mode="json") for card in totals],
        "lm_eval": [card.model_dump(mode="json") for model in comparison.models for card in model.tasks],
        "funnel": _without_examples(comparison.funnel),
        "questions": {name: _without_examples(steps) for name, steps in comparison.questions.items()},
        "hinted": comparison.num_hinted,
        "contamination": leaks_summary(comparison),
        "audit": None if comparison.audit is None else _audit_summary(comparison.audit),
    }


def _without_examples(steps: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{name: step[name] for name in ("filter", "in", "out")} for step in steps]


def run_device(stages: Sequence[Mapping[str, Any]]) -> str:
    """The devices of a run, the one that took longest first; the report itself is written on any."""
    seconds: dict[str, float] = {}
    for stage in stages:
        if stage["name"] != "compare" and stage["device"]:
            seconds[stage["device"]] = seconds.get(stage["device"], 0) + stage["seconds"]
    return "; ".join(sorted(seconds, key=lambda device: -seconds[device]))


def best_rule(comparison: Comparison) -> str:
    """How the best student is found, in words."""
    return f"highest {METRIC} on {comparison.deciding_suite}, of equals the smaller (push.best_by)"


def scores_csv(comparison: Comparison) -> str:
    """One row a model, suite, family and metric."""
    rows = [
        {
            **{name: getattr(card, name) for name in ("name", "role", "architecture")},
            "num_parameters": card.num_parameters,
            "num_active_parameters": card.num_active_parameters,
            "suite": card.suite.partition("/")[0],
            "family": card.suite.partition("/")[2],
            **{name: getattr(card, name) for name in ("metric", "value", "stderr")},
            **dict(zip(("ci95_low", "ci95_high"), card.ci95 or ("", ""), strict=True)),
            "num_questions": card.num_questions,
            "num_samples": card.num_samples,
            **_of_whole_suites(model, card),
        }
        for model in comparison.models
        for card in (*model.cards, *model.tasks)
    ]
    return csv_text(list(rows[0]), rows)


def summary_markdown(comparison: Comparison, stages: Sequence[Mapping[str, Any]]) -> str:
    """The scores as Markdown tables, a section a suite."""
    seconds = sum(stage["seconds"] for stage in stages)
    costs = ", ".join(f"{stage['name']} {stage['seconds']:,.0f} s" for stage in stages)
    lines = [f"# {_cell(comparison.name)}", "", f"{_cell(run_device(stages))}: {seconds:,.0f} s ({costs})."]
    if comparison.best:
        name = _cell(comparison.best.name.removesuffix("-distilled"))
        lines.append(f"Best distilled student: **{name}**, {best_rule(comparison)}.")
    for suite in comparison.suites:
        lines += ["", f"## {_cell(suite.name)}", "", *_suite_markdown(comparison, suite)]
    if comparison.retention:
        head = ["suite", "student", "retention", "wins", "ties", "losses", "questions", "judge"]
        lines += ["", "## Beside the teacher", "", _row(head), _row(["---"] * len(head))]
        lines += [_row(_retention_cells(row)) for row in comparison.retention]
    if tasks := [card for model in comparison.models for card in model.tasks]:
        lines += ["", "## lm-eval's own tasks", "", *_tasks_markdown(tasks)]
    return "\n".join(lines) + "\n"


def _retention_cells(row: Mapping[str, Any]) -> list[str]:
    share = f"{100 * row['value']:.1f} ({interval(*row['ci95'])})"
    counts = [f"{row[name]:,}" for name in ("wins", "ties", "losses", "num_questions")]
    return [row["suite"], row["model"], share, *counts, row["judge"]]


def report_suspects(audit: AuditSummary) -> list[SuspectedReference]:
    return sorted(audit.suspected_references, key=lambda one: not one.relabelled)[:MAX_SUSPECTS]


def interval(low: float, high: float) -> str:
    return f"{100 * low:.1f} to {100 * high:.1f}"


def difference_in_points(difference: Difference) -> str:
    low, high = (100 * bound for bound in difference.ci95)
    return f"{100 * difference.value:+.1f} ({low:+.1f} to {high:+.1f}; p {p_text(difference.adjusted_p)})"


def _best(comparison: Comparison) -> dict[str, Any] | None:
    best = comparison.best
    if best is None:
        return None
    student = best.name.removesuffix("-distilled")
    return {"student": student, "suite": best.suite, "rule": best_rule(comparison), "value": best.value}


def _suite(comparison: Comparison, suite: SuiteComparison) -> dict[str, Any]:
    fit = size_fit(suite, comparison.curves)
    return {
        "name": suite.name,
        "smallest_difference": smallest_difference_measured(suite.differences),
        "num_questions": max(len(model.answers[suite.name].means) for model in suite.models),
        "samples_per_question": max(model.answers[suite.name].samples_per_question for model in suite.models),
        "models": [_model(model, suite) for model in suite.models],
        "run_pairs": [_run_pair(pair) for pair in run_pairs(suite.models, suite.name)],
        "size_steps": [_size_step(step) for step in suite.size_steps],
        "size_verdict": suite.size_verdict,
        "size_fit": None if fit is None else asdict(fit),
    }


def _model(model: Model, suite: SuiteComparison) -> dict[str, Any]:
    answers = model.answers[suite.name]
    return {
        "name": model.name,
        "role": model.role,
        "student": None if model.role == "teacher" else model.student,
        "num_parameters": model.num_parameters,
        "scores": {card.metric: _score(card) for card in model.cards_of(suite.name)},
        "bootstrap95": bootstrap_interval(list(answers.means.values())),
        "families": {
            family: _score(card) for family in suite.families if (card := model.card(f"{suite.name}/{family}"))
        },
        "num_samples": answers.num_samples,
        **asdict(conditions(model, suite.name)),
        "unverifiable": answers.unverifiable,
        **{name: getattr(answers, name) for name in RATES},
        "weights": model.identity.get("weights"),
    }


RATES = ("mean_tokens", "p50_tokens", "p95_tokens", "format_rate", "language_mixing")


def _score(card: ScoreCard) -> dict[str, Any]:
    return {"value": card.value, "stderr": card.stderr, "ci95": list(card.ci95)}


def _size_step(step: SizeStep) -> dict[str, Any]:
    difference = _difference(step.difference)
    return {"smaller": step.smaller, "larger": step.larger, "one_architecture": step.one_architecture, **difference}


def _run_pair(pair: RunPair) -> dict[str, Any]:
    difference = None if pair.difference is None else _difference(pair.difference)
    return {"first": pair.first.name, "second": pair.second.name, "difference": difference, "why_not": pair.why_not}


def _student(comparison: Comparison, student: str) -> dict[str, Any]:
    rows = {suite.name: row for suite in comparison.suites for row in suite.students if row.student == student}
    return {
        "name": student,
        "num_parameters": max(row.num_parameters for row in rows.values()),
        "gained": {suite: {role: _difference(of) for role, of in row.gained.items()} for suite, row in rows.items()},
    }


def _difference(difference: Difference) -> dict[str, Any]:
    shown = {**asdict(difference), "ci95": list(difference.ci95)}
    return {**shown, "within_interval": difference.holds_zero, "clear": difference.clear}


def _of_whole_suites(model: Model, card: ScoreCard) -> dict[str, Any]:
    """What is counted for a suite and not for its families."""
    answers = None if "/" in card.suite else model.answers.get(card.suite)  # lm-eval's own tasks have none
    counted = ("samples_per_question", "truncated", "ungraded", "unverifiable", *RATES)
    return {name: "" if answers is None else getattr(answers, name) for name in counted} | {
        name: value or "" for name, value in asdict(setting(model)).items()
    }


def _suite_markdown(comparison: Comparison, suite: SuiteComparison) -> list[str]:
    fit = size_fit(suite, comparison.curves)
    lines = [
        f"{METRIC} in %, its 95% interval in brackets; gains are paired over questions, in points, with Holm's p.",
        "",
    ]
    head = ["student", "parameters", "base", "control", "distilled", *(f"gain over {of}" for of in RIVALS.values())]
    lines += [_row(head), _row(["---"] * len(head))]
    lines += [_row(_student_cells(row)) for row in suite.students]
    for teacher in suite.of_role("teacher"):
        who = _cell(teacher.name) if teacher.run else "The teacher"
        lines += ["", f"{who} scores {_points(teacher.card(suite.name))}."]
    head = ["model", "questions x samples", "cons@k", "cut off", "tokens an answer", "engine"]
    lines += ["", suite.size_verdict, *_detectable(suite)]
    lines += [] if fit is None else ["", str(fit)]
    lines += ["", _row(head), _row(["---"] * len(head))]
    lines += [_row(_answer_cells(model, suite.name)) for model in suite.models]
    return lines


def _tasks_markdown(cards: Sequence[ScoreCard]) -> list[str]:
    """Every model's metrics on whole tasks and groups, as lm-eval gives them, with its standard errors."""
    whole = [card for card in cards if "/" not in card.suite] or list(cards)
    head = ["model", "task", "metric", "value", "standard error", "documents"]
    return [_row(head), _row(["---"] * len(head))] + [
        _row(
            [
                card.name,
                card.suite.removeprefix(LM_EVAL),
                card.metric,
                f"{card.value:.4f}",
                "–" if card.stderr is None else f"{card.stderr:.4f}",
                f"{card.num_questions:,}",
            ]
        )
        for card in whole
    ]


def _detectable(suite: SuiteComparison) -> list[str]:
    shown = detectable_sentence(suite)
    return ["", shown] if shown else []


def detectable_sentence(suite: SuiteComparison) -> str:
    """What a set of this size can tell apart, by the spread that was measured; empty where nothing was compared."""
    smallest = smallest_difference_measured(suite.differences)
    if smallest is None:
        return ""
    return (
        f"With this many questions a difference of {100 * smallest:.1f} points or more is found four times in five "
        "(5% level, one comparison, by the spread of the differences measured here)."
    )


def _student_cells(row: StudentRow) -> list[str]:
    scores = [_points(row.scores.get(role)) for role in ("base", "direct", "distilled")]
    gains = [difference_in_points(row.gained[role]) if role in row.gained else "–" for role in RIVALS]
    return [row.student, f"{row.num_parameters:,}", *scores, *gains]


def _answer_cells(model: Model, suite: str) -> list[str]:
    answers, identity = model.answers[suite], model.identity
    return [
        model.name,
        f"{len(answers.means):,} x {answers.samples_per_question}",
        _points(model.consensus(suite)),
        f"{answers.truncated:.1%}",
        f"{answers.mean_tokens:,.0f}",
        " ".join(identity.get(name, "") for name in ("backend", "backend_version")).strip() or "–",
    ]


def _points(card: ScoreCard | None) -> str:
    return "–" if card is None else f"{100 * card.value:.1f} ({interval(*card.ci95)})"


def _audit_summary(audit: AuditSummary) -> dict[str, Any]:
    """The audit with as many suspected references as the page shows, and the number of all."""
    return {
        **audit.model_dump(mode="json"),
        "suspected_references": [one.model_dump(mode="json") for one in report_suspects(audit)],
        "num_suspected_references": len(audit.suspected_references),
        "num_relabelled_references": len(audit.relabelled),
        "num_relabelled_samples": audit.num_relabelled_samples,
    }
