"""Reading within bounds: what is inside of them is read as ever, what is one beyond is refused by name."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, strategies as st

from distill.errors import DataError, RecipeError
from distill.problems import load_problems
from distill.reading.json_text import parse_json
from distill.reading.lines import json_rows
from distill.reading.parquet import parquet_rows
from distill.reading.yaml_text import parse_yaml
from distill.recipe import DEFAULT_LIMITS, LocalSource, ReadLimits
from tests.distill.test_recipe import GOOD, written

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=20,
)  # fmt: skip
LINE = b'{"prompt": "1+1?", "answer": "2"}\n'


def rows(path: Path, **limits: int) -> list[dict[str, Any]]:
    return [row for _, row in json_rows(path, ReadLimits(**limits))]


@given(VALUES)
def test_json_is_read_as_python_reads_it(value: Any) -> None:
    text = json.dumps(value)
    assert parse_json(text, where="x", fault=DataError) == json.loads(text)


@given(VALUES)
def test_yaml_is_read_as_pyyaml_reads_it(value: Any) -> None:
    text = yaml.safe_dump(value, allow_unicode=True)
    assert parse_yaml(text, where="x", fault=RecipeError) == yaml.safe_load(text)


def test_aliases_and_merges_are_read() -> None:
    text = "base: &base {lr: 1, steps: [1, 2]}\nmine: {<<: *base, lr: 2}\nagain: *base\n"
    tree = parse_yaml(text, where="x", fault=RecipeError)
    assert tree["mine"] == {"lr": 2, "steps": [1, 2]}
    assert tree["again"] == tree["base"]


@pytest.mark.parametrize("depth", [64, 65])
def test_nesting_is_counted_exactly(tmp_path: Path, depth: int) -> None:
    nested = "[" * (depth - 1) + "]" * (depth - 1)  # and the object around it
    (tmp_path / "t.jsonl").write_text(f'{{"x": {nested}, "y": "{"[" * 99}"}}\n')
    if depth == 64:
        assert len(rows(tmp_path / "t.jsonl")) == 1
    else:
        with pytest.raises(DataError, match=r"t\.jsonl:1: not a JSON line \(brackets are nested more than 64 deep\)"):
            rows(tmp_path / "t.jsonl")
    assert len(rows(tmp_path / "t.jsonl", nesting=65)) == 1


@pytest.mark.parametrize("packed", [False, True])
def test_a_line_may_be_as_long_as_the_limit(tmp_path: Path, packed: bool) -> None:
    path = tmp_path / ("t.jsonl.gz" if packed else "t.jsonl")
    for size in (1 << 20, (1 << 20) + 1):
        line = b'{"x": "' + b"x" * (size - 10) + b'"}\n'
        assert len(line) == size
        path.write_bytes(gzip.compress(LINE + line) if packed else LINE + line)
        if size == 1 << 20:
            assert len(rows(path, line_mib=1)) == 2
        else:
            with pytest.raises(DataError, match=r"t\.jsonl(\.gz)?:2: is over 1 MiB long \(limits\.line_mib\)"):
                rows(path, line_mib=1)


def test_lines_of_a_file_are_bounded(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl.gz"
    path.write_bytes(gzip.compress(LINE * 10))
    assert len(rows(path, rows=10)) == 10
    with pytest.raises(DataError, match=r"t\.jsonl\.gz:10: the file goes on beyond 9 lines \(limits\.rows\)"):
        rows(path, rows=9)


@pytest.mark.slow
def test_a_file_unpacks_to_so_many_bytes_and_no_more(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl.gz"
    long = b'{"x": "' + b"x" * ((1 << 20) - 10) + b'"}\n'
    path.write_bytes(gzip.compress(long, 1) * 1_025)
    with pytest.raises(DataError, match=r"t\.jsonl\.gz:1025: the file goes on beyond 1 GiB \(limits\.file_gib\)"):
        for _ in json_rows(path, ReadLimits(file_gib=1)):
            pass


def test_windows_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_bytes(b"\xef\xbb\xbf" + LINE.replace(b"\n", b"\r\n") * 2 + b"\r\n")
    assert rows(tmp_path / "t.jsonl") == [{"prompt": "1+1?", "answer": "2"}] * 2
    assert parse_yaml("\ufeffa: 1\r\nb: 2\r\n", where="x", fault=RecipeError) == {"a": 1, "b": 2}


def test_a_pair_of_surrogates_is_a_character_and_half_of_one_is_not(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(r'{"x": "\ud83d\ude00 \\ud800"}')
    assert rows(tmp_path / "t.jsonl") == [{"x": "\U0001f600 \\ud800"}]
    (tmp_path / "t.jsonl").write_text(r'{"\udfff": 1}')
    with pytest.raises(DataError, match=r"t\.jsonl:1: not a JSON line \(half of a surrogate pair, '\\udfff'\)"):
        rows(tmp_path / "t.jsonl")


def test_parquet_texts_named_often_are_read_and_bounded(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    texts = pa.DictionaryArray.from_arrays(pa.array([0, 1, 0, None] * 2_000, pa.int32()), ["x" * 9_999, "y"])
    lists = pa.array([[{"a": "p"}, {"a": "q"}], None, [], [{"a": None}]] * 2_000)
    mixed = pa.array([[{"a": f"{number:0900}"}, {"a": "often"}] for number in range(8_000)])
    table = pa.table({"t": texts, "l": lists, "m": mixed, "n": list(range(8_000)), "left": ["z"] * 8_000})
    pq.write_table(table, path, row_group_size=3_000)  # "m" outgrows its dictionaries: half of its pages are plain
    read = [row for _, row in parquet_rows(path, DEFAULT_LIMITS, ["n", "t", "l", "m", "absent"])]
    assert read == table.select(["n", "t", "l", "m"]).to_pylist()
    with pytest.raises(DataError, match=r"t\.parquet: has 8000 rows, over 7999 \(limits\.rows\)"):
        list(parquet_rows(path, ReadLimits(rows=7_999), ["n"]))


@pytest.mark.parametrize("length", [1 << 20, (1 << 20) + 1])
def test_a_row_of_parquet_may_be_as_long_as_the_limit(tmp_path: Path, length: int) -> None:
    pq.write_table(pa.table({"t": ["x", "x" * length]}), tmp_path / "t.parquet")
    rows_of = parquet_rows(tmp_path / "t.parquet", ReadLimits(line_mib=1), ["t"])
    if length == 1 << 20:
        assert len(list(rows_of)) == 2
    else:
        with pytest.raises(DataError, match=r"t\.parquet: row 2: is over 1 MiB long"):
            list(rows_of)


def test_a_recipe_sets_the_limits(tmp_path: Path) -> None:
    from distill.recipe import load_recipe

    recipe = load_recipe(written(tmp_path, GOOD | {"limits": {"rows": 1}}))
    (tmp_path / "t.jsonl").write_bytes(LINE * 2)
    with pytest.raises(DataError, match=r"t\.jsonl:2: the file goes on beyond 1 lines"):
        load_problems([LocalSource(path="t.jsonl")], base_dir=tmp_path, limits=recipe.limits)
    with pytest.raises(RecipeError, match=r"limits\.row: unknown key; did you mean 'rows'"):
        load_recipe(written(tmp_path, GOOD | {"limits": {"row": 1}}))
