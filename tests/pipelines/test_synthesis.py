"""Questions that a teacher writes, through the generate stage: what is kept and why; nothing is asked twice."""

from __future__ import annotations

import json
import re
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distill.errors import DataError, RecipeError
from distill.ledger import Ledger
from distill.manifest import read_manifest
from distill.recipe import Recipe, parse
from distill.records import Example, Problem, Trace
from distill.synthesis.funnel import FILTERS, DroppedQuestion
from distill.tables import read_records
from pipelines.checks import check_recipe, recipe_checks
from pipelines.context import Context
from pipelines.stages.curate import curate
from pipelines.stages.generate import generate
from pipelines.stages.push_traces import push_traces
from tests.pipelines.question_writer import BOX, HELD_OUT, QuestionWriter, numbers, recipe_tree, write_seeds
from tests.pipelines.tiny_world import potstill, write_yaml
from tests.teacher.backends.openai.chat_endpoint import serving


@pytest.fixture
def endpoint() -> Iterator[QuestionWriter]:
    with serving(QuestionWriter()) as running:  # type: ignore[arg-type]
        yield running  # type: ignore[misc]


@pytest.fixture
def world(tmp_path: Path) -> Path:
    write_seeds(tmp_path)
    return tmp_path


def recipe(folder: Path, endpoint: QuestionWriter, **source: Any) -> Recipe:
    return Recipe.model_validate(recipe_tree(folder, endpoint.url, **source))


def run(folder: Path, what: Recipe, at: str = "run") -> Any:
    return generate(what, folder / at, Context(folder))


def questions(folder: Path, at: str = "run") -> Path:
    return folder / at / "generate/questions/synthesised"


def asked(endpoint: QuestionWriter) -> list[tuple[str, int]]:
    return [(payload["messages"][-1]["content"], payload["seed"]) for payload in endpoint.payloads]


def test_from_seeds_to_examples(endpoint: QuestionWriter, world: Path) -> None:
    what = recipe(world, endpoint)
    manifest = run(world, what)
    kept = read_records(questions(world) / "problems.parquet", Problem)
    assert kept == read_records(world / "run/generate/problems.parquet", Problem), "seeds are no problems by themselves"
    assert len(kept) == len({problem.prompt for problem in kept}) == 12
    for problem in kept:
        assert problem.source == "synthesised"
        assert eval(problem.answer.replace("\\frac{", "(").replace("}{", ")/(").replace("}", ")")) == sum(
            numbers(problem.prompt)
        ), "no reference is wrong"
        assert problem.metadata["votes"]["agreeing"] >= 3
        assert HELD_OUT not in problem.prompt

    dropped = read_records(questions(world) / "dropped.parquet", DroppedQuestion)
    of_filter = Counter(one.filter for one in dropped)
    assert {"readable", "decontaminate", "agreement", "same_answer"} <= of_filter.keys(), of_filter
    counts = manifest.counts["synthesised"]["synthesised"]
    assert counts["kept"] == counts["wanted"] == 12
    assert counts["asked"] == len(dropped) + 12
    assert (counts["seeds"], counts["contaminated_seeds"]) == (10, 1)
    steps = json.loads((questions(world) / "funnel.json").read_text())
    assert [step["filter"] for step in steps] == list(FILTERS)
    assert {step["filter"]: step["in"] - step["out"] for step in steps if step["in"] > step["out"]} == of_filter
    assert steps[0]["reasons"].keys() <= {"no <question> with </question>", "holds an answer or its working"}
    assert sum(steps[0]["reasons"].values()) == of_filter["readable"]
    assert all(len(step["examples"]) == min(3, step["in"] - step["out"]) for step in steps)
    for one in dropped:
        if one.filter == "agreement":
            assert sum(numbers(one.text)) % 10 == 5, "only what its samples differ on"

    # Questions are asked for without the words that ask for an answer; answers are with them.
    for payload in endpoint.payloads:
        writes = "<question>" in payload["messages"][-1]["content"]
        assert [turn["role"] for turn in payload["messages"]] == (["user"] if writes else ["system", "user"])
        assert payload["messages"][-1]["content"].endswith(BOX) != writes
        assert HELD_OUT not in payload["messages"][-1]["content"], "neither as a seed nor to be answered"
    # The votes are the samples: generation asks for nothing more.
    assert len(asked(endpoint)) == len(set(asked(endpoint))) == counts["asked"] + counts["votes"]
    assert manifest.counts["reused"] == manifest.counts["samples"] == 60

    curated = curate(what, world / "run", Context(world))
    examples = read_records(world / "run/curate/examples.parquet", Example)
    assert {example.problem_id for example in examples} == {problem.id for problem in kept}
    assert curated.counts["funnel"][0] == {"filter": "verdict", "in": 60, "out": curated.counts["funnel"][0]["out"]}
    assert curated.counts["funnel"][0]["out"] == sum(problem.metadata["votes"]["agreeing"] for problem in kept)
    push_traces(what, world / "run", Context(world, dry_run=True))
    card = next(world.rglob("README.md")).read_text()
    assert f"Written by a teacher: synthesised: {counts['asked']} questions asked for -> readable" in card


