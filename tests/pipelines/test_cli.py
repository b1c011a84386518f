"""The command line as a program: exit codes, single lines, what is written and what is not."""

from __future__ import annotations

import fcntl
import importlib.metadata
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from contextlib import suppress
from pathlib import Path

import pytest

from tests.repository import REPOSITORY

PICO = "pipelines/recipes/pico.yaml"
ZOO = {path.stem for path in (REPOSITORY / "students" / "zoo").glob("*.yaml")}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "potstill", *arguments]


def potstill(*arguments: str, cwd: Path = REPOSITORY, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments),
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


HEAVY = {"torch", "transformers", "trl", "accelerate", "datasets", "lm_eval", "pyarrow", "sympy", "reasoning_gym"}


def test_help_is_quick_and_lists_every_command() -> None:
    result = potstill("--help", PYTHONPROFILEIMPORTTIME="1")
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "typer" in imported
    assert not imported & (HEAVY | {"pydantic"})
    assert result.returncode == 0
    for name in ("run", "generate", "distill", "eval", "compare", "regrade", "push", "serve", "doctor", "zoo", "init"):
        assert f"\n  {name} " in result.stdout


@pytest.mark.parametrize(
    "arguments",
    [("generate",), ("generate", PICO, "--nonsense"), ("nonsense",), ("zoo", "show"), ("serve", PICO, "--port", "x")],
)
def test_wrong_usage_exits_2(arguments: tuple[str, ...]) -> None:
    result = potstill(*arguments)
    assert result.returncode == 2
    assert "Usage: potstill" in result.stderr
    assert not result.stdout


def test_the_version_is_the_packages() -> None:
    shown = potstill("--version")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout == f"potstill {importlib.metadata.version('potstill')}\n"


def test_a_shell_completes_commands_without_heavy_imports() -> None:
    asked = {"_POTSTILL_COMPLETE": "complete_bash", "COMP_WORDS": "potstill pu", "COMP_CWORD": "1"}
    completed = potstill(PYTHONPROFILEIMPORTTIME="1", **asked)
    assert completed.stdout.split() == ["push", "push-traces"]
    assert not {line.rpartition("|")[2].strip() for line in completed.stderr.splitlines()} & HEAVY
    script = potstill("--show-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert "_POTSTILL_COMPLETE=complete_bash" in script.stdout


def test_a_bundled_recipe_goes_by_its_name_anywhere(tmp_path: Path) -> None:
    """In a folder that holds none of the files that the recipe names, and one that is called as the recipe is."""
    (tmp_path / "tiny").mkdir()
    found = potstill("compare", "tiny", cwd=tmp_path)  # looks for all of them before it misses the scores
    assert found.stderr.startswith("potstill: runs/tiny/eval/manifest.json: not there yet; run `potstill eval`")
    unknown = potstill("run", "tny", cwd=tmp_path)
    assert unknown.returncode == 2
    assert unknown.stderr == "potstill: tny: neither a file nor one of the bundled recipes; did you mean 'tiny'?\n"
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_zoo_lists_and_shows_students() -> None:
    listed = potstill("zoo", "list")
    assert listed.returncode == 0
    lines = listed.stdout.splitlines()
    names = [line.split()[0] for line in lines[1:]]
    assert names[0] == "qwen2-0.2m"
    assert names[-1] == "r1-distill-llama-70b"
    assert set(names) == ZOO
    shown = potstill("zoo", "show", "r1-distill-qwen-1.5b")
    assert "base: Qwen/Qwen2.5-Math-1.5B" in shown.stdout
    published = potstill("zoo", "show", "qwen2.5-0.5b-instruct").stdout
    assert "licence: apache-2.0" in published
    assert "  gsm8k:\n    value: 49.6\n    source: https://" in published
    unknown = potstill("zoo", "show", "qwen2-0.5m")
    assert unknown.returncode == 2
    assert unknown.stderr.count("\n") == 1
    assert "did you mean 'qwen2-0." in unknown.stderr


@pytest.mark.parametrize("num_columns", [60, 80, 200])
def test_zoo_list_cuts_no_name_in_a_terminal(num_columns: int) -> None:
    """What does not fit a narrow terminal is left out column by column; in a pipe everything is there, on one line."""
    shown, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 50, num_columns, 0, 0))
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TERM": "xterm", "COLUMNS": str(num_columns)}
    with subprocess.Popen(command("zoo", "list"), cwd=REPOSITORY, env=environment, stdout=terminal) as child:
        os.close(terminal)
        text = b""
        with suppress(OSError):  # Linux answers EIO when the last writer is gone
            while piece := os.read(shown, 65_536):
                text += piece
    os.close(shown)
    assert child.returncode == 0
    lines = re.sub(r"\x1b\[[0-9;]*m", "", text.decode()).splitlines()
    assert {line.split()[0] for line in lines[1:]} == ZOO
    assert len(lines) == 1 + len(ZOO), "no line is folded"
    assert max(map(len, lines)) <= num_columns
    assert "…" not in text.decode()
    assert ("HuggingFaceTB/SmolLM2-135M-Instruct" in text.decode()) == (num_columns == 200)


def test_the_token_is_never_shown() -> None:
    result = potstill("doctor", HF_TOKEN="hf_thisisthesecret")
    assert result.returncode == 0
    assert "present" in result.stdout
    assert "thisisthesecret" not in result.stdout + result.stderr


def test_doctor_reports_a_bad_recipe_and_exits_2(tmp_path: Path) -> None:
    recipe = tmp_path / "bad.yaml"
    recipe.write_text("name: bad\n", encoding="utf-8")
    result = potstill("doctor", str(recipe))
    assert result.returncode == 2
    assert "bad.yaml" in result.stdout
    assert "problems" in result.stdout
    assert not result.stderr


def test_no_command_reads_what_is_piped_into_it() -> None:
    """A library that asks whether it may run a folder's code is told nothing, and not `y`."""
    program = "import sys; from pipelines.cli import app, main; app.command('ask')(lambda: input('May I? ')); main()"
    asked = [sys.executable, "-c", program, "ask"]
    result = subprocess.run(
        asked, cwd=REPOSITORY, input="y\n", capture_output=True, text=True, timeout=240, check=False
    )  # fmt: skip
    assert result.returncode == 1
    assert result.stderr.strip() == "Aborted!"  # what typer makes of an input that has ended


@pytest.mark.parametrize("start", [(), ("sh", "-c", 'trap "" INT; exec "$@"', "sh")], ids=["foreground", "background"])
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_signals_end_with_one_line(sent: signal.Signals, code: int, start: tuple[str, ...]) -> None:
    """A command that waits for the signal. A shell starts what it runs in the background with SIGINT ignored."""
    waiting = "lambda: (os.write(1, b'waits'), time.sleep(240))"
    program = f"import os, time; from pipelines.cli import app, main; app.command('wait')({waiting}); main()"
    process = subprocess.Popen(
        [*start, sys.executable, "-c", program, "wait"],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.read(5) == "waits"
        process.send_signal(sent)
        out, err = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == code
    assert out == ""
    assert err.count("\n") == 1
    assert "the same command goes on" in err
