"""Write the measured numbers of README.md and docs/*.md from the files that hold them.

A document marks the place of a table with two comments, each on a line of its own:

    <!-- results: NAME DEVICE -->
    ... written by this program ...
    <!-- end -->

NAME is a function of `benchmarks.readme_tables`, DEVICE a folder of benchmarks/results. A table of a run that has not
been made yet stays empty between its comments. `--check` writes nothing and
exits 1 where a document differs from its files; tests/benchmarks/test_readme.py does the same. The scores of the pico
chain come from the newest run: where `runs/pico/report/summary.json` is there, it is copied to
benchmarks/results/<this device>/pico-summary.json first, so that the documents never depend on what lies in runs/. The
run's chart goes to docs/report.png where README.md shows this device.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.device import RESULTS, device_name
from benchmarks.readme_form import NotMeasuredError, Read
from benchmarks.readme_tables import TABLES

REPOSITORY = Path(__file__).resolve().parents[1]
RUN = REPOSITORY / "runs" / "pico"
SUMMARY = "pico-summary"
CHART = "accuracy_by_parameters-pico.png"
BLOCK = re.compile(r"^<!-- results: (?P<name>[\w-]+) (?P<device>[\w-]+) -->\n(?P<body>.*?)^<!-- end -->$", re.M | re.S)
MARK = re.compile(r"^<!-- (?:results:.*|end) -->$", re.MULTILINE)


class DocumentError(ValueError):
    """A marker that nothing can be written behind: document, marker and what is wrong with it."""


def documents() -> list[Path]:
    """README.md and the pages of docs/."""
    return [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]


def written(text: str, where: str, results: Path = RESULTS) -> str:
    """Return `text` with every block as the results have it. Raises DocumentError for a marker that is not known."""

    def block(match: re.Match[str]) -> str:
        name, device = match["name"], match["device"]
        if name not in TABLES:
            raise DocumentError(f"{where}: no table is called {name}; there are {', '.join(sorted(TABLES))}")
        try:
            body = TABLES[name](_reader(results, device))
        except NotMeasuredError as exc:
            raise DocumentError(f"{where}: {name}: {exc}") from exc
        return "\n".join(filter(None, [f"<!-- results: {name} {device} -->", body, "<!-- end -->"]))

    replaced = BLOCK.sub(block, text)
    if len(MARK.findall(text)) != 2 * len(BLOCK.findall(text)):
        raise DocumentError(f"{where}: a block is not closed, or its first line is not `results: NAME DEVICE`")
    return replaced


def keep_summary(run: Path, results: Path = RESULTS, device: str | None = None) -> Path | None:
    """Copy a finished run's scores and costs to the results of `device` (this machine); None where there is no run."""
    source = run / "report" / "summary.json"
    if not source.exists():
        return None
    device = device or device_name()
    summary = json.loads(source.read_text("utf-8"))
    num_cores = len(os.sched_getaffinity(0))
    kept = {"device": device, "num_cores": num_cores, "stages": summary["stages"], "models": summary["models"]}
    path = results / device / f"{SUMMARY}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    return path


def keep_chart(run: Path, device: str, repository: Path = REPOSITORY) -> Path | None:
    """Copy the run's chart beside the documents, if README.md has the scores of `device`."""
    if f"<!-- results: pico-scores {device} -->" not in (repository / "README.md").read_text("utf-8"):
        return None
    return Path(shutil.copyfile(run / "report" / CHART, repository / "docs" / "report.png"))


def _reader(results: Path, device: str) -> Read:
    def read(name: str) -> Mapping[str, Any]:
        path = results / device / f"{name}.json"
        try:
            result: Mapping[str, Any] = json.loads(path.read_text("utf-8"))
        except OSError as exc:
            raise NotMeasuredError(f"{path} cannot be read ({exc.strerror})") from exc
        return result

    return read


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme", description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 where a document differs")
    parser.add_argument(
        "--run", type=Path, default=RUN, help="the run whose scores are kept first (default: runs/pico)"
    )
    arguments = parser.parse_args()
    if not arguments.check and (kept := keep_summary(arguments.run)):
        print(f"{kept.relative_to(REPOSITORY)}: from {arguments.run}")
        if chart := keep_chart(arguments.run, kept.parent.name):
            print(f"{chart.relative_to(REPOSITORY)}: from {arguments.run}")
    differing = []
    for path in documents():
        name = path.relative_to(REPOSITORY).as_posix()
        text = path.read_text("utf-8")
        try:
            now = written(text, name)
        except DocumentError as exc:
            print(f"error: {exc}", file=sys.stderr)
            return 2
        if now != text:
            differing.append(name)
            if not arguments.check:
                path.write_text(now, encoding="utf-8")
    for name in differing:
        print(f"{name}: {'differs from benchmarks/results: run `make readme`' if arguments.check else 'written'}")
    return int(arguments.check and bool(differing))


if __name__ == "__main__":
    raise SystemExit(main())
