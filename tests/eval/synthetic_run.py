"""A finished run with plausible random scores, for the report: the files that the stages leave, nothing trained."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path

from distill.manifest import MANIFEST, run_stage
from distill.recipe import VerifyConfig
from distill.records import Problem, ScoreCard
from distill.verify.audit import Audit, AuditSummary
from eval.harness import SAMPLES, SCORES, Subject, _write_rows, score_rows

FAMILIES = [
    "base_conversion",
    "chain_sum",
    "count_bits",
    "gcd",
    "lcm",
    "letter_counting",
    "number_sorting",
    "polynomial",
    "products",
    "spell_backward",
]
FAMILIES_OF = {"pico": FAMILIES, "math500": [f"level {level}" for level in range(1, 6)], "gsm8k": ["gsm8k"]}
SIZES = {"qwen2-0.2m": 203_168, "qwen2-0.4m": 401_920, "llama-0.4m": 411_264, "qwen2-0.8m": 812_544}
SKILL = {"base": 0.16, "direct": 0.24, "distilled": 0.62}
HOSTILE = (
    "<think>\n<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">\n"
    "</pre></article><svg onload=\"document.title='owned'\"> {{ 7 * 7 }} \u202egnp.exe\x00\x07\n"
    "</think>\n\n\\boxed{<a href='https://example.com/'>1</a>}"
)


def write_synthetic_run(
    run_dir: Path,
    *,
    suites: tuple[str, ...] = ("pico",),
    sizes: Mapping[str, int] = SIZES,
    questions: int = 24,
    samples: int = 4,
    seed: int = 0,
) -> Path:
    """`questions` a family. The first question of every family gets hostile text from every distilled student."""
    rng = random.Random(seed)
    places = [(suite, family, q) for suite in suites for family in FAMILIES_OF[suite] for q in range(questions)]
    hard = {place: rng.gauss(0, 0.35) for place in places}
    subjects = [Subject("teacher", "teacher", "deepseek_v3", 11_842_560, 5_120_256)]
    for student, count in sizes.items():
        for role in ("base", "direct", "distilled"):
            subjects.append(Subject(f"{student}-{role}", role, student.partition("-")[0], count, count))
    for subject in subjects:
        _write_model(run_dir, subject, hard, suites, samples, rng)
    _write_stages(run_dir, sizes)
    return run_dir


def _skill(subject: Subject, place: float) -> float:
    """`place` of a family among its suite's, from 0 to 1."""
    if subject.role == "teacher":
        return 0.97
    size = {"0.2m": -0.14, "0.4m": 0.0, "0.8m": 0.09}[subject.name.split("-")[1]]
    return SKILL[subject.role] + size * (subject.role == "distilled") + 0.3 * (place - 0.5)


def _write_model(
    run_dir: Path, subject: Subject, hard: dict, suites: tuple[str, ...], samples: int, rng: random.Random
) -> list[ScoreCard]:
    rows = []
    for (suite, family, question), easier in hard.items():
        place = FAMILIES_OF[suite].index(family) / len(FAMILIES_OF[suite])
        for sample in range(samples):
            right = rng.random() < _skill(subject, place) + easier * (subject.role != "teacher")
            answer = str(7 * question + 3)
            written = answer if right else str(7 * question + 3 + rng.randint(1, 9))
            thought = "" if subject.role in ("base", "direct") else f"<think>\n7 * {question} = {7 * question}\n"
            thought += "" if not thought else f"{7 * question} + 3 = {written}\n</think>\n\n"
            text = f"{thought}\\boxed{{{written}}}"
            if question == 0 and subject.role == "distilled":
                text = HOSTILE
            rows.append(
                {
                    "suite": suite,
                    "problem_id": f"{family}-{question}",
                    "family": family,
                    "sample_index": sample,
                    "prompt": f"What is 7 * {question} + 3?" if question else f"<b>{family}</b> & what is 7 * 0 + 3?",
                    "answer": answer,
                    "text": text,
                    "finish_reason": "stop",
                    "num_prompt_tokens": 20,
                    "num_tokens": len(text),
                    "verdict": "correct"
                    if right
                    else rng.choices(["wrong", "truncated", "unverifiable"], [75, 24, 1])[0],
                    "extracted": written,
                    "vote": "right" if right else written,
                    "mixed_scripts": 0,
                    "detail": "",
                }
            )
    cards = [
        card
        for suite in suites
        for card in score_rows([row for row in rows if row["suite"] == suite], subject, suite, max_unverifiable=1)
    ]
    out = run_dir / "eval" / subject.name

    def body() -> dict:
        _write_rows(rows, out / SAMPLES)
        (out / SCORES).write_text(json.dumps([card.model_dump(mode="json") for card in cards]))
        identity = {"weights": f"{rng.getrandbits(128):032x}", "template": "ab" * 16}
        identity |= {"name": subject.name, "backend": "native", "backend_version": "0.1.0"}
        return {"samples": len(rows), "identity": identity}

    run_stage("eval-model", {}, {"name": subject.name}, out, body, [SAMPLES, SCORES])
    return cards


