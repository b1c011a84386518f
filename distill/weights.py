"""A folder with a model's weights: its files checked before a single weight is used, and the hashes that identify it.

safetensors' own loader accepts duplicate names, and loaders that follow an index file accept paths that lead out of the
folder. Here every header is read and judged first: names, types, shapes, and that the bytes are there. It needs no
torch; values are for whoever reads them to judge.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from distill.errors import CheckpointError
from distill.manifest import hash_file
from distill.reading.files import open_file, read_text
from distill.reading.json_text import parse_json
from distill.records import TeacherIdentity, content_id

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_CONFIG_FILES = ("config.json", "generation_config.json")  # the latter says where an answer ends
_TEMPLATE_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "BOOL"), 1),
}
# DeepSeek-R1's largest shard has a header of 300 kB, one file of all its tensors would have one of 13 MB.
_MAX_HEADER_BYTES = 32 << 20
_MAX_DIMENSIONS = 8


class StoredTensor(NamedTuple):
    """A tensor as a shard's header describes it; `dtype` is safetensors' name for it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * _BYTES[self.dtype]


def weight_files(folder: Path) -> list[Path]:
    """Files that hold the weights. Raises CheckpointError for a missing shard or an index leaving the folder."""
    return sorted({folder / name for name in _index(folder).values()}) if _has_index(folder) else [_single(folder)]


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the folder, read from the headers alone.

    Raises CheckpointError for a missing or truncated shard, a name that occurs twice, an index that disagrees with its
    shards or points outside the folder, and for types that are none of safetensors' or fill no whole bytes.
    """
    found: dict[str, StoredTensor] = {}
    for path in weight_files(folder):
        for name, stored in _header(path):
            if name in found:
                raise CheckpointError(f"occurs twice, also in {found[name].file.name}", where=path, field=name)
            found[name] = stored
    if _has_index(folder):
        index = _index(folder)
        for name, file in index.items():
            if name not in found or found[name].file.name != file:
                raise CheckpointError(f"is not in {file}", where=folder / INDEX, field=f"weight_map.{name}")
        for name, stored in found.items():
            if name not in index:
                raise CheckpointError(f"is not in {INDEX}", where=stored.file, field=name)
    return found


def folder_identity(folder: Path, *, backend: str, backend_version: str) -> TeacherIdentity:
    """Identity of a folder's model as a backend runs it. Reads every byte."""
    return TeacherIdentity(
        name=folder.resolve().name,
        weights=weights_hash(folder),
        template=template_hash(folder),
        backend=backend,
        backend_version=backend_version,
    )


def weights_hash(folder: Path) -> str:
    """Hash of the weights, with config.json and generation_config.json."""
    settings = [path for name in _CONFIG_FILES if (path := folder / name).exists()]
    return _named_hash([*settings, *weight_files(folder)])


def template_hash(folder: Path) -> str:
    """Hash of the tokenizer's files and the chat template."""
    return _named_hash(path for name in _TEMPLATE_FILES if (path := folder / name).exists())


def _named_hash(paths: Iterable[Path]) -> str:
    return content_id([[path.name, hash_file(path)] for path in paths])


def _has_index(folder: Path) -> bool:
    return (folder / INDEX).exists()


def _single(folder: Path) -> Path:
    if not folder.is_dir():
        raise CheckpointError("no such folder", where=folder)
    path = folder / SINGLE
    if not path.exists():
        pickled = sorted(inner.name for inner in folder.iterdir() if inner.suffix in PICKLED)
        why = f"; {pickled[0]} is a pickle, which can run code and is not read" if pickled else ""
        raise CheckpointError(f"no such file, and no {INDEX} either{why}", where=path)
    return path


def _index(folder: Path) -> dict[str, str]:
    path = folder / INDEX
    text = read_text(path, CheckpointError)
    tree = parse_json(text, where=path, fault=CheckpointError, what="is not a readable index")
    weight_map = tree.get("weight_map") if isinstance(tree, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError("must be an object of tensor names and files", where=path, field="weight_map")
    for name, file in weight_map.items():
        field = f"weight_map.{name}"
        if not isinstance(file, str) or not file or file != Path(file).name or file in (".", ".."):
            raise CheckpointError(f"must name a file in this folder, got {file!r}", where=path, field=field)
        if "\\" in file or "\0" in file or not file.endswith(".safetensors"):
            raise CheckpointError(f"must be a .safetensors file, got {file!r}", where=path, field=field)
        if not (folder / file).exists():
            raise CheckpointError(f"no such file; {INDEX} names it for {name}", where=folder / file)
    return weight_map


def _header(path: Path) -> Iterator[tuple[str, StoredTensor]]:
    with open_file(path, CheckpointError) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 0 < length <= min(size - 8, _MAX_HEADER_BYTES):
            raise CheckpointError("is truncated or not a safetensors file", where=path)
        text = file.read(length)
    try:
        header = parse_json(text.decode(), where=path, fault=CheckpointError, what="has a damaged header")
    except UnicodeDecodeError as exc:
        raise CheckpointError("has a damaged header: not UTF-8", where=path) from exc
    if not isinstance(header, dict):
        raise CheckpointError("has a damaged header: not an object", where=path)
    for name, entry in header.items():
        if name != "__metadata__":
            yield name, _checked(path, name, entry, size - 8 - length)


def _checked(path: Path, name: str, entry: Any, num_data_bytes: int) -> StoredTensor:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        if len(shape) > _MAX_DIMENSIONS or any(type(size) is not int or size < 0 for size in shape):
            raise ValueError("no shape")
        num_bytes = prod(shape) * _BYTES.get(dtype, 0)
        in_order = 0 <= begin <= end
    except (TypeError, KeyError, ValueError) as exc:
        raise CheckpointError("has a damaged entry in the header", where=path, field=name) from exc
    if dtype not in _BYTES:
        raise CheckpointError(f"has type {dtype}; allowed: {', '.join(_BYTES)}", where=path, field=name)
    if not in_order or end - begin != num_bytes:
        raise CheckpointError(f"has {end - begin} bytes for {dtype} {list(shape)}", where=path, field=name)
    if end > num_data_bytes:
        missing = end - num_data_bytes
        raise CheckpointError(f"is truncated: {missing} bytes are missing at the end", where=path, field=name)
    return StoredTensor(path, dtype, shape)
