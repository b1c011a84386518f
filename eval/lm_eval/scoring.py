"""One model on one of lm-eval's tasks: lm-eval's numbers with lm-eval's standard errors, and what each is made of.

Seeds of few-shot examples are lm-eval's defaults, so that prompts are those of its command line. Standard errors of
metrics that it bootstraps (perplexities, F1, BLEU) are of `BOOTSTRAPS` draws; of some metrics it has none.
"""

from __future__ import annotations

import io
import json
import math
import os
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from distill.manifest import write_atomically
from distill.progress import Progress
from distill.recipe import LM_EVAL, LmEvalConfig
from distill.records import ScoreCard
from eval.harness import Subject, quiet_lm_eval, without_bar
from eval.lm_eval.kept import KeptTokens
from eval.lm_eval.tasks import load_tasks

# lm-eval's defaults (lm_eval/defaults.py).
SEED, FEWSHOT_SEED = 1234, 1234
BOOTSTRAPS = 1_000
NORMAL_95 = 1.96  # lm-eval's standard errors are of a mean of many documents


def score_task(
    kept: KeptTokens,
    subject: Subject,
    name: str,
    out_dir: Path,
    progress: Progress,
    *,
    config: LmEvalConfig,
    seed: int,
    limit: int | None,
    bench_data: Path | None,
) -> list[ScoreCard]:
    """ScoreCards of a task, a group or a tag of lm-eval's; writes `out_dir`/<task>.jsonl, a row a document.

    A group's own metrics have the suite `lm_eval:<group>`, those of its tasks `lm_eval:<group>/<task>`. Metrics are
    called as lm-eval calls them, `acc_norm,none`: the metric, and the filter that answers went through.
    """
    with quiet_lm_eval(), progress.task(f"load {LM_EVAL}{name}", None):
        loaded = load_tasks(name, bench_data, progress)
    random_state = random.getstate()
    try:
        with quiet_lm_eval():
            samples = _answered(kept, subject, name, loaded, progress, config=config, seed=seed, limit=limit)
            metrics = _metrics(loaded, samples)
    finally:
        random.setstate(random_state)
    for task, of_task in samples.items():
        _write(out_dir / f"{task.replace('/', '_')}.jsonl", of_task)
    sizes = {task: len({sample["doc_id"] for sample in of_task}) for task, of_task in samples.items()}
    return [card for key, values in metrics.items() for card in _cards(subject, name, key, values, sizes)]


def _answered(
    kept: KeptTokens,
    subject: Subject,
    name: str,
    loaded: Mapping[str, Any],
    progress: Progress,
    *,
    config: LmEvalConfig,
    seed: int,
    limit: int | None,
) -> dict[str, list[dict[str, Any]]]:
    """lm-eval's samples by task, with the metrics of each document."""
    import numpy as np
    from lm_eval.evaluator import evaluate

    from eval.lm_eval.model import TokenLM

    random.seed(0)
    np.random.seed(SEED)
    for task in loaded["tasks"].values():
        default = task.get_config("num_fewshot")
        if default is None or (config.num_fewshot is not None and default != 0):
            task.set_config(key="num_fewshot", value=config.num_fewshot or 0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
        task.build_all_requests = without_bar(task.build_all_requests)
    results = evaluate(
        lm=TokenLM(kept, progress, seed=seed, title=f"{subject.name} {LM_EVAL}{name}"),
        task_dict=loaded,
        limit=limit,
        bootstrap_iters=0,
        log_samples=True,
        apply_chat_template=config.chat_template,
        fewshot_as_multiturn=config.chat_template and config.fewshot_as_multiturn,
    )
    return dict(results["samples"])


def _metrics(loaded: Mapping[str, Any], samples: Mapping[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """lm-eval's aggregates with standard errors, of tasks and groups."""
    from lm_eval.evaluator_utils import _process_results

    accumulated: dict[str, Any] = {}
    for name, task in loaded["tasks"].items():
        values: dict[tuple[str, str], list[Any]] = defaultdict(list)
        for sample in samples[name]:
            for metric in sample["metrics"]:
                values[metric, sample["filter"]].append(sample[metric])
        accumulated[name] = {"task": task, "raw_metrics": values, "logged_samples": []}
    with _in_this_process():
        return dict(_process_results(accumulated, loaded.get("groups") or {}, BOOTSTRAPS).metrics)


@contextmanager
def _in_this_process() -> Iterator[None]:
    """lm-eval bootstraps in a pool of processes, which a worker of ours may not have, and prints that it does."""
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before


def _cards(
    subject: Subject, asked: str, key: str, values: Mapping[str, Any], sizes: Mapping[str, int]
) -> Iterator[ScoreCard]:
    """A card for each metric of one task or group that is a number."""
    suite = LM_EVAL + asked if key == asked else f"{LM_EVAL}{asked}/{key}"
    num_questions = sizes[key] if key in sizes else int(values.get("sample_len") or sum(sizes.values()))
    for name, value in values.items():
        metric, comma, used = name.partition(",")
        if not comma or metric.endswith("_stderr") or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if not math.isfinite(value):
            continue
        stderr = values.get(f"{metric}_stderr,{used}")
        known = isinstance(stderr, int | float) and math.isfinite(stderr)
        margin = NORMAL_95 * float(stderr) if known else None
        yield ScoreCard(
            **vars(subject),
            suite=suite,
            metric=name,
            value=float(value),
            stderr=float(stderr) if known else None,
            ci95=None if margin is None else (float(value) - margin, float(value) + margin),
            num_questions=num_questions,
            num_samples=num_questions,
        )


def _write(path: Path, samples: Sequence[Mapping[str, Any]]) -> None:
    """Documents with the model's answers and their metrics. Prompts are left out, of which the hash is there: few-shot
    examples stand in each of them."""
    from lm_eval.utils import handle_non_serializable

    rows = [{name: value for name, value in sample.items() if name != "arguments"} for sample in samples]
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, default=handle_non_serializable, ensure_ascii=False) + "\n" for row in rows)
    write_atomically(path, text.encode("utf-8", "replace"))
