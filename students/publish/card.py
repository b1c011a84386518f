"""The model card: where a student comes from, how it was made, what it scores, what its licence asks.

The text is written from what the run left behind (training log, manifests, score cards), never by hand, so that every
figure can be walked back. Front matter is huggingface_hub's `ModelCardData`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from distill.licences import card_fields
from distill.publish.origin import published_name, repository_of
from distill.publish.synthesised import funnel_lines
from distill.recipe import UNINSTRUCTED, Instruction, StudentConfig
from distill.records import ScoreCard
from students.base_folder import locate


@dataclass(frozen=True)
class Lineage:
    """Sources of a student; `teacher` and `problems` are Markdown, `instruction` is what it learned questions with.

    `questions` are the funnels of sources that a teacher wrote, `num_hinted` the examples that needed a hint. Hashes
    are SHA-256 of files and folders, as the stages' manifests have them. `conditions` are rows, by the names of their
    columns, of how each score came about.
    """

    recipe: str
    teacher: str
    problems: str
    instruction: Instruction = UNINSTRUCTED
    funnel: Sequence[Mapping[str, Any]] = ()
    questions: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    num_hinted: int = 0
    hashes: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    conditions: Sequence[Mapping[str, str]] = ()


def model_card(
    repo: str, student: StudentConfig, log: Mapping[str, Any], scores: Sequence[ScoreCard], lineage: Lineage
) -> str:
    """README.md of one student. `log` is its train_log.json; `scores` are suite totals, its own and those beside it."""
    name = f"{student.name}-{log['method']}"
    front = card_data(repo, student, [score for score in scores if score.name == name]).to_yaml()
    return "\n".join(
        [
            f"---\n{front}\n---\n",
            f"# {repo.rpartition('/')[2]}\n",
            _summary(student, log, lineage),
            "## Scores\n",
            _scores(scores, name, lineage.conditions),
            "## Lineage\n",
            _lineage(student, lineage),
            "## Training\n",
            _training(student, log, lineage),
            "## Licence\n",
            _licence(student),
        ]
    )


def base_name(student: StudentConfig) -> str:
    """The student's base as prose names it."""
    return published_name(student.base, locate(student.base))


def card_data(repo: str, student: StudentConfig, scores: Sequence[ScoreCard]) -> ModelCardData:
    """The YAML front matter: licence, base model, tags, and one evaluation result a suite and metric."""
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=score.suite,
            dataset_name=score.suite,
            metric_type=score.metric,
            metric_name=score.metric,
            metric_value=round(100 * score.value, 2),
        )
        for score in scores
    ]
    return ModelCardData(
        **card_fields(student.licence),
        language="en",
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=repository_of(student.base, locate(student.base)),
        tags=["potstill", "distillation", "reasoning", "sft"],
        model_name=repo.rpartition("/")[2],
        eval_results=results or None,
    )


def _summary(student: StudentConfig, log: Mapping[str, Any], lineage: Lineage) -> str:
    opening = (
        f"A {student.num_parameters:,}-parameter {student.architecture} model, fine-tuned from {base_name(student)} on"
    )
    if log["method"] == "direct":
        return f"{opening} {log['num_examples']:,} bare answers: the control that shows what reasoning adds.\n"
    return (
        f"{opening} {log['num_examples']:,} verified worked solutions of the reasoning teacher {lineage.teacher}, "
        f"with potstill's recipe `{lineage.recipe}`.\n\n"
        "The chat template opens the reasoning (`<think>`) itself; the answer stands in the last `\\boxed{}` after "
        "`</think>`. Sample at temperature 0.6 and top-p 0.95, "
        f"{_asked(lineage.instruction)}.\n"
    )


def _asked(instruction: Instruction) -> str:
    system, suffix = instruction.system_prompt, instruction.prompt_suffix
    asked = f"with the system prompt `{system}`" if system else "without a system prompt"
    return f"{asked}, and with a blank line and `{suffix}` behind the question" if suffix else asked


