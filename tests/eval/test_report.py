from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distill.manifest import run_stage
from distill.recipe import VerifyConfig
from distill.verify.audit import Audit, AuditSummary
from eval.charts import short_count
from eval.compare import compare_run
from eval.page import duration, visible
from eval.report import MAX_PAGE_BYTES, write_report
from eval.traces import MAX_TRACES
from tests.eval.synthetic_run import FAMILIES, SIZES, write_synthetic_run

SUITES = ("pico", "math500", "gsm8k")


def write(run: Path) -> list[str]:
    cost = {"elapsed_s": lambda: 2.0, "peak_rss_bytes": lambda: 3 * 10**8}
    return write_report(compare_run(run), run / "report", device="a laptop", **cost)


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """One question a family, so that every trace shown is the hostile one."""
    run = write_synthetic_run(tmp_path_factory.mktemp("run") / "pico", suites=SUITES, questions=1, samples=8)
    write(run)
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


def pages_of(report: Path) -> list[Path]:
    return [report / "index.html", *sorted((report / "traces").iterdir())]


def test_pages_have_no_script_and_make_no_request(report):
    pages = pages_of(report)
    assert [page.name for page in pages[1:]] == [f"{suite}-001.html" for suite in sorted(SUITES)]
    for path in pages:
        text = path.read_text()
        page = Page(text)
        names = {tag for tag, _ in page.tags}
        assert not names & {"script", "iframe", "img", "object", "embed", "form"}
        assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
        assert not re.search(r"url\((?!#)|@import", text)
        policy = next(a["content"] for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
        assert policy.startswith("default-src 'none'")
        for link in [a[k] for _, a in page.tags for k in ("href", "src", "xlink:href") if k in a]:
            file, _, anchor = link.partition("#")
            target = path if not file else path.parent / file
            assert link == "data:," or target.is_file(), link
            assert not anchor or f'id="{anchor}"' in target.read_text(), link


def test_hostile_text_is_shown_not_run(report):
    for path in pages_of(report):
        words = "".join(Page(path.read_text()).words)
        for shown in (
            "<script>document.title='owned'</script>",
            "{{ 7 * 7 }}",
            "</pre></article>",
            "\\u202egnp.exe\\u0000",
        ):
            assert shown in words
        assert "\u202e" not in words
    assert "<b>base_conversion</b> &" in "".join(Page((report / "index.html").read_text()).words)


def test_figures_and_tables_can_be_read_without_seeing(report):
    page = Page((report / "index.html").read_text())
    figures = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(figures) == 2 * 9, "three a suite, families but of gsm8k, and training curves; each wide and narrow"
    assert all(attributes["role"] == "img" for attributes in figures)
    assert sum(tag == "title" for tag, _ in page.tags) == 1 + len(figures), "the page's and one a figure"
    for path in pages_of(report):
        tags = Page(path.read_text()).tags
        assert all("scope" in attributes for tag, attributes in tags if tag == "th")
        assert sum(tag == "table" for tag, _ in tags) == sum(tag == "caption" for tag, _ in tags)
        ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
        assert len(ids) == len(set(ids)), "charts name their parts: no two alike"


def test_everything_scored_is_in_the_page(report):
    words = "".join(Page((report / "index.html").read_text()).words)
    for name in (*SIZES, *(family.replace("_", " ") for family in FAMILIES), "decontaminate", "deduplicate", "teacher"):
        assert name in words
    assert "0 occur among the 7,410 training questions" in words
    assert "NVIDIA H200" in words
    suites = json.loads((report / "summary.json").read_text())["suites"]
    unreadable = sum(model["unverifiable"] for suite in suites for model in suite["models"])
    samples = sum(model["num_samples"] for suite in suites for model in suite["models"])
    assert unreadable > 0
    assert f"{unreadable:,} of {samples:,} answers have a reference that no rule can read" in words


def test_every_suite_has_a_section_with_its_own_scores(report):
    text = (report / "index.html").read_text()
    summary = json.loads((report / "summary.json").read_text())
    places = [text.index(f'<section id="suite-{suite}"') for suite in SUITES]
    assert places == sorted(places)
    for suite, start, end in zip(
        summary["suites"], places, [*places[1:], text.index('<section id="funnel"')], strict=True
    ):
        section = " ".join(" ".join(Page(text[start:end]).words).split())
        assert suite["size_verdict"] in section
        for model in suite["models"]:
            low, high = (100 * bound for bound in model["scores"]["pass@1"]["ci95"])
            row = f"{model['name']} {100 * model['scores']['pass@1']['value']:.1f} {low:.1f} – {high:.1f}"
            assert row in section
            assert f"{model['truncated']:.1%}" in section
        for student in summary["students"]:
            for difference in student["gained"][suite["name"]].values():
                low, high = (100 * bound for bound in difference["ci95"])
                assert f"{100 * difference['value']:+.1f} {low:+.1f} to {high:+.1f}" in section
    overview = " ".join(" ".join(Page(text[: places[0]]).words).split())
    for suite in summary["suites"]:
        assert f"{suite['name']} : {suite['size_verdict']}" in overview
        for model in suite["models"]:
            if model["role"] == "distilled":
                assert f"{100 * model['scores']['pass@1']['value']:.1f} " in overview


def test_the_best_student_is_marked_and_the_rule_said(report):
    words = " ".join(" ".join(Page((report / "index.html").read_text()).words).split())
    best = json.loads((report / "summary.json").read_text())["best"]
    assert (
        f"Best student: {best['student']}, by the highest pass@1 on pico, of equals the smaller (push.best_by)."
        in words
    )
    assert [name for name in SIZES if f"{name} best " in words] == [best["student"]]


def test_traces_beside_the_page_are_those_of_all_models(report):
    page = Page((report / "traces" / "pico-001.html").read_text())
    assert sum(tag == "article" for tag, _ in page.tags) == 13 * len(FAMILIES)
    words = " ".join(" ".join(page.words).split())
    assert "Questions 1 to 10 of 10" in words
    assert words.count("reference: 3") == len(FAMILIES)
    assert "answer: 3" in words


@pytest.mark.slow
def test_a_page_holds_300_traces_and_3_mb_whatever_is_in_them(tmp_path):
    run = write_synthetic_run(tmp_path / "pico", suites=SUITES, questions=8, samples=1)
    for path in (run / "eval").glob("*/samples.parquet"):
        table = pq.read_table(path)
        text = pa.array(["\u202e" * 7_000] * len(table))  # six characters each, once they can be seen
        pq.write_table(table.set_column(table.schema.get_field_index("text"), "text", text), path)
    write(run)
    pages = pages_of(run / "report")
    names = ["gsm8k-001.html", "math500-001.html", "math500-002.html", *(f"pico-00{n}.html" for n in range(1, 5))]
    assert [page.name for page in pages[1:]] == names, "23 questions a page of 13 models"
    assert MAX_PAGE_BYTES / 2 < pages[0].stat().st_size <= MAX_PAGE_BYTES
    texts = [page.read_text() for page in pages]
    counts = [text.count('<article class="role-teacher">') for text in texts]
    assert counts[1:] == [8, 23, 17, 23, 23, 23, 11]
    assert 3 <= counts[0] < 18, "every suite shows some; six of each would be too much"
    assert max(text.count("<article") for text in texts) <= MAX_TRACES


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
    write(run)
    words = " ".join(" ".join(Page((run / "report/index.html").read_text()).words).split())
    assert "Nothing was relabelled: the recipe did not ask for it ( verify.relabel: never )." in words
    assert "1,234 questions have answers" in words
    assert words.count("answers agree kept") == 20
    said = json.loads((run / "report/summary.json").read_text())["audit"]
    assert (len(said["suspected_references"]), said["num_suspected_references"]) == (20, 1_234)


@pytest.mark.parametrize("left", ["no file", "nothing to audit"])
@pytest.mark.slow
def test_where_nothing_was_audited_there_is_no_section(tmp_path, left):
    run = write_synthetic_run(tmp_path / "pico", questions=1)
    path = run / "curate" / "audit.json"
    path.unlink() if left == "no file" else path.write_text(Audit({}, VerifyConfig()).summary().model_dump_json())
    write(run)
    text = (run / "report" / "index.html").read_text()
    assert "second grader" not in text
    assert "#audit" not in text
    audit = json.loads((run / "report/summary.json").read_text())["audit"]
    assert audit is None if left == "no file" else (audit["answers"], audit["rate"]) == (0, None)


def test_pictures_are_pictures(report):
    charts = [
        f"{kind}-{suite}" for kind, suite in (("accuracy_by_parameters", "gsm8k"), ("accuracy_by_family", "math500"))
    ]
    for name in (*charts, "filter_funnel"):
        data = (report / f"{name}.png").read_bytes()
        assert data.startswith(b"\x89PNG")
        assert len(data) > 10_000
        assert ElementTree.parse(report / f"{name}.svg").getroot().tag.endswith("svg")


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
    shutil.rmtree(run / "distill")
    names = {path.stem for path in map(Path, write(run))}
    charts = {"accuracy_by_parameters-pico", "accuracy_against_cost-pico"}
    assert names == charts | {"index", "scores", "summary", "pairs", "tradeoffs", "traces"}


def test_examples_that_a_student_left_out_are_counted_in_its_tokens(tmp_path):
    run = write_synthetic_run(tmp_path / "small", questions=2, samples=1)
    dropped = {"qwen2-0.2m-distilled": 12, "qwen2-0.8m-distilled": 0}
    counts = {"dropped": dropped, "dropped_tokens": {"qwen2-0.2m-distilled": 60_123, "qwen2-0.8m-distilled": 0}}
    run_stage("distill", {}, {}, run / "distill", lambda: counts, [])
    write(run)
    words = " ".join("".join(Page((run / "report" / "index.html").read_text()).words).split())
    assert "qwen2-0.2m-distilled left out 12 of them that are too long for it, 60,123 of its tokens." in words
    assert "qwen2-0.8m-distilled left out" not in words


@pytest.mark.parametrize(
    ("text", "shown"),
    [("a\nb\tc", "a\nb\tc"), ("\u202eab", "\\u202eab"), ("\x1b[31m", "\\u001b[31m"), ("é漢🙂", "é漢🙂")],
)
def test_visible(text, shown):
    assert visible(text) == shown


def test_units():
    assert [duration(s) for s in (8.24, 185, 7_800)] == ["8.2 s", "3 min 05 s", "2 h 10 min"]
    assert [short_count(n) for n in (203_168, 11_842_560, 671e9)] == ["203k", "11.8M", "671B"]
