"""What a person can get wrong, through the real command line: one line, exit 2, nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from pipelines.cli import main
from tests.pipelines.tiny_world import make_world, potstill, tree_of, without_progress, write_yaml


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    return folder


@pytest.fixture
def own_world(world: Path, tmp_path: Path) -> Path:
    """A copy to break. Its recipe names the copy's files."""
    folder = shutil.copytree(world, tmp_path / "world")
    for name in ("recipe.yaml", "student.yaml"):
        text = (folder / name).read_text(encoding="utf-8")
        (folder / name).write_text(text.replace(str(world), str(folder)), encoding="utf-8")
    return folder


def assert_refused(world: Path, *arguments: str | Path, names: tuple[str, ...]) -> None:
    before = tree_of(world)
    result = potstill(*arguments, "--out", world / "runs")
    assert_one_line(result.returncode, result.stdout, result.stderr, names)
    assert tree_of(world) == before


def assert_one_line(code: int, out: str, err: str, names: tuple[str, ...]) -> None:
    err = without_progress(err)
    assert code == 2, err
    assert err.count("\n") == 1, err
    assert err.startswith("potstill: ")
    for name in names:
        assert name in err
    assert out == ""


def changed(world: Path, change: Callable[[dict], object]) -> Path:
    tree = yaml.safe_load((world / "recipe.yaml").read_text(encoding="utf-8"))
    change(tree)
    return write_yaml(world / "recipe.yaml", tree)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda tree: tree["generate"].update(num_sampels=3), ("generate.num_sampels: unknown key", "'num_samples'")),
        (lambda tree: tree["teacher"].update(batch_size="many"), ("teacher.batch_size", "got 'many'")),
        (lambda tree: tree["generate"].update(num_samples=0), ("generate.num_samples", "must be at least 1")),
        (lambda tree: tree["eval"].update(suites=["pco"]), ("eval.suites: unknown suite 'pco'", "did you mean 'pico'")),
        (lambda tree: tree.pop("distill"), ("distill: required",)),
        (lambda tree: tree["problems"][0].update(path="/no/such.jsonl"), ("/no/such.jsonl",)),
        (lambda tree: tree["teacher"].update(model="/no/such/teacher"), ("/no/such/teacher: no such checkpoint",)),
        (lambda tree: tree["distill"].update(students=["qwen2-0.3m"]), ("no student 'qwen2-0.3m'", "did you mean")),
    ],
    ids=[
        "unknown-key",
        "wrong-type",
        "bad-value",
        "bad-suite",
        "missing-key",
        "no-prompts",
        "no-teacher",
        "no-student",
    ],
)
def test_bad_recipe(own_world: Path, change: Callable[[dict], object], names: tuple[str, ...]) -> None:
    assert_refused(own_world, "run", changed(own_world, change), names=names)


def test_recipe_that_is_missing_or_not_yaml(own_world: Path) -> None:
    assert_refused(own_world, "generate", own_world / "none.yaml", names=("none.yaml: cannot be read",))
    (own_world / "recipe.yaml").write_text("a: [1\nb: 2", encoding="utf-8")
    assert_refused(own_world, "generate", own_world / "recipe.yaml", names=("recipe.yaml: not valid YAML",))


def test_bad_override(own_world: Path) -> None:
    recipe = own_world / "recipe.yaml"
    assert_refused(own_world, "generate", recipe, "--set", "generate.num_samples=x", names=("generate.num_samples",))
    assert_refused(own_world, "generate", recipe, "--set", "generate", names=("--set: must be a.b=value",))


@pytest.mark.parametrize(
    ("content", "names"),
    [
        (b'{"prompt": "1 + 1", "answer": "2"}\n{"prompt": "1 +', ("prompts.jsonl:2",)),
        (b'{"prompt": "1 + 1"}\n', ("prompts.jsonl:1", "answer")),
        (b'{"prompt": "caf\xe9", "answer": "2"}\n', ("prompts.jsonl",)),
        (b"", ("prompts.jsonl",)),
    ],
    ids=["torn", "no-answer", "not-utf8", "empty"],
)
def test_corrupt_prompt_file(own_world: Path, content: bytes, names: tuple[str, ...]) -> None:
    (own_world / "prompts.jsonl").write_bytes(content)
    assert_refused(own_world, "generate", own_world / "recipe.yaml", names=names)


def missing_shard(folder: Path) -> tuple[str, ...]:
    (folder / "model.safetensors").rename(folder / "elsewhere.bin")
    return ("model.safetensors",)


def torn_shard(folder: Path) -> tuple[str, ...]:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return ("model.safetensors",)


def wrong_shape(folder: Path) -> tuple[str, ...]:
    return _with_tensor(folder, lambda tensor: torch.cat([tensor, tensor]))


def not_finite(folder: Path) -> tuple[str, ...]:
    def poison(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[0] = float("nan")
        return tensor

    return (*_with_tensor(folder, poison), "not finite")


def index_outside(folder: Path) -> tuple[str, ...]:
    """An index whose shard lies beside the folder, and is a good one."""
    names = list(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "../outside.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return ("model.safetensors.index.json", "../outside.safetensors")


def _with_tensor(folder: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> tuple[str, ...]:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = change(tensors["model.norm.weight"])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return ("model.norm.weight",)


@pytest.mark.parametrize("which", ["teacher", "base"])
@pytest.mark.parametrize("harm", [missing_shard, torn_shard, wrong_shape, not_finite, index_outside])
def test_corrupt_checkpoint(
    own_world: Path,
    harm: Callable[[Path], tuple[str, ...]],
    which: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The same entry point in this process, which has imported torch already."""
    names = harm(own_world / which)
    before = tree_of(own_world)
    monkeypatch.setattr(
        "sys.argv", ["potstill", "run", str(own_world / "recipe.yaml"), "--out", str(own_world / "runs")]
    )
    with pytest.raises(SystemExit) as exited:
        main()
    captured = capfd.readouterr()
    assert_one_line(exited.value.code, captured.out, captured.err, (f"{own_world / which}", *names))
    assert tree_of(own_world) == before


@pytest.mark.slow
def test_corrupt_checkpoint_in_a_process_of_its_own(own_world: Path) -> None:
    names = not_finite(own_world / "teacher")
    assert_refused(own_world, "generate", own_world / "recipe.yaml", names=names)
