"""What makes the generate stage ask again, and what does not: through real backends, a folder's and an endpoint's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from distill.ledger import Ledger
from distill.manifest import MANIFEST
from distill.recipe import Recipe
from pipelines.context import Context
from pipelines.stages.generate import generate
from tests.teacher.backends.openai.chat_endpoint import ChatEndpoint, serving
from tests.teacher.v3_models import tiny_config, write_model_folder

NUM_PROBLEMS, NUM_SAMPLES = 3, 2
ALL = NUM_PROBLEMS * NUM_SAMPLES


class World:
    """A teacher, three questions, one ledger; `reused` runs the stage and says how many samples it did not ask for."""

    endpoint: ChatEndpoint
    patch: pytest.MonkeyPatch

    def __init__(self, folder: Path, teacher: dict[str, Any]) -> None:
        self.folder = folder
        self.teacher = teacher
        self.sampling: dict[str, Any] = {"max_tokens": 12, "seed": 5}
        self.generate: dict[str, Any] = {"num_samples": NUM_SAMPLES, "grade": False}
        self.write([f"{n} + {n + 1}?" for n in range(NUM_PROBLEMS)])

    def write(self, prompts: list[str], answer: str = "1") -> None:
        rows = [json.dumps({"prompt": prompt, "answer": answer}) for prompt in prompts]
        (self.folder / "p.jsonl").write_text("\n".join(rows) + "\n")

    def reused(self) -> int:
        recipe = Recipe.model_validate(
            {
                "name": "t",
                "problems": [{"kind": "local", "path": str(self.folder / "p.jsonl")}],
                "teacher": self.teacher,
                "generate": {**self.generate, "sampling": self.sampling},
                "distill": {"students": ["x"]},
                "eval": {"held_out": {"families": {"gcd": {}}, "count": 9, "split": "held_out"}},
            }
        )
        (self.folder / "generate" / MANIFEST).unlink(missing_ok=True)  # the ledger shall answer, not the complete stage
        manifest = generate(recipe, self.folder, Context(self.folder))
        return int(manifest.counts["reused"])

    def num_stored(self) -> int:
        with Ledger.open(self.folder / "generate" / "ledger.sqlite") as ledger:
            return len(ledger)


Change = Callable[[World], Any]
ANYWHERE: dict[str, tuple[Change, int]] = {
    "temperature": (lambda w: w.sampling.update(temperature=0.7), 0),
    "top_p": (lambda w: w.sampling.update(top_p=0.9), 0),
    "max_tokens": (lambda w: w.sampling.update(max_tokens=11), 0),
    "seed": (lambda w: w.sampling.update(seed=6), 0),
    "one problem's text": (lambda w: w.write(["0 + 1?", "1 + 2?", "2 + 3 ?"]), 2 * NUM_SAMPLES),
    "the reference answers": (lambda w: w.write(["0 + 1?", "1 + 2?", "2 + 3?"], answer="2"), 0),
    "more samples": (lambda w: w.generate.update(num_samples=5), ALL),
    "fewer samples": (lambda w: w.generate.update(num_samples=1), NUM_PROBLEMS),
    "system prompt": (lambda w: w.teacher.update(system_prompt="Think."), 0),
    "prompt suffix": (lambda w: w.teacher.update(prompt_suffix="Think."), 0),
    "an empty instruction": (lambda w: w.teacher.update(prompt_suffix=""), ALL),
    "the order of the problems": (lambda w: w.write(["2 + 3?", "0 + 1?", "1 + 2?"]), ALL),
    "nothing": (lambda w: None, ALL),
}


def edit(name: str, before: str, after: str) -> Change:
    def change(world: World) -> None:
        path = Path(world.teacher["model"]) / name
        text = path.read_text()
        assert before in text
        path.write_text(text.replace(before, after, 1))

    return change


def change_one_weight(world: World) -> None:
    from safetensors.torch import load_file, save_file

    path = Path(world.teacher["model"]) / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][0] += 0.5
    save_file(tensors, path)


def another_engine(world: World) -> None:
    import teacher.backends.native.backend as native

    world.patch.setattr(native, "ENGINE_VERSION", "another")


IN_A_FOLDER: dict[str, tuple[Change, int]] = {
    **ANYWHERE,
    "plain reasoning": (lambda w: w.teacher.update(reasoning="plain"), ALL),
    "chat template": (edit("chat_template.jinja", "assistant", "Assistant"), 0),
    "tokenizer": (edit("tokenizer.json", '"version"', ' "version"'), 0),
    "one weight": (change_one_weight, 0),
    "config": (edit("config.json", '"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'), 0),
    "end tokens": (edit("generation_config.json", "[2]", "[2, 3]"), 0),
    "backend version": (another_engine, 0),
    "top_logprobs": (lambda w: w.sampling.update(top_logprobs=2), 0),
    "thinking budget": (lambda w: w.sampling.update(max_thinking_tokens=3), 0),
    "batch size": (lambda w: w.teacher.update(batch_size=2), ALL),
    "speculation": (lambda w: w.teacher.update(speculate=True), ALL),
    "grading": (lambda w: w.generate.update(grade=True), ALL),
}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("native") / "teacher"
    write_model_folder(folder, tiny_config())
    return folder


@pytest.fixture(scope="module")
def asked_once(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose ledger holds everything."""
    folder = tmp_path_factory.mktemp("asked")
    assert World(folder, {"backend": "native", "model": str(model_folder)}).reused() == 0
    return folder


