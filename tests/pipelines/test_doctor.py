"""Doctor against recipes that cannot work: each is an error, in the words of the command that would refuse it."""

from __future__ import annotations

import json
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from distill.errors import PotstillError
from distill.findings import Finding
from distill.recipe import load_recipe
from pipelines import doctor
from pipelines.chain import COMMANDS
from pipelines.checks import check_recipe
from pipelines.doctor import examine_machine, examine_recipe
from tests.pipelines.tiny_world import make_world, write_yaml
from tests.repository import REPOSITORY


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    return folder


def changed(world: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    tree = yaml.safe_load((world / "recipe.yaml").read_text(encoding="utf-8"))
    change(tree)
    return write_yaml(tmp_path / "changed.yaml", tree)


def examined(path: Path, tmp_path: Path) -> dict[str, Finding]:
    return {finding.check: finding for finding in examine_recipe(path, [], REPOSITORY, tmp_path / "runs")}


def second_path(world: Path) -> str:
    """The same student by another path."""
    return str(world / "base" / ".." / "student.yaml")


def other_student(world: Path) -> str:
    """Another student under the same name."""
    tree = yaml.safe_load((world / "student.yaml").read_text(encoding="utf-8"))
    return str(write_yaml(world / "other.yaml", {**tree, "sft": {**tree["sft"], "num_epochs": 2}}))


IMPOSSIBLE: list[tuple[str, Callable[[dict[str, Any], Path], object], str]] = [
    ("no-roles", lambda tree, _: tree["eval"].update(roles=[]), "eval.roles: must not be empty"),
    (
        "roles-without-models",
        lambda tree, _: (tree["distill"].update(methods=["distilled"]), tree["eval"].update(roles=["direct"])),
        "eval.roles: distill.methods makes no direct student",
    ),
    ("no-methods", lambda tree, _: tree["distill"].update(methods=[]), "distill.methods: must not be empty"),
    ("true", lambda tree, _: tree["generate"]["sampling"].update(temperature=True), "must be a number, got true"),
    (
        "twice-by-name",
        lambda tree, _: tree["distill"].update(students=["qwen2-0.2m", "qwen2-0.2m"]),
        "distill.students: 'qwen2-0.2m' is given twice",
    ),
    (
        "twice-by-path",
        lambda tree, world: tree["distill"]["students"].append(second_path(world)),
        "are both 'tiny', and share its folder",
    ),
    (
        "two-of-one-name",
        lambda tree, world: tree["distill"]["students"].append(other_student(world)),
        "are both 'tiny', and share its folder",
    ),
    ("repository", lambda tree, _: tree.update(push={"repo": "my repo"}), "push.repo: not a repository name"),
    ("placeholder", lambda tree, _: tree.update(push={"repo": "me/{name}"}), "push.repo: not a repository name"),
    ("deep-repository", lambda tree, _: tree.update(push={"repo": "a/b/{student}"}), "push.repo: not a repository"),
    (
        "no-such-student-to-push",
        lambda tree, _: tree.update(push={"student": "tinny"}),
        "push.student: 'tinny' is not among distill.students; did you mean 'tiny'?",
    ),
    (
        "data-set",
        lambda tree, _: tree.update(push_traces={"repo": "x--y"}),
        "push_traces.repo: not a repository name",
    ),
    (
        "llama",
        lambda tree, _: (
            tree["distill"].update(students=["r1-distill-llama-8b"]),
            tree.update(push={"repo": "me/{student}"}),
        ),
        "push.repo: the licence llama3.1 asks for a name that begins with Llama, got 'me/r1-distill-llama-8b'",
    ),
]


@pytest.mark.parametrize(("change", "says"), [case[1:] for case in IMPOSSIBLE], ids=[case[0] for case in IMPOSSIBLE])
def test_what_cannot_work_is_an_error_and_its_command_refuses_it_alike(
    world: Path, tmp_path: Path, change: Callable[[dict[str, Any], Path], object], says: str
) -> None:
    path = changed(world, tmp_path, lambda tree: change(tree, world))
    errors = [finding for finding in examined(path, tmp_path).values() if finding.state == "error"]
    assert len(errors) == 1
    assert errors[0].exit_code == 2
    assert errors[0].text.startswith(f"{path}: ")
    assert says in errors[0].text
    refused = []
    for stages in COMMANDS.values():
        try:
            check_recipe(load_recipe(path), stages, base_dir=REPOSITORY)
        except PotstillError as exc:
            refused.append(str(exc))
    assert any(says in message for message in refused)


def test_questions_that_the_generator_refuses_are_an_error(world: Path, tmp_path: Path) -> None:
    path = changed(world, tmp_path, lambda tree: tree["eval"]["held_out"].update(families={"chain_smu": {}}))
    found = examined(path, tmp_path)["questions"]
    assert found.exit_code == 2
    assert "unknown reasoning-gym data set 'chain_smu'; did you mean 'chain_sum'?" in found.text


def test_a_recipe_that_works_has_its_weights_prompts_and_folder_stated(world: Path, tmp_path: Path) -> None:
    found = examined(world / "recipe.yaml", tmp_path)
    assert {finding.state for finding in found.values()} == {"ok"}
    assert found["teacher weights"].text == "whole and finite"
    assert found["teacher prompt"].text.startswith("prompt '")
    assert found["tiny distilled"].text.endswith("QUESTION<|im_end|>\\n<|im_start|>assistant\\n<think>\\n'")
    assert found["run folder"].text == str(tmp_path / "runs/tiny-world")
    assert not (tmp_path / "runs").exists()


def test_a_system_turn_of_the_template_is_shown(world: Path, tmp_path: Path) -> None:
    template = (REPOSITORY / "students/templates/chatml_think.jinja").read_text(encoding="utf-8")
    own = tmp_path / "own_think.jinja"
    own.write_text("<|im_start|>system\nYou are a careful model.<|im_end|>\n" + template, encoding="utf-8")
    tree = yaml.safe_load((world / "student.yaml").read_text(encoding="utf-8"))
    student = write_yaml(tmp_path / "student.yaml", {**tree, "chat_template": str(own)})
    path = changed(
        world, tmp_path, lambda tree: tree.update(distill={"students": [str(student)], "methods": ["distilled"]})
    )
    assert "the template itself adds 'You are a careful model.'" in examined(path, tmp_path)["tiny distilled"].text


def test_the_prompt_is_shown_as_the_teacher_is_instructed(world: Path, tmp_path: Path) -> None:
    words = {"system_prompt": "Be brief.", "prompt_suffix": "Box it."}
    found = examined(changed(world, tmp_path, lambda tree: tree["teacher"].update(words)), tmp_path)
    assert found["teacher prompt"].text.startswith("prompt '"), "the words are the recipe's, not the template's"
    assert "Be brief." in found["teacher prompt"].text
    assert "QUESTION\\n\\nBox it." in found["teacher prompt"].text
    served = {"backend": "openai", "model": "m", "base_url": "http://127.0.0.1:9/v1", **words}
    found = examined(changed(world, tmp_path, lambda tree: tree.update(teacher=served)), tmp_path)
    sent = r"sends system 'Be brief.', user 'QUESTION\n\nBox it.'; the template is the server's"
    assert found["teacher prompt"].text == sent


def test_a_system_prompt_replaces_the_one_of_the_template_and_needs_a_place_in_it(world: Path, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(world / "teacher", teacher)
    template = teacher / "chat_template.jinja"
    turns = template.read_text(encoding="utf-8")
    path = changed(world, tmp_path, lambda tree: tree["teacher"].update(model=str(teacher)))
    instructed = "teacher.system_prompt=Be brief."

    def prompt(*overrides: str) -> Finding:
        found = examine_recipe(path, overrides, REPOSITORY, tmp_path / "runs")
        return next(finding for finding in found if finding.check == "teacher prompt")

    of_its_own = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nI am I.<|im_end|>\n{% endif %}"
    template.write_text(of_its_own + turns, encoding="utf-8")
    assert prompt().text.startswith("the template itself adds 'I am I.'")
    assert "I am I." not in prompt(instructed).text
    template.write_text("{% set messages = messages[-1:] %}" + turns, encoding="utf-8")
    assert prompt().state == "ok"
    refused = prompt(instructed)
    assert (refused.state, refused.exit_code) == ("error", 2)
    assert refused.text.startswith(f"{path}: teacher.system_prompt: the chat template of {teacher} has no system turn")


def test_a_run_folder_that_cannot_be_written_is_the_machines_fault(world: Path) -> None:
    found = {f.check: f for f in examine_recipe(world / "recipe.yaml", [], REPOSITORY, Path("/sys/kernel"))}
    assert found["run folder"].exit_code == 3


class Models(BaseHTTPRequestHandler):
    """An endpoint that serves one model."""

    def do_GET(self) -> None:
        body = json.dumps({"data": [{"id": "r1"}]} if self.path.endswith("/models") else {"version": "9"}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Models) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()


@pytest.mark.parametrize(
    ("model", "state", "says"),
    [("r1", "ok", "serves 'r1', version 9"), ("r2", "error", "teacher.model: 'r2' is not served; allowed: r1")],
)
def test_an_endpoint_is_asked_which_models_it_serves(
    world: Path, tmp_path: Path, endpoint: str, model: str, state: str, says: str
) -> None:
    teacher = {"backend": "openai", "base_url": endpoint, "model": model}
    found = examined(changed(world, tmp_path, lambda tree: tree.update(teacher=teacher)), tmp_path)["endpoint"]
    assert found.state == state
    assert says in found.text


def test_an_endpoint_that_does_not_answer_is_a_warning(world: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    teacher = {"backend": "openai", "base_url": url, "model": "r1"}
    found = examined(changed(world, tmp_path, lambda tree: tree.update(teacher=teacher)), tmp_path)
    assert found["endpoint"].state == "warning"
    assert "cannot be reached" in found["endpoint"].text


def test_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvidia-smi").write_text('#!/bin/sh\necho "NVIDIA H200, 143771 MiB, 140000 MiB"\n')
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setattr(doctor, "SERVE_PORT", taken.getsockname()[1])
        found = {finding.check: finding for finding in examine_machine(tmp_path)}
    assert found["gpu"].text == "NVIDIA H200, 143771 MiB, 140000 MiB free"
    assert found["port"].state == "warning"
    assert "cannot be bound" in found["port"].text
    assert found["disk"].text.endswith("GB free here")
