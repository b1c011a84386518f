"""What is printed is what was written: no markup is read in it, and nothing in it moves the terminal."""

from __future__ import annotations

import io
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import yaml
from rich.console import Console

from distill.findings import Finding
from distill.plain_progress import PlainProgress
from distill.printable import printable
from pipelines import cli
from pipelines.cli.output import print_findings, print_push, print_report
from pipelines.display import BarProgress
from pipelines.printing import say

# Rich's markup, emoji and links; sequences that clear a screen, set a title, write backwards; half a surrogate pair.
NASTY = [
    *("[/x]", "data[v2]/a.jsonl", "[bold]b[/bold]", "[link=http://a]x[/link]", ":smile:", "\\[x]", "[@click=f()]y[/]"),
    *("a\x1b[2Jb", "\x1b]0;title\x07", "one\rtwo", "one\ntwo", "\u202egnp.exe", "\ud800", "\x85", "\u2028", "nul\0"),
]
CURSOR = re.compile(r"\x1b\[(\?25[lh]|\d*[AK])|\r")  # how a live display draws itself again


def as_line(text: str) -> None:
    say(text)


def as_fault(text: str) -> None:
    say(f"potstill: {text}", err=True)


def as_cell(text: str) -> None:
    print_findings([Finding(text, "ok", "x"), Finding("y", "error", text)])


def as_pushed(text: str) -> None:
    print_push({"folder": text, "repo": text, "private": True, "tree": {text: 3}})


def as_scored(text: str) -> None:
    row = {"name": text, "role": "base", "num_parameters": 3, "value": 0.5, "stderr": 0, "suite": "s", "metric": "m"}
    with TemporaryDirectory() as folder:
        (Path(folder) / "summary.json").write_text(
            json.dumps({"models": [row], "best": {"student": text, "rule": text}})
        )
        print_report(Path(folder))


def as_plain_progress(text: str) -> None:
    progress = PlainProgress(sys.stdout, quiet_s=0.05)
    with progress.task(text, 3, unit=text) as task:
        time.sleep(0.06)
        task.advance(1, state=text)


def as_bar(text: str) -> None:
    stream = io.StringIO()
    bars = BarProgress(Console(file=stream, width=400, color_system=None, force_terminal=True))
    with bars.task(text, 3, unit=text) as task:
        task.advance(1, state=text)
        bars._bars.refresh()
        shown = stream.getvalue()
    sys.stdout.write(CURSOR.sub("", shown))


@pytest.mark.parametrize("door", [as_line, as_fault, as_cell, as_pushed, as_scored, as_plain_progress, as_bar])
@pytest.mark.parametrize("text", NASTY, ids=ascii)
def test_every_door_prints_text_as_it_is(
    door: Callable[[str], None], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    door(text)
    captured = capsys.readouterr()
    shown = captured.out + captured.err
    assert printable(text) in shown
    assert "\x1b" not in shown
    assert "\a" not in shown


@pytest.mark.parametrize("text", NASTY, ids=ascii)
def test_doctor_prints_a_recipe_whatever_it_is_called(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = {
        "name": text,
        "problems": [{"kind": "local", "path": text}],
        "teacher": {"backend": text},
        "distill": {"students": [text]},
    }
    (tmp_path / "r[v2].yaml").write_text(yaml.safe_dump(tree), encoding="utf-8", errors="surrogatepass")
    monkeypatch.setattr("pipelines.doctor.examine_machine", lambda folder: [])
    monkeypatch.setattr("sys.argv", ["potstill", "doctor", str(tmp_path / "r[v2].yaml")])
    with pytest.raises(SystemExit) as exited:
        cli.main()
    captured = capsys.readouterr()
    assert exited.value.code == 2
    assert "r[v2].yaml" in captured.out
    assert "\x1b" not in captured.out
    assert captured.err == ""