@pytest.mark.slow
def test_more_questions_are_asked_for_alone(endpoint: QuestionWriter, world: Path) -> None:
    run(world, recipe(world, endpoint))
    few, before = read_records(questions(world) / "problems.parquet", Problem), set(asked(endpoint))
    endpoint.payloads.clear()
    run(world, recipe(world, endpoint, count=30))
    many = read_records(questions(world) / "problems.parquet", Problem)
    assert many[:12] == few
    assert len(many) == 30
    assert not before & set(asked(endpoint))
    endpoint.payloads.clear()
    run(world, recipe(world, endpoint))
    assert read_records(questions(world) / "problems.parquet", Problem) == few
    assert not endpoint.payloads
    run(world, recipe(world, endpoint, num_votes=7, min_agreement=0.5001))
    assert all(BOX in question for question, _ in asked(endpoint) if "<question>" not in question)
    per_question = Counter(question for question, _ in asked(endpoint) if "<question>" not in question)
    assert Counter(per_question.values()).most_common(1)[0][0] == 2, "two votes more for what had five"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "again"),
    [
        ({"sampling": {"temperature": 0.9, "max_tokens": 64, "seed": 29}}, {"write"}),
        ({"vote_sampling": {"temperature": 0.9, "max_tokens": 64, "seed": 3}}, {"vote"}),
        ({"min_agreement": 0.8, "max_asked": 500}, set()),
    ],
)
def test_what_a_setting_asks_for_again(
    endpoint: QuestionWriter, world: Path, change: dict[str, Any], again: set[str]
) -> None:
    run(world, recipe(world, endpoint))
    before = set(asked(endpoint))
    run(world, recipe(world, endpoint, **change))
    after = asked(endpoint)[len(before) :]
    assert len(after) == len(set(after))
    assert {"write" if "<question>" in question else "vote" for question, _ in before & set(after)} == again


FAILPOINTS = ("ledger.committed:2", "stage.ended/synthesise", "ledger.inserted:4")


@pytest.mark.slow
@pytest.mark.parametrize("failpoint", FAILPOINTS)
def test_a_kill_loses_nothing_that_is_stored_and_changes_nothing(
    endpoint: QuestionWriter, world: Path, failpoint: str
) -> None:
    tree = recipe_tree(world, endpoint.url, count=60)
    tree["distill"]["students"] = ["qwen2-0.2m"]
    path = write_yaml(world / "recipe.yaml", tree)
    straight = potstill("generate", path, "--out", world / "straight")
    assert straight.returncode == 0, straight.stderr
    endpoint.payloads.clear()
    died = potstill("generate", path, "--out", world / "killed", POTSTILL_FAILPOINT=failpoint)
    assert died.returncode == -signal.SIGKILL, died.stderr
    with Ledger.open(world / "killed/written/generate/ledger.sqlite") as ledger:
        stored = {int(re.findall(r"\(seed (\d+)\)", row[3])[-1]) for row in ledger.scan()}
    assert stored or failpoint == "ledger.inserted:1"
    assert read_manifest(world / "killed/written/generate/questions/synthesised") is None
    endpoint.payloads.clear()
    again = potstill("generate", path, "--out", world / "killed")
    assert again.returncode == 0, again.stderr
    assert not stored & {seed for _, seed in asked(endpoint)}, "what is in the ledger is not asked for again"
    for name in ("problems.parquet", "dropped.parquet", "funnel.json"):
        one, other = (world / out / "written/generate/questions/synthesised" / name for out in ("straight", "killed"))
        assert one.read_bytes() == other.read_bytes()
    traces = [read_records(world / out / "written/generate/traces", Trace) for out in ("straight", "killed")]
    assert traces[0] == traces[1]


