"""Nothing stands in the packages that no command, benchmark or recipe reaches.

How that is found: `tests/reachability.py`. What is here for a later command is named below with its reason; what it
uses is then reached as well.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.reachability import unreached

FP8_TRAINING = "training in FP8 will use it"
ALLOWED = {
    "teacher.kernels.moe.training.experts_training.routed_experts_training": FP8_TRAINING,
    "teacher.kernels.moe.training.experts_training.routed_experts_bf16": FP8_TRAINING,
    "teacher.kernels.moe.training.experts_training.quantise_experts": FP8_TRAINING,
}


def test_everything_is_reached() -> None:
    assert unreached(allowed=ALLOWED) == []


def test_exceptions_exist_and_are_needed() -> None:
    assert set(ALLOWED) - set(unreached()) == set(), "reached, or gone: no exception"


TREE = {
    "pyproject.toml": '[project.scripts]\ntool = "pipelines.cli:main"\n',
    "eval/tasks.yaml": "target: !function grading.grade\n",
    "eval/grading.py": "def grade(): ...\ndef unused(): ...\n",
    "pipelines/__init__.py": "",
    "pipelines/cli.py": """
        from __future__ import annotations
        import typer
        app = typer.Typer()
        LIMIT, OTHER = 1, 2

        @app.command()
        def listed(): return LIMIT

        def main():
            from distill import steps
            steps.first("teacher.program")
    """,
    "distill/__init__.py": "from distill.steps import second\n",
    "distill/steps.py": """
        from teacher.model import Model as M, helper
        WIDTH = helper()
        def first(program): return M().call()
        def second(): return WIDTH
        def alone(): return second()
    """,
    "teacher/model.py": """
        import torch
        class Model:
            size: int = 0
            def call(self): return self._inner()
            def _inner(self): return 1
            def other(self): return Module()
        class Module(torch.nn.Module):
            def forward(self): ...
        def helper(): ...
    """,
    "teacher/program.py": "def job(): ...\ndef left(): ...\nif __name__ == '__main__':\n    job()\n",
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    import textwrap

    for name, text in TREE.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(textwrap.dedent(text), encoding="utf-8")
    return tmp_path


def test_what_nothing_uses_is_found(tree: Path) -> None:
    assert unreached(tree) == [
        "distill.steps.WIDTH",
        "distill.steps.second",
        "distill.steps.alone",
        "eval.grading.unused",
        "pipelines.cli.OTHER",
        "teacher.model.Model.other",
        "teacher.model.Module",
        "teacher.model.helper",
        "teacher.program.left",
    ]


def test_what_an_allowed_name_uses_is_allowed(tree: Path) -> None:
    left = unreached(tree, allowed=["distill.steps.alone"])
    assert not {"distill.steps.alone", "distill.steps.second", "distill.steps.WIDTH", "teacher.model.helper"} & set(
        left
    )
    assert "teacher.program.left" in left
