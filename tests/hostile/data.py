"""Problems, benchmarks, ledgers: small files that stand for gigabytes, lines that are none, databases that compute."""

from __future__ import annotations

import gzip
import os
import sqlite3
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tests.hostile.case import (
    DOCTOR,
    GENERATE,
    TRAP,
    cases,
    content,
    deep_json,
    in_a_circle,
    instead,
    recipe,
    without_end,
)
from tests.hostile.settings import alias_bomb

OF_PROBLEMS = (DOCTOR, GENERATE)
OF_SUITE = (DOCTOR, ("eval", "recipe.yaml", "--out", "runs"))
OF_LEDGER = (("ledger", "merge", "merged.sqlite", "other.sqlite"),)
_ENDLESS = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT x FROM n"


def _problems(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(world: Path) -> None:
        make(world / name)
        recipe(problems=[{"kind": "local", "path": str(world / name)}])(world)

    return change


def _line(text: str | bytes) -> Callable[[Path], None]:
    """A good line, and then this one."""

    def make(path: Path) -> None:
        bad = text.encode() if isinstance(text, str) else text
        path.write_bytes(b'{"prompt": "1+1?", "answer": "2"}\n' + bad + b"\n")

    return make


def _row(prompt: str) -> str:
    return f'{{"prompt": {prompt}, "answer": "1"}}'


def _members(head: bytes, member: bytes, count: int) -> Callable[[Path], None]:
    """A gzip file of `count` equal members: gigabytes, packed once."""

    def make(path: Path) -> None:
        path.write_bytes(gzip.compress(head) + gzip.compress(member, 1) * count)

    return make


def _dictionary_bomb(path: Path) -> None:
    """A kilobyte of Parquet that stands for 1.6 TB: one text of 8 MiB, named 200,000 times."""
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * 200_000, pa.int32()), ["x" * (17 << 20)])
    pq.write_table(pa.table({"prompt": texts, "answer": pa.array(["1"] * 200_000)}), path, compression="zstd")


def _nested_dictionary_bomb(path: Path) -> None:
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * 100_000, pa.int32()), ["x" * (1 << 20)])
    lists = pa.ListArray.from_arrays(pa.array([0, 100_000], pa.int32()), texts)
    pq.write_table(pa.table({"prompt": lists, "answer": ["1"]}), path, compression="zstd")


def _page_bomb(path: Path) -> None:
    """One text of 1.1 GB, which packs to a few kilobytes; made by a process that has the memory for it."""
    subprocess.run([sys.executable, "-m", __name__, str(path)], check=True)


def _write_page_bomb(path: Path) -> None:
    text = pa.py_buffer(b"x" * 1_100_000_000)
    offsets = pa.py_buffer((0).to_bytes(4, "little") + text.size.to_bytes(4, "little"))
    column = pa.Array.from_buffers(pa.string(), 1, [None, offsets, text])
    table = pa.table({"prompt": column, "answer": ["1"]})
    pq.write_table(table, path, compression="zstd", use_dictionary=False, write_statistics=False)


def _problem_set(world: Path) -> None:
    (world / "set.yaml").write_text(alias_bomb(12))
    recipe(problems=[{"kind": "reasoning_gym", "families": "set.yaml", "count": 3}])(world)


def _broken_footer(path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["1+1?"], "answer": ["2"]}), path)
    data = bytearray(path.read_bytes())
    data[-40:-8] = b"\xff" * 32
    path.write_bytes(data)


def _hub_folder(name: str, content: bytes) -> Callable[[Path], None]:
    """A data set as `datasets` takes one, of one file."""

    def change(world: Path) -> None:
        (world / "set").mkdir()
        (world / "set" / name).write_bytes(content.replace(b"TRAP", str(world / TRAP).encode()))
        recipe(problems=[{"kind": "dataset", "repo": str(world / "set")}])(world)

    return change


