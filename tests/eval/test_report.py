from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from distill.manifest import run_stage
from distill.recipe import VerifyConfig
from distill.verify.audit import Audit, AuditSummary
from eval.charts import short_count
from eval.compare import compare_run
from eval.report import duration, visible, write_report
from tests.eval.synthetic_run import FAMILIES, SIZES, write_synthetic_run


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """One question a family, so that every trace shown is the hostile one."""
    run = write_synthetic_run(tmp_path_factory.mktemp("run") / "pico", questions=1, samples=8)
    write_report(compare_run(run), run / "report", elapsed_s=lambda: 2.0, peak_rss_bytes=3 * 10**8)
    return run / "report"


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)


def test_it_is_one_file_without_script_or_request(report):
    text = (report / "index.html").read_text()
    page = Page(text)
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "iframe", "img", "object", "embed", "form"}
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    links = [a[k] for _, a in page.tags for k in ("href", "src", "xlink:href") if k in a]
    assert all(link.startswith("#") or link == "data:," for link in links)
    assert not re.search(r"url\((?!#)|@import", text)
    policy = next(a["content"] for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")


def test_hostile_text_is_shown_not_run(report):
    words = "".join(Page((report / "index.html").read_text()).words)
    for shown in (
        "<script>document.title='owned'</script>",
        "{{ 7 * 7 }}",
        "</pre></article>",
        "\\u202egnp.exe\\u0000",
    ):
        assert shown in words
    assert "\u202e" not in words
    assert "<b>base_conversion</b> &" in words


def test_figures_and_tables_can_be_read_without_seeing(report):
    page = Page((report / "index.html").read_text())
    figures = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(figures) == 2
    assert all(attributes["role"] == "img" for attributes in figures)
    assert sum(tag == "title" for tag, _ in page.tags) == 3, "the page's and one a figure"
    assert all("scope" in attributes for tag, attributes in page.tags if tag == "th")
    ids = [attributes["id"] for _, attributes in page.tags if attributes.get("id", "").startswith("h-")]
    assert len(ids) == len(set(ids))
    targets = {a["href"][1:] for t, a in page.tags if t == "a"}
    assert targets <= {a.get("id") for _, a in page.tags}


def test_everything_scored_is_in_the_page(report):
    words = "".join(Page((report / "index.html").read_text()).words)
    for name in (*SIZES, *(family.replace("_", " ") for family in FAMILIES), "decontaminate", "deduplicate", "teacher"):
        assert name in words
    assert "0 occur among the 7,410 training questions" in words
    summary = json.loads((report / "summary.json").read_text())
    assert [stage["name"] for stage in summary["stages"]] == ["generate", "curate", "distill", "eval", "compare"]


def test_the_funnel_says_what_each_filter_dropped(report):
    page = Page((report / "index.html").read_text())
    words = " ".join("".join(page.words).split())
    assert "7,410 of 8,192 traces became training examples" in words
    assert [f"{100 * dropped / given:.1f}%" in words for dropped, given in ((388, 8192), (90, 7790))] == [True, True]
    assert words.count("shares 'how many <b>bold</b> apples' with the held-out question") == 2 + 2, "two of questions"
    assert "37 of the examples are second tries, asked with the reference as a hint." in words
    assert "\\u202e?" in words
    assert "tales: 512 of 900 questions that were asked for are kept." in words
    widths = [a["style"] for tag, a in page.tags if tag == "b" and "style" in a]
    assert widths[:2] == [f"width: {100 * kept / 900:.2f}%" for kept in (640, 512)]
    assert widths[2:7] == [f"width: {100 * kept / 8192:.2f}%" for kept in (7804, 7804, 7790, 7700, 7410)]
    summary = json.loads((report / "summary.json").read_text())
    assert summary["funnel"][3] == {"filter": "decontaminate", "in": 7790, "out": 7700}


def test_the_audit_says_how_often_the_graders_differ_and_what_was_relabelled(report):
    page = Page((report / "index.html").read_text())
    words = " ".join(" ".join(page.words).split())
    assert "went over 12 graded answers of the teacher's and could decide 12." in words
    cells = words[words.index("rate of disagreement") :]
    assert cells.startswith("rate of disagreement 12 12 2 1 1 16.67% 4.70 – 44.80 ")
    assert "2 questions have answers that agree with each other and never with the reference." in words
    asked = (
        "The recipe asked for it ( verify.relabel: majority ): the majority's answer took the place of 1 reference, "
    )
    assert f"{asked}so that 4 samples count as correct." in words
    assert "first: correct, second: wrong 000000000000 </pre><script>1</script>\\u202e? reference: 7 answer: 8" in words
    assert "first: wrong, second: correct" in words
    assert words.index("4 of 5 answers agree relabelled What is 4 + 4? reference: 9 majority: 8") < words.index(
        "4 of 4 answers agree kept What is <b>5 + 5</b>? reference: 11 majority: 10"
    )
    assert ("a", {"href": "#audit"}) in page.tags
    audit = json.loads((report / "summary.json").read_text())["audit"]
    wanted = {"answers": 12, "decided_by_both": 12, "disagreements": 2, "relabel": "majority"}
    wanted |= {"num_suspected_references": 2, "num_relabelled_references": 1, "num_relabelled_samples": 4}
    assert {name: audit[name] for name in wanted} == wanted
    assert audit["rate"] == pytest.approx(1 / 6)
    assert [(one["answer"], one["first"]) for one in audit["examples"]] == [("8", "correct"), ("7.0", "wrong")]
    assert [(one["majority"], one["relabelled"]) for one in audit["suspected_references"]] == [
        ("8", True),
        ("10", False),
    ]


def test_what_was_not_relabelled_is_said_to_be_nobodys_wish(tmp_path):
    run = write_synthetic_run(tmp_path / "pico", questions=1)
    path = run / "curate" / "audit.json"
    audit = AuditSummary.model_validate_json(path.read_text())
    kept = [one.model_copy(update={"relabelled": False}) for one in audit.suspected_references]
    many = tuple(kept[number % 2].model_copy(update={"problem_id": str(number)}) for number in range(1_234))
    changed = {"relabel": "never", "suspected_references": many}
    path.write_text(audit.model_copy(update=changed).model_dump_json())
    write_report(compare_run(run), run / "report", elapsed_s=lambda: 1.0, peak_rss_bytes=1)
    words = " ".join(" ".join(Page((run / "report/index.html").read_text()).words).split())
    assert "Nothing was relabelled: the recipe did not ask for it ( verify.relabel: never )." in words
    assert "1,234 questions have answers" in words
    assert words.count("answers agree kept") == 20
    said = json.loads((run / "report/summary.json").read_text())["audit"]
    assert (len(said["suspected_references"]), said["num_suspected_references"]) == (20, 1_234)


@pytest.mark.parametrize("left", ["no file", "nothing to audit"])
def test_where_nothing_was_audited_there_is_no_section(tmp_path, left):
    run = write_synthetic_run(tmp_path / "pico", questions=1)
    path = run / "curate" / "audit.json"
    path.unlink() if left == "no file" else path.write_text(Audit({}, VerifyConfig()).summary().model_dump_json())
    write_report(compare_run(run), run / "report", elapsed_s=lambda: 1.0, peak_rss_bytes=1)
    text = (run / "report" / "index.html").read_text()
    assert "second grader" not in text
    assert "#audit" not in text
    audit = json.loads((run / "report/summary.json").read_text())["audit"]
    assert audit is None if left == "no file" else (audit["answers"], audit["rate"]) == (0, None)


def test_pictures_are_pictures(report):
    for name in ("accuracy_by_parameters", "accuracy_by_family", "filter_funnel"):
        data = (report / f"{name}.png").read_bytes()
        assert data.startswith(b"\x89PNG")
        assert len(data) > 10_000


def test_a_run_without_families_teacher_or_funnel_has_a_report_too(tmp_path):
    run = write_synthetic_run(tmp_path / "small", questions=2)
    shutil.rmtree(run / "eval" / "teacher")
    shutil.rmtree(run / "curate")
    for folder in (run / "eval").iterdir():
        if folder.is_dir():
            cards = json.loads((folder / "scores.json").read_text())
            (folder / "scores.json").write_text(json.dumps(cards[:1]))
            if folder.name.endswith("-direct"):
                shutil.rmtree(folder)
    written = write_report(compare_run(run), run / "report", elapsed_s=lambda: 1.0, peak_rss_bytes=1)
    assert written == ["accuracy_by_parameters.png", "index.html", "summary.json"]


def test_examples_that_a_student_left_out_are_counted_in_its_tokens(tmp_path):
    run = write_synthetic_run(tmp_path / "small", questions=2, samples=1)
    dropped = {"qwen2-0.2m-distilled": 12, "qwen2-0.8m-distilled": 0}
    counts = {"dropped": dropped, "dropped_tokens": {"qwen2-0.2m-distilled": 60_123, "qwen2-0.8m-distilled": 0}}
    run_stage("distill", {}, {}, run / "distill", lambda: counts, [])
    write_report(compare_run(run), run / "report", elapsed_s=lambda: 1.0, peak_rss_bytes=1)
    words = " ".join("".join(Page((run / "report" / "index.html").read_text()).words).split())
    assert "qwen2-0.2m-distilled left out 12 of them that are too long for it, 60,123 of its tokens." in words
    assert "qwen2-0.8m-distilled left out" not in words


@pytest.mark.browser
def test_it_opens_in_chromium_without_an_error(report, tmp_path):
    """Headless, scripts allowed: whatever were to run or to be fetched would show in the log or in the title."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("Chromium is not installed")
    common = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    common += [f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--v=0"]
    url = (report / "index.html").as_uri()
    dom = subprocess.run([*common, "--dump-dom", url], capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in dom.stderr, dom.stderr
    faulty = tmp_path / "faulty.html"
    faulty.write_text((report / "index.html").read_text().replace("</main>", "<script>1</script></main>"))
    control = subprocess.run([*common, "--dump-dom", faulty.as_uri()], capture_output=True, text=True, timeout=120)
    assert "CONSOLE" in control.stderr, "the page's policy refuses a script, and the log would show it"
    assert "<title>pico · potstill report</title>" in dom.stdout
    assert "owned</title>" not in dom.stdout
    page = Page(dom.stdout)
    assert sum(tag == "svg" for tag, _ in page.tags) == 2, "model text opened no element of its own"
    assert not any(tag in ("script", "img") for tag, _ in page.tags)
    for width in (390, 1200):
        picture = tmp_path / f"{width}.png"
        shot = [*common, f"--window-size={width},2000", f"--screenshot={picture}", url]
        subprocess.run(shot, capture_output=True, timeout=120, check=True)
        assert picture.stat().st_size > 20_000, "a blank page compresses to less"


@pytest.mark.parametrize(
    ("text", "shown"),
    [("a\nb\tc", "a\nb\tc"), ("\u202eab", "\\u202eab"), ("\x1b[31m", "\\u001b[31m"), ("é漢🙂", "é漢🙂")],
)
def test_visible(text, shown):
    assert visible(text) == shown


def test_units():
    assert [duration(s) for s in (8.24, 185, 7_800)] == ["8.2 s", "3 min 05 s", "2 h 10 min"]
    assert [short_count(n) for n in (203_168, 11_842_560, 671e9)] == ["203k", "11.8M", "671B"]