def _write_stages(run_dir: Path, sizes: Mapping[str, int]) -> None:
    stages = {"generate": 74.2, "curate": 9.6, "eval": 83.0}
    stages |= {f"distill/{s}-{m}": 21.0 for s in sizes for m in ("direct", "distilled")}
    for name, seconds in stages.items():
        folder = run_dir / name
        run_stage(name, {}, {"verify": VerifyConfig().model_dump()}, folder, lambda: {}, [])
        manifest = json.loads((folder / MANIFEST).read_text())
        manifest |= {"seconds": seconds, "peak_rss_bytes": 1_240_000_000, "device": "NVIDIA H200"}
        manifest["counts"] = {"held_out": 240, "training_questions": 7_410, "shared_with_training": 0}
        manifest["counts"] |= {"generate": {"synthesised": {"tales": {}}}, "curate": {"hinted": 37}}.get(name, {})
        (folder / MANIFEST).write_text(json.dumps(manifest))
    for number, (size, method) in enumerate((s, m) for s in sizes for m in ("direct", "distilled")):
        steps = [
            {"step": n, "loss": 2.4 / (1 + 0.02 * n) + 0.1 * number, "lr": 1e-3 * (1 - n / 800)} for n in range(1, 769)
        ]
        log = {"method": method, "num_steps": 768, "num_tokens": 1_248_129, "steps": steps}
        (run_dir / "distill" / f"{size}-{method}" / "train_log.json").write_text(json.dumps(log))
    funnel = [("correct_only", 8192, 7804), ("complete_reasoning", 7804, 7804), ("max_repetition", 7804, 7790)]
    funnel += [("decontaminate", 7790, 7700), ("deduplicate", 7700, 7410)]
    leak = "shares 'how many <b>bold</b> apples' with the held-out question '</h3><script>0</script>' of gsm8k"
    example = {
        "key": "0123456789abcdef",
        "detail": leak,
        "question": "</pre><img src=x> \u202e?",
        "completion": HOSTILE,
    }
    steps = [{"filter": name, "in": before, "out": after, "examples": []} for name, before, after in funnel]
    steps[3] |= {"examples": [example, {**example, "key": "fedc"}]}
    (run_dir / "curate" / "funnel.json").write_text(json.dumps(steps))
    written = [{"filter": "readable", "in": 900, "out": 640}, {"filter": "agreement", "in": 640, "out": 512}]
    written = [step | {"examples": [example]} for step in written]
    run_stage("synthesise", {}, {}, run_dir / "generate" / "questions" / "tales", lambda: {}, [])
    (run_dir / "generate" / "questions" / "tales" / "funnel.json").write_text(json.dumps(written))
    (run_dir / "curate" / "audit.json").write_text(synthetic_audit().model_dump_json())


def synthetic_audit() -> AuditSummary:
    """Twelve answers to three questions, by the code that curation runs: two disagreements, one reference replaced."""
    problems = [
        Problem(prompt="</pre><script>1</script>\u202e?", answer="7", grader="math", source="s"),
        Problem(prompt="What is 4 + 4?", answer="9", grader="math", source="s"),
        Problem(prompt="What is <b>5 + 5</b>?", answer="11", grader="reasoning_gym", source="s"),
    ]
    audit = Audit({one.id: one for one in problems}, VerifyConfig(relabel="majority"))
    rows = [(0, "correct", "7"), (0, "correct", "8"), (0, "wrong", "7.0")]
    rows += [(1, "wrong", answer) for answer in ("8", "8.0", "8", "x=8", "7")] + [(2, "wrong", "10")] * 4
    for number, (which, state, answer) in enumerate(rows):
        audit.add(problems[which].id, f"{number:016x}", state, answer)  # type: ignore[arg-type]
    return audit.summary()