def _suite(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(world: Path) -> None:
        (world / "bench").mkdir()
        make(world / "bench/aime24.json")
        recipe(eval={"suites": ["aime24"]}, bench_data=str(world / "bench"))(world)

    return change


def _database(*statements: str, ours: bool = True) -> Callable[[Path], None]:
    def make(world: Path) -> None:
        from distill.ledger_schema import APPLICATION_ID, SCHEMA, SCHEMA_VERSION

        with sqlite3.connect(world / "other.sqlite") as connection:
            if ours:
                connection.executescript(f"PRAGMA application_id = {APPLICATION_ID}; {SCHEMA}")
            connection.executescript(f"{';'.join(statements)}; PRAGMA user_version = {SCHEMA_VERSION};")

    return make


CASES = [
    *cases(
        OF_PROBLEMS,
        {
            "a-line-of-gigabytes": (
                _problems("p.jsonl.gz", _members(b'{"prompt": "', b"x" * (16 << 20), 96)),
                "p.jsonl.gz:1: is over 16 MiB long",
            ),
            "a-billion-blank-lines": (_problems("p.jsonl.gz", _members(b"", b"\n" * (16 << 20), 64)), "blank"),
            "a-long-plain-line": (_problems("p.jsonl", _line(_row(f'''"{"x" * (17 << 20)}"'''))), "p.jsonl:2: is over"),
            "half-of-a-gzip-file": (
                _problems("p.jsonl.gz", lambda path: path.write_bytes(gzip.compress(os.urandom(9000))[:5000])),
                "p.jsonl.gz",
            ),
            "zlib-for-gzip": (_problems("p.jsonl.gz", lambda path: path.write_bytes(zlib.compress(b"x"))), "gzip"),
            "a-deep-line": (_problems("p.jsonl", _line(_row(deep_json()))), "p.jsonl:2: not a JSON line"),
            "a-line-a-little-deep": (_problems("p.jsonl", _line(_row("[" * 90 + "]" * 90))), "p.jsonl:2: not a JSON"),
            "a-line-with-a-million-digits": (_problems("p.jsonl", _line(_row("9" * 10**6))), "p.jsonl:2: not a JSON"),
            "a-line-without-a-number": (_problems("p.jsonl", _line(_row("NaN"))), "p.jsonl:2: not a JSON line"),
            "half-of-a-pair": (_problems("p.jsonl", _line(_row('"a\\ud800b"'))), "p.jsonl:2: not a JSON line"),
            "a-line-of-another-encoding": (_problems("p.jsonl", _line(_row('"ü"').encode("latin-1"))), "p.jsonl:2"),
            "a-line-with-nul": (_problems("p.jsonl", _line(_row('"a\x00b"'))), "p.jsonl:2: not a JSON line"),
            "a-line-with-a-key-twice": (
                _problems("p.jsonl", _line('{"prompt": "a", "prompt": "b", "answer": "1"}')),
                "p.jsonl:2: not a JSON line ('prompt' occurs twice",
            ),
            "problems-as-a-pipe": (_problems("p.jsonl", os.mkfifo), "p.jsonl"),
            "problems-as-a-folder": (_problems("p.jsonl", Path.mkdir), "p.jsonl"),
            "problems-in-a-circle": (_problems("p.jsonl", in_a_circle), "p.jsonl"),
            "problems-without-end": (_problems("p.jsonl", without_end), "p.jsonl"),
            "a-text-named-often": (_problems("p.parquet", _dictionary_bomb), "p.parquet: row 1: is over 16 MiB"),
            "a-list-of-a-text-named-often": (_problems("p.parquet", _nested_dictionary_bomb), "p.parquet: row 1"),
            "a-broken-footer": (_problems("p.parquet", _broken_footer), "p.parquet: not a readable Parquet file"),
            "problem-set-of-aliases": (_problem_set, "set.yaml: not valid YAML: holds more"),
        },
    ),
    *cases(
        OF_PROBLEMS,
        {
            "a-page-of-a-gigabyte": (_problems("p.parquet", _page_bomb), "p.parquet: prompt: row group 0"),
        },
        slow=True,
    ),
    *cases(
        (GENERATE,),
        {
            "a-data-set-of-code": (_hub_folder("set.py", b"open('TRAP', 'w')"), "names code, which is not run"),
            "a-data-set-of-pickles": (_hub_folder("set.pkl", b"cos\nsystem\n(S'touch TRAP'\ntR."), "world/set"),
            "a-data-set-that-is-none": (_hub_folder("set.parquet", b"PAR1"), "world/set"),
        },
    ),
    *cases(
        OF_SUITE,
        {
            "a-deep-benchmark": (_suite(_line(deep_json())), "aime24.json"),
            "a-benchmark-as-a-pipe": (_suite(os.mkfifo), "aime24.json"),
            "a-benchmark-without-end": (_suite(without_end), "aime24.json"),
            "a-benchmark-of-one-line": (
                _suite(lambda path: path.write_bytes(b"x" * (17 << 20))),
                "aime24.json:1: is over",
            ),
        },
    ),
    *cases(
        OF_LEDGER,
        {
            "a-ledger-of-text": (content("other.sqlite", "not a database " * 99), "other.sqlite"),
            "a-ledger-as-a-pipe": (instead("other.sqlite", os.mkfifo), "other.sqlite"),
            "a-ledger-as-a-folder": (instead("other.sqlite", Path.mkdir), "other.sqlite"),
            "a-ledger-without-end": (instead("other.sqlite", without_end), "other.sqlite"),
            "another-database": (_database("CREATE TABLE things (x)", ours=False), "not a ledger"),
            "a-ledger-with-a-view": (_database("DROP TABLE traces", f"CREATE VIEW traces AS {_ENDLESS}"), "has a view"),
            "a-ledger-with-a-trigger": (
                _database(
                    "CREATE TRIGGER t AFTER INSERT ON traces BEGIN "
                    f"INSERT INTO verdicts SELECT x, x, x, x, x, x FROM ({_ENDLESS}); END"
                ),
                "has a trigger",
            ),
            "a-ledger-that-computes": (
                _database(
                    "DROP TABLE verdicts",
                    "CREATE TABLE verdicts (key TEXT, g TEXT GENERATED ALWAYS AS (hex(zeroblob(1000000000))))",
                ),
                "generated column",
            ),
        },
    ),
]

if __name__ == "__main__":
    _write_page_bomb(Path(sys.argv[1]))
