"""Keep the report of a finished run beside the measurements, as the run wrote it.

    python -m benchmarks.keep_run runs/small

copies its summary, page, tables and charts to benchmarks/results/<device>/<run>, the device being the one that the
summary names. The pages of all traces stay in the run: they hold the questions of whole benchmarks.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from benchmarks.device import RESULTS, slug

CSVS = ("scores.csv", "pairs.csv", "tradeoffs.csv", "contamination.csv")  # that the page links to
KEPT = ("summary.json", "summary.md", *CSVS, "index.html", "*.png")


def keep_run(run: Path, results: Path = RESULTS) -> Path:
    """Returns the folder. Raises OSError or ValueError where there is no summary, or none that names its device."""
    report = run / "report"
    summary = json.loads((report / "summary.json").read_text("utf-8"))
    if not summary.get("device"):
        raise ValueError(f"{report / 'summary.json'}: names no device; run `potstill compare` again")
    folder = results / slug(summary["device"]) / summary["name"]
    if folder.is_dir():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    for pattern in KEPT:
        for path in sorted(report.glob(pattern)):
            shutil.copyfile(path, folder / path.name)
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.keep_run", description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, help="the folder of a finished run, such as runs/small")
    try:
        folder = keep_run(parser.parse_args().run)
    except (OSError, ValueError) as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    print(f"{folder}: written; `make readme` puts its scores into the documents")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
