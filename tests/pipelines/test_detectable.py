from __future__ import annotations

from pathlib import Path

import pytest

from distill.recipe import EvalConfig, load_recipe
from eval.power import smallest_difference
from pipelines.detectable import detectable_differences
from pipelines.recipes import find_recipe


def test_every_suite_of_a_recipe_says_what_it_can_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = '{"id": 1, "problem": "1 + 1", "answer": "2", "solution": ""}\n'
    (tmp_path / "aime24.json").write_text(row * 1 + row.replace("1 + 1", "2 + 2"))
    suites = ["eval.suites=[pico, aime24]", f"bench_data={tmp_path}", "push.best_by=pico"]
    found = [*detectable_differences(load_recipe(find_recipe("pico"), suites), Path.cwd())]
    assert [one.check for one in found] == ["pico shows", "aime24 shows"]
    assert f"{100 * smallest_difference(400, 4):.1f} points" in found[0].text
    assert "400 questions x 4" in found[0].text
    assert "2 questions x 4" in found[1].text, "the recipe states its samples"
    limited = load_recipe(find_recipe("pico"), ["eval.limit=30", "eval.num_samples=1"])
    assert "30 questions x 1" in next(detectable_differences(limited, Path.cwd())).text


def test_problems_of_one_s_own_are_counted_too(tmp_path: Path) -> None:
    """By the recipe's samples, as long as no suite beside them has a protocol."""
    (tmp_path / "mine.jsonl").write_text("".join(f'{{"prompt": "{n} + 1?", "answer": {n + 1}}}\n' for n in range(7)))
    (tmp_path / "aime24.json").write_text('{"id": 1, "problem": "1 + 1", "answer": "2", "solution": ""}\n')
    mine = f"{{name: mine, problems: {{kind: local, path: {tmp_path / 'mine.jsonl'}}}}}"
    recipe = load_recipe(find_recipe("pico"), [f"eval.suites=[pico, {mine}]", "push.best_by=mine"])
    pico, own = [one.text for one in detectable_differences(recipe, Path.cwd())]
    assert f"7 questions x {recipe.eval.num_samples}" in own
    assert f"400 questions x {recipe.eval.num_samples}" in pico
    unstated = recipe.eval.model_dump(exclude={"num_samples", "sampling"}) | {"suites": ("mine", "aime24")}
    beside = recipe.model_copy(update={"eval": EvalConfig.model_validate(unstated), "bench_data": str(tmp_path)})
    assert beside.eval.stated("num_samples") is None
    own, aime = [one.text for one in detectable_differences(beside, Path.cwd())]
    assert "7 questions x 4" in own
    assert "1 questions x 64" in aime
