"""The report in headless Chromium: nothing runs, nothing is fetched, nothing is cut off."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.eval.synthetic_run import SIZES, write_synthetic_run
from tests.eval.test_report import SUITES, Page, pages_of, write

pytestmark = pytest.mark.browser

# Boxes that reach beyond the window or are scrolled out of their place, and columns and charts that show nothing.
MEASURE = """
document.querySelectorAll("details").forEach(d => d.open = true);
const shown = e => e.getClientRects().length > 0;
const name = e => e.tagName + "." + (e.getAttribute("class") || "") + " " + (e.textContent || "").trim().slice(0, 40);
const boxes = [...document.querySelectorAll("svg, table, td, tbody th, pre, h1, h2, dd")].filter(shown);
const out = boxes.filter(e => { const r = e.getBoundingClientRect(); return r.right > innerWidth + 1 || r.left < -1; });
const places = [...document.querySelectorAll(".scroll, pre")].filter(shown);
const scrolled = places.filter(e => e.scrollWidth > e.clientWidth + 1);
const empty = [...document.querySelectorAll("td, svg")].filter(shown).filter(e => e.getBoundingClientRect().width < 8);
const svgs = [...document.querySelectorAll("svg")].filter(shown);
const letters = svgs.flatMap(s => [...s.querySelectorAll("text")]).map(t => t.getBoundingClientRect().height);
const clipped = svgs.flatMap(s => [...s.querySelectorAll("text")].filter(t => {
  const a = t.getBoundingClientRect(), b = s.getBoundingClientRect();
  return a.left < b.left - 1 || a.right > b.right + 1 || a.top < b.top - 1 || a.bottom > b.bottom + 1;
}));
parent.postMessage(JSON.stringify({
  width: innerWidth, charts: svgs.length, boxes: boxes.length, letters: Math.min(...letters, 99),
  out: out.map(name), scrolled: scrolled.map(name), empty: empty.map(name), clipped: clipped.map(name),
}), "*");
"""
# A window of Chromium is 500 pixels wide or more; a frame is as narrow as a telephone.
FRAME = """<!doctype html><body><script>
addEventListener("message", e => document.body.setAttribute("data-measured", e.data));
</script><iframe src="{page}" style="width: {width}px; height: 2000px; border: 0"></iframe></body>"""


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """With names as long as those of published models."""
    sizes = {f"{name}-coder-instruct": size for name, size in SIZES.items()}
    folder = tmp_path_factory.mktemp("run") / "pico"
    run = write_synthetic_run(folder, suites=SUITES, sizes=sizes, questions=2, samples=4)
    write(run)
    return run / "report"


@pytest.fixture
def chromium(tmp_path) -> list[str]:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("Chromium is not installed")
    common = [found, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    return [*common, f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--v=0"]


def test_pages_open_without_an_error(report, chromium, tmp_path):
    """Scripts allowed: whatever were to run or to be fetched would show in the log or in the title."""
    for path in pages_of(report):
        command = [*chromium, "--dump-dom", path.as_uri()]
        dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        assert "CONSOLE" not in dom.stderr, dom.stderr
        assert "· potstill report</title>" in dom.stdout
        assert "owned</title>" not in dom.stdout
        tags = Page(dom.stdout).tags
        assert sum(tag == "svg" for tag, _ in tags) == sum(t == "svg" for t, _ in Page(path.read_text()).tags)
        assert not any(tag in ("script", "img") for tag, _ in tags), "model text opened no element of its own"
    faulty = tmp_path / "faulty.html"
    faulty.write_text((report / "index.html").read_text().replace("</main>", "<script>1</script></main>"))
    command = [*chromium, "--dump-dom", faulty.as_uri()]
    control = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert "CONSOLE" in control.stderr, "the page's policy refuses a script, and the log would show it"


@pytest.mark.parametrize("width", [375, 700, 1160, 1400, 1920])  # 700: A4; at 1160 rows are not stacked yet
@pytest.mark.parametrize("number", [0, 3])
def test_nothing_is_cut_off(report, chromium, tmp_path, width, number):
    measured = measure(pages_of(report)[number], chromium, tmp_path, width)
    assert measured["width"] == width
    assert measured["boxes"] > 100
    assert measured["charts"] == (9 if number == 0 else 0), "of wide and narrow charts one is shown"
    assert measured["letters"] >= 9, "pixels, of the smallest letters in a chart"
    assert {name: measured[name] for name in ("out", "scrolled", "empty", "clipped")} == {
        "out": [],
        "scrolled": [],
        "empty": [],
        "clipped": [],
    }


def test_the_measure_sees_what_is_cut_off(report, chromium, tmp_path):
    wide = tmp_path / "wide.html"
    text = (report / "index.html").read_text()
    wide.write_text(text.replace("<td data-label", '<td style="min-width: 30rem" data-label'))
    measured = measure(wide, chromium, tmp_path, 1400)
    assert measured["scrolled"]
    assert measured["out"]


def measure(page: Path, chromium: list[str], folder: Path, width: int) -> dict:
    """What a script of ours finds on the page in a frame of this width; the page's policy is left out for it."""
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text())
    inner, outer = folder / "inner.html", folder / "outer.html"
    inner.write_text(text.replace("</body>", f"<script>{MEASURE}</script></body>"))
    outer.write_text(FRAME.format(page=inner.as_uri(), width=width))
    command = [*chromium, "--window-size=2000,2000", "--virtual-time-budget=10000", "--dump-dom", outer.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    attributes = next(attributes for tag, attributes in Page(dom.stdout).tags if tag == "body")
    return json.loads(attributes["data-measured"])
