"""GGUF files of Llama, Qwen2 and Qwen3 models, taken wherever a checkpoint folder is.

A file is converted once: its BF16 folder lies in the cache folder (`$POTSTILL_CACHE`, else `~/.cache/potstill`) under
the hash of the file, and is what teachers and students open. It is here because both need it and neither may import the
other; numpy and `gguf`, which undoes the quantisations, suffice for it.

transformers reads GGUF too, but its tokenizers split digits and end turns in other ways than the models do, a head that
is stored beside the embedding unties the model, and the whole model is in memory in FP32.
"""

from __future__ import annotations

from pathlib import Path

from distill.errors import CheckpointError
from distill.hash_cache import cache_folder
from distill.manifest import atomic_folder, hash_file
from distill.progress import Progress
from distill.records import content_id

SUFFIX = ".gguf"
# Part of a converted folder's place: raise it when the same file is to become another folder.
CONVERSION = 1


def is_gguf(path: Path) -> bool:
    """Tell by the name whether a model's path is meant as a GGUF file."""
    return path.suffix.lower() == SUFFIX and not path.is_dir()


def checkpoint_folder(path: Path, *, progress: Progress | None = None) -> Path:
    """The folder that a model's path stands for: itself, or what a GGUF file was converted to.

    Raises CheckpointError for a GGUF file that is missing or cannot be read, EnvironmentFault for a full disk.
    """
    if not is_gguf(path):
        return path
    if not path.is_file():
        raise CheckpointError("no such file", where=path)
    # The last part is the name under which the model is served and its scores are written down.
    folder = cache_folder() / "gguf" / content_id([CONVERSION, hash_file(path)]) / path.stem
    if not folder.is_dir():
        from distill.gguf.convert import convert_gguf

        with atomic_folder(folder) as made:
            convert_gguf(path, made, progress=progress)
    return folder
