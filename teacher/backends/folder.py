"""A checkpoint folder that a backend's kernels can read: a copy, where they cannot read the folder itself.

Copies are made once a content: they lie in the cache folder (`$POTSTILL_CACHE`, else `~/.cache/potstill`) under the
hash of what they were made from.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from distill.errors import CheckpointError
from distill.hash_cache import cache_folder
from distill.manifest import environment_faults, hash_file, sync_folder
from distill.model_folder import read_config_json
from distill.records import content_id

# What MLA's kernel in vLLM's CPU build takes.
CPU_LATENT = {"kv_lora_rank": 512, "qk_rope_head_dim": 64}


def check_cpu_sizes(folder: Path) -> None:
    """Raises CheckpointError for an MLA whose sizes the kernel of vLLM's CPU build does not take."""
    config = read_config_json(folder)
    for field, size in CPU_LATENT.items() if config.get("model_type") == "deepseek_v3" else ():
        if config.get(field) != size:
            message = f"vLLM's CPU build takes {size} alone, got {config.get(field)!r}"
            raise CheckpointError(message, where=folder / "config.json", field=field)


def readable_on_cpu(folder: Path) -> Path:
    """A folder with this checkpoint that vLLM's CPU build can serve: a BF16 copy where the weights are FP8 blocks."""
    check_cpu_sizes(folder)
    config = read_config_json(folder)
    if (config.get("quantization_config") or {}).get("quant_method") != "fp8":
        return folder
    made_from = content_id([[path.name, hash_file(path)] for path in sorted(folder.iterdir()) if path.is_file()])
    # The last part is the name that the model is served under.
    copy = cache_folder() / "bf16" / made_from / folder.resolve().name
    if not copy.is_dir():
        _write_copy(folder, copy)
    return copy


def _write_copy(folder: Path, copy: Path) -> None:
    """Whole or not at all: written beside its place and renamed."""
    from teacher.model.checkpoint import convert_checkpoint

    with environment_faults(copy):
        copy.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=copy.parent, prefix=".") as temporary:
            convert_checkpoint(folder, Path(temporary) / "copy")
            try:
                (Path(temporary) / "copy").rename(copy)
            except OSError:
                if not copy.is_dir():  # else another process was first, with the same content
                    raise
        sync_folder(copy.parent)