def test_a_teacher_that_cannot_write_questions_ends_with_the_reasons(world: Path) -> None:
    class Mute(QuestionWriter):
        def _question(self, asked: str, draw: Any) -> str:
            return "What?"

    with serving(Mute()) as endpoint:  # type: ignore[arg-type]
        with pytest.raises(DataError, match=r"no question is left: of 24 asked for 24 went with 'no <question> with"):
            run(world, recipe(world, endpoint, count=3))  # type: ignore[arg-type]
        assert len(endpoint.payloads) == 24, "eight for each that is wanted, and no vote"
    assert json.loads((questions(world) / "funnel.json").read_text())[0] == {
        **{"filter": "readable", "in": 24, "out": 0, "reasons": {"no <question> with </question>": 24}},
        "examples": json.loads((questions(world) / "funnel.json").read_text())[0]["examples"],
    }
    assert read_manifest(world / "run/generate") is None


def test_another_teacher_may_write_and_answer(endpoint: QuestionWriter, world: Path) -> None:
    with serving(QuestionWriter(model="writer")) as writer:  # type: ignore[arg-type]
        own = {"backend": "openai", "model": "writer", "base_url": writer.url, "prompt_suffix": BOX}
        run(world, recipe(world, endpoint, teacher={**own, "reasoning": "plain"}))
        assert any("<question>" in question for question, _ in asked(writer))  # type: ignore[arg-type]
    assert len(endpoint.payloads) == 60, "the recipe's teacher answers what the other one wrote"
    assert not any("<question>" in question for question, _ in asked(endpoint))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"seeds": [{"kind": "local", "path": "s.jsonl", "grader": "judge"}]},
            r"problems\.0: seeds: answers are compared as mathematics, got seeds with the grader judge",
        ),
        ({"modes": {"new": 0}}, r"problems\.0\.modes: all are 0"),
        ({"modes": {"news": 1}}, r"problems\.0\.modes"),
        ({"min_agreement": 0.5}, r"problems\.0\.min_agreement: must be above 0\.5, got 0\.5"),
        (
            {"seeds": [{"kind": "synthesised", "count": 3, "seeds": []}]},
            r"problems\.0\.seeds\.0: 'kind' must be one of",
        ),
    ],
)
def test_settings_that_cannot_be(world: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse(Recipe, recipe_tree(world, "http://127.0.0.1:9/v1", **change), where="r.yaml")


def test_sources_are_apart_and_on_one_machine(world: Path) -> None:
    tree = recipe_tree(world, "http://127.0.0.1:9/v1")
    with pytest.raises(RecipeError, match="two synthesised sources are called 'synthesised'"):
        parse(Recipe, {**tree, "problems": tree["problems"] * 2}, where="r.yaml")
    with pytest.raises(RecipeError, match=r"generate\.part: questions are synthesised on one machine"):
        parse(Recipe, {**tree, "generate": {"part": "1/2"}}, where="r.yaml")


def test_checks_see_seeds_suites_and_the_writer(world: Path) -> None:
    tree = recipe_tree(world, "http://127.0.0.1:9/v1", teacher={"backend": "native", "model": "nowhere"})
    tree["distill"]["students"] = ["qwen2-0.2m"]
    checks = dict(recipe_checks(Recipe.model_validate(tree), world))
    assert checks["problems"]().endswith("11 local problems")
    assert checks["synthesis"]() == (
        "12 questions for synthesised: at most 96 asked for, 5 answers to each that is new"
    )
    with pytest.raises(Exception, match="nowhere: no such checkpoint folder"):
        checks["teacher of synthesised"]()
    tree["problems"][0]["teacher"] = None
    tree["eval"]["suites"] = ["held_out", "math501"]
    with pytest.raises(RecipeError, match="unknown suite 'math501'"):
        check_recipe(Recipe.model_validate(tree), ("generate",), base_dir=world)
