"""The data set's card: what the rows hold, who wrote them, how they were drawn, filtered and checked.

Written from what the run left behind (manifests, funnel, counts of the rows), never by hand. The front matter's
`configs` and `dataset_info` are those of `datasets`, so that the Hub's viewer and `load_dataset` need nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distill.publish.synthesised import funnel_lines
from distill.publish.traces import ALL, DEFAULT, FOLDERS, MESSAGES, DatasetLayout, columns, schema

SIZES = ((1e3, "n<1K"), (1e4, "1K<n<10K"), (1e5, "10K<n<100K"), (1e6, "100K<n<1M"), (1e7, "1M<n<10M"))


@dataclass(frozen=True)
class Provenance:
    """The origin of the traces. `identity` is the TeacherIdentity, `sampling` how each of `num_samples` was drawn."""

    recipe: str
    identity: Mapping[str, str]
    sampling: Mapping[str, Any]
    num_samples: str
    system_prompt: str | None
    prompt_suffix: str | None
    reasoning: str
    funnel: Sequence[Mapping[str, Any]]
    questions: Mapping[str, Sequence[Mapping[str, Any]]]
    suites: Sequence[str]
    hashes: Mapping[str, str]
    versions: Mapping[str, str]


def dataset_card(
    repo: str, layout: DatasetLayout, provenance: Provenance, *, licence: str | None, language: str
) -> str:
    """README.md of the data set."""
    title = repo.rpartition("/")[2]
    return "\n".join(
        [
            f"---\n{_front(title, layout, licence=licence, language=language)}---\n",
            f"# {title}\n",
            _summary(layout, provenance),
            "## Use\n",
            _use(repo, layout),
            "## Columns\n",
            _columns(layout),
            "## Sources\n",
            _sources(layout),
            "## How it was filtered\n",
            _funnel(provenance),
            "## Teacher and sampling\n",
            _teacher(provenance),
            "## Lineage\n",
            _lineage(provenance),
        ]
    )


def _front(title: str, layout: DatasetLayout, *, licence: str | None, language: str) -> str:
    import yaml
    from datasets import DatasetInfo, Features
    from datasets.info import DatasetInfosDict
    from datasets.splits import SplitDict, SplitInfo
    from huggingface_hub import DatasetCardData

    infos = {}
    for config, num_rows in layout.num_rows.items():
        split = SplitInfo("train", num_bytes=layout.num_bytes[config], num_examples=num_rows)
        features = Features.from_arrow_schema(schema(config))
        infos[config] = DatasetInfo(features=features, splits=SplitDict({"train": split}))
    named = [licence] if licence else {count.licence for count in layout.sources.values() if count.num_kept}
    licences = sorted({name.partition(":")[0] for name in named})  # `other:NAME` is `other` to the Hub
    data = DatasetCardData(
        language=language,
        license=licences[0] if len(licences) == 1 else licences,
        pretty_name=title,
        size_categories=next((name for limit, name in SIZES if layout.num_rows[DEFAULT] < limit), "n>10M"),
        task_categories=["text-generation"],
        tags=["potstill", "reasoning", "distillation", "synthetic"],
        configs=[
            {
                "config_name": config,
                "data_files": [{"split": "train", "path": f"{FOLDERS[config]}/train-*"}],
                **({"default": True} if config == DEFAULT else {}),
            }
            for config in layout.num_rows
        ],
    )
    DatasetInfosDict(infos).to_dataset_card_data(data)
    text: str = yaml.safe_dump(dict(data.to_dict()), sort_keys=False, allow_unicode=True)  # type: ignore[no-untyped-call]
    return text


def _summary(layout: DatasetLayout, provenance: Provenance) -> str:
    traces = sum(count.num_traces for count in layout.sources.values())
    return (
        f"{layout.num_rows[DEFAULT]:,} reasoning traces that the teacher `{provenance.identity['name']}` wrote, of "
        f"{traces:,} it was asked for, verified and filtered by potstill's recipe `{provenance.recipe}`. Synthetic "
        "text: a trace whose answer is right may still reason wrongly.\n"
    )


def _use(repo: str, layout: DatasetLayout) -> str:
    repo = repo if "/" in repo else f"OWNER/{repo}"
    lines = ["```python", "from datasets import load_dataset", "", f'traces = load_dataset("{repo}", split="train")']
    if ALL in layout.num_rows:
        lines.append(f'rejected_too = load_dataset("{repo}", "{ALL}", split="train")  # with verdicts and reasons')
    return "\n".join([*lines, "```", "", "The column `messages` trains in TRL's `SFTTrainer` as it is.\n"])


def _columns(layout: DatasetLayout) -> str:
    config = ALL if ALL in layout.num_rows else DEFAULT
    rows = [
        f"| `{name}` | {'list of {role, content}' if kind == MESSAGES else kind} | {about} |"
        for name, (kind, about) in columns(config).items()
    ]
    return "\n".join(["| column | type | what it is |", "|---|---|---|", *rows]) + "\n"


def _sources(layout: DatasetLayout) -> str:
    rows = [
        f"| {name} | {count.licence} | {count.num_traces:,} | {count.num_kept:,} |"
        for name, count in layout.sources.items()
    ]
    return "\n".join(["| source | licence | traces | kept |", "|---|---|---|---|", *rows]) + "\n"


def _funnel(provenance: Provenance) -> str:
    rows = [
        f"| {step['filter'].replace('_', ' ')} | {step['in']:,} | {step['in'] - step['out']:,} | {step['out']:,} |"
        for step in provenance.funnel
    ]
    table = "\n".join(["| filter | given | dropped | kept |", "|---|---|---|---|", *rows])
    decontaminated = any(step["filter"] == "decontaminate" for step in provenance.funnel)
    against = f"Decontaminated against: {', '.join(provenance.suites)}." if decontaminated else "Not decontaminated."
    relabelled = sum(step.get("relabelled", 0) for step in provenance.funnel)
    if relabelled:
        against += (
            f" {relabelled:,} samples count as correct by the majority of their question's samples, against a "
            "reference that is suspected to be wrong; the column `relabelled` names them."
        )
    if hinted := sum(step.get("hinted", 0) for step in provenance.funnel):
        against += (
            f" {hinted:,} samples were asked with the reference as a hint, because none without was right; the column "
            "`hinted` names them."
        )
    written = "".join(f"\nWritten by a teacher: {line}.\n" for line in funnel_lines(provenance.questions))
    return f"{table}\n\n{against}\n{written}"


def _teacher(provenance: Provenance) -> str:
    rows = {
        **{name.replace("_", " "): f"`{value}`" for name, value in provenance.identity.items()},
        "system prompt": f"`{provenance.system_prompt}`" if provenance.system_prompt else "none",
        "behind each question": f"`{provenance.prompt_suffix}`" if provenance.prompt_suffix else "nothing",
        "reasoning": "between `<think>` and `</think>`"
        if provenance.reasoning == "tagged"
        else "the whole text, untagged",
        "samples a question": provenance.num_samples,
        **{name.replace("_", " "): str(value) for name, value in provenance.sampling.items() if value is not None},
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {_cell(value)} |" for name, value in rows.items())]) + "\n"


def _lineage(provenance: Provenance) -> str:
    rows = [f"| {what} | `{digest}` |" for what, digest in provenance.hashes.items()]
    made = ", ".join(f"{name} {version}" for name, version in provenance.versions.items())
    return "\n".join(["| what | SHA-256 |", "|---|---|", *rows, "", f"Made with {made}.\n"])


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
