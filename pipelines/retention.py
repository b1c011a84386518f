"""Suites without references: every student's answers beside the teacher's, before the judge of the recipe.

    run_dir/eval/retention/{judge.sqlite, retention.json, manifest.json}

The judge's verdicts are kept one by one as answers are: a stop loses none, and a new student asks for its own pairs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from distill.ledger import Ledger
from distill.manifest import run_stage, write_atomically
from distill.recipe import Recipe, VerifyConfig
from distill.records import Sampling
from distill.verify import open_verifier
from distill.verify.kept import KeptVerdicts
from eval.answers import KeptAnswers
from eval.harness import SAMPLES
from eval.retained import FOLDER, RETENTION
from eval.side_by_side import PROMPT_ID, judge_pairs, pairs_of, retention, written_answers
from pipelines.context import Context
from pipelines.judging import open_judge

LEDGER = "judge.sqlite"


def compare_answers(recipe: Recipe, run_dir: Path, models: Sequence[str], context: Context) -> None:
    """Write retention.json for `models`, the names of those that were scored, the teacher among them."""
    config, folder = recipe.eval, run_dir / "eval" / FOLDER
    judge_config = config.judge
    if not config.compared or judge_config is None:
        return
    samples = {name: run_dir / "eval" / name / SAMPLES for name in models}
    sampling = Sampling(temperature=0.0, top_p=1.0, max_tokens=judge_config.max_tokens, seed=0)
    settings = {
        "suites": list(config.compared),
        "judge": judge_config.teacher.identity(),
        "sampling": sampling.content(),
        "prompt": PROMPT_ID,
    }

    def body() -> dict[str, int]:
        rows = []
        with (
            open_judge(judge_config.teacher, context.base_dir, folder, context.progress) as judge,
            Ledger.open(folder / LEDGER) as ledger,
            open_verifier(VerifyConfig(num_workers=1)) as verifier,
            KeptVerdicts(ledger, verifier, {}) as verdicts,
        ):
            assert judge is not None
            kept = KeptAnswers(judge, ledger, verdicts, context.progress)
            for suite in config.compared:
                teacher = written_answers(samples["teacher"], suite)
                for name in models:
                    if name == "teacher":
                        continue
                    pairs = pairs_of(written_answers(samples[name], suite), teacher)
                    outcomes = judge_pairs(pairs, kept, sampling, f"judge {name} {suite}")
                    rows.append({**retention(suite, name, pairs, outcomes), "judge": judge.identity.name})
            counts = {"verdicts": kept.num_answers, "asked": kept.num_asked}
        write_atomically(folder / RETENTION, json.dumps(rows, indent=2) + "\n")
        return counts

    run_stage(
        "retention", {f"samples:{name}": path for name, path in samples.items()}, settings, folder, body, [RETENTION]
    )