@pytest.mark.parametrize("what", IN_A_FOLDER)
def test_native(
    what: str, asked_once: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(asked_once / "generate", tmp_path / "generate")
    shutil.copytree(model_folder, tmp_path / "teacher")
    world = World(tmp_path, {"backend": "native", "model": str(tmp_path / "teacher")})
    world.patch = monkeypatch
    change, expected = IN_A_FOLDER[what]
    change(world)
    assert world.reused() == expected
    assert world.num_stored() >= ALL, "what was there stays"


ON_AN_ENDPOINT: dict[str, tuple[Change, int]] = {
    **ANYWHERE,
    "plain reasoning": (lambda w: w.teacher.update(reasoning="plain"), 0),  # no <think> is put in front
    "model": (lambda w: (setattr(w.endpoint, "model", "other"), w.teacher.update(model="other")), 0),
    "revision": (lambda w: w.teacher.update(revision="two"), 0),
    "prefilled template": (lambda w: w.teacher.update(think_prefilled=False), 0),
    "backend version": (lambda w: setattr(w.endpoint, "version", "0.32.0"), 0),
    "concurrency": (lambda w: w.teacher.update(max_concurrency=1), ALL),
    "patience": (lambda w: w.teacher.update(timeout_s=99, max_retries=1), ALL),
}


@pytest.fixture
def endpoint() -> Iterator[ChatEndpoint]:
    with serving(ChatEndpoint()) as running:
        yield running


@pytest.mark.parametrize("what", ON_AN_ENDPOINT)
def test_openai(what: str, endpoint: ChatEndpoint, tmp_path: Path) -> None:
    world = World(tmp_path, {"backend": "openai", "model": "pico", "base_url": endpoint.url, "revision": "one"})
    world.endpoint = endpoint
    assert (world.reused(), len(endpoint.payloads)) == (0, ALL)
    change, expected = ON_AN_ENDPOINT[what]
    change(world)
    assert world.reused() == expected
    wanted = NUM_PROBLEMS * world.generate["num_samples"]
    assert len(endpoint.payloads) == ALL + wanted - expected, "what is not found is asked for, and nothing else"


def test_the_same_endpoint_at_another_address_is_the_same_teacher(endpoint: ChatEndpoint, tmp_path: Path) -> None:
    world = World(tmp_path, {"backend": "openai", "model": "pico", "base_url": endpoint.url, "revision": "one"})
    assert world.reused() == 0
    with serving(ChatEndpoint()) as other:
        world.teacher["base_url"] = other.url
        assert world.reused() == ALL
        assert not other.payloads