def _scores(scores: Sequence[ScoreCard], name: str, conditions: Sequence[Mapping[str, str]]) -> str:
    if not scores:
        return "Not scored yet.\n"
    rows = ["| model | suite | metric | score | 95% interval | questions x samples |", "|---|---|---|---|---|---|"]
    for score in sorted(scores, key=lambda score: (score.name != name, score.suite, -score.value)):
        bold = "**" if score.name == name else ""
        low, high = (100 * bound for bound in score.ci95)
        rows.append(
            f"| {bold}{score.name}{bold} ({score.role}) | {score.suite} | {score.metric} | {100 * score.value:.1f} | "
            f"{low:.1f} to {high:.1f} | {score.num_questions} x {score.num_samples} |"
        )
    rows += ["", "Intervals are clustered by question."]
    if conditions:
        rows += ["", f"| {' | '.join(conditions[0])} |", "|---" * len(conditions[0]) + "|"]
        rows += [f"| {' | '.join(one.values())} |" for one in conditions]
    return "\n".join(rows) + "\n"


def _lineage(student: StudentConfig, lineage: Lineage) -> str:
    of_hub = repository_of(student.base, locate(student.base)) is not None
    lines = [
        f"1. Base: {base_name(student)}" + (f" at revision `{student.revision}`" if of_hub else ""),
        f"2. Teacher: {lineage.teacher}",
        f"3. Problems: {lineage.problems}",
        *(f"   - {line}" for line in funnel_lines(lineage.questions)),
    ]
    if lineage.funnel:
        steps = " -> ".join(f"{step['filter']} {step['out']:,}" for step in lineage.funnel)
        lines.append(f"4. Traces: {lineage.funnel[0]['in']:,} -> {steps}")
    if lineage.num_hinted:
        hint = "with the reference as a hint, which no example holds (rationalisation, arXiv 2203.14465)"
        lines.append(f"5. {lineage.num_hinted:,} of the examples are second tries, asked {hint}")
    if lineage.hashes:
        lines += ["", "| what | SHA-256 |", "|---|---|"]
        lines += [f"| {what} | `{digest}` |" for what, digest in lineage.hashes.items()]
    return "\n".join(lines) + "\n"


def _training(student: StudentConfig, log: Mapping[str, Any], lineage: Lineage) -> str:
    sft = student.sft
    schedule = f"{sft.scheduler} to {sft.min_lr_ratio:g} of the peak, warm-up {sft.warmup_ratio:g}"
    learned = f"{log['num_completion_tokens']:,} learned"
    rows = {
        "method": "supervised fine-tuning (TRL), loss on the completion only",
        "learning rate": f"{sft.lr:g}, {schedule}",
        "epochs, batch": f"{sft.num_epochs:g}, {sft.batch_size} examples",
        "longest example": f"{sft.max_length:,} tokens at most; {_left_out(log)}",
        "examples, tokens": f"{log['num_examples']:,}, {log['num_tokens']:,} ({learned})",
        "steps, seed": f"{log['num_steps']:,}, {log['seed']}",
        "seconds, tokens a second": f"{log['seconds']:,.1f}, {log['tokens_per_s']:,.0f}",
        "weights": sft.dtype,
        "loss, first and last step": f"{log['steps'][0]['loss']:.4f}, {log['steps'][-1]['loss']:.4f}",
        "made with": ", ".join(f"{name} {version}" for name, version in lineage.versions.items()),
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())]) + "\n"


def _left_out(log: Mapping[str, Any]) -> str:
    if not log.get("num_dropped"):
        return "nothing was cut"
    return f"nothing was cut, {log['num_dropped']:,} longer ones ({log['num_dropped_tokens']:,} tokens) were left out"


def _licence(student: StudentConfig) -> str:
    text = f"The weights derive from {base_name(student)} and stand under its licence, `{student.licence}`.\n"
    if student.licence.startswith("llama"):
        text += "\nBuilt with Llama. Use is subject to Meta's community licence and acceptable use policy.\n"
    return text
