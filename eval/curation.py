"""What curation did, as the report shows it: the filters, what they dropped, and what a second grader says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distill.curate.shown import cut
from distill.records import Record
from distill.verify.audit import AuditSummary
from eval.compare import Comparison
from eval.page import visible
from eval.summary import report_suspects

MAX_SHOWN_CHARACTERS = 2_000


def curation_context(comparison: Comparison) -> dict[str, Any]:
    """The variables of `curation.html.jinja`."""
    return {
        "funnel": [_funnel_step(step, comparison.funnel[0]["in"]) for step in comparison.funnel],
        "written": [
            {"name": name, "steps": [_funnel_step(step, steps[0]["in"]) for step in steps]}
            for name, steps in comparison.questions.items()
            if steps
        ],
        "num_hinted": comparison.num_hinted,
        "left_out": _left_out(comparison),
        "audit": _audit(comparison.audit) if comparison.audit and comparison.audit.answers else None,
    }


def _funnel_step(step: Mapping[str, Any], num_traces: int) -> dict[str, Any]:
    """One filter: counts, shares in percent, and examples of what it dropped, made harmless to show."""
    examples = [
        {name: visible(cut(text, MAX_SHOWN_CHARACTERS)) for name, text in example.items()}
        for example in step["examples"]
    ]
    dropped = step["in"] - step["out"]
    return {
        **step,
        "dropped": dropped,
        "share": f"{100 * dropped / step['in']:.1f}" if dropped else "0",
        "kept_width": f"{100 * step['out'] / num_traces:.2f}" if num_traces else "0",
        "in_width": f"{100 * step['in'] / num_traces:.2f}" if num_traces else "0",
        "kept_share": f"{100 * step['out'] / num_traces:.1f}" if num_traces else "0",
        "examples": examples,
    }


def _audit(audit: AuditSummary) -> dict[str, Any]:
    """The second grader's counts and what it says, texts made harmless to show."""

    def printable(record: Record) -> dict[str, Any]:
        return {name: visible(value) if isinstance(value, str) else value for name, value in record}

    return {
        **audit.model_dump(),
        "examples": [printable(one) for one in audit.examples],
        "suspects": [printable(one) for one in report_suspects(audit)],
        "num_suspects": len(audit.suspected_references),
        "num_relabelled": len(audit.relabelled),
        "num_relabelled_samples": audit.num_relabelled_samples,
    }


def _left_out(comparison: Comparison) -> list[dict[str, Any]]:
    """Examples that were too long for a student, counted in its own tokens."""
    trained = comparison.manifests.get("distill")
    counts = trained.counts if trained is not None else {}
    dropped, tokens = counts.get("dropped", {}), counts.get("dropped_tokens", {})
    return [{"name": name, "examples": count, "tokens": tokens[name]} for name, count in dropped.items() if count]
