"""A model's folder, judged before any library opens it: nothing in it may run, and what config.json says must be so.

Libraries run what a folder names (`auto_map`: a class in a Python file beside it), ask on standard input whether they
may, load kernels of the Hub, follow an adapter to another model, and allocate whatever config.json asks for. All that
is refused here, in one line that names file and field. Values of weights are for whoever reads them to judge.
"""

from __future__ import annotations

import importlib.util
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from distill.errors import CheckpointError, EnvironmentFault
from distill.manifest import hash_file
from distill.reading.files import SETTINGS_BYTES, kind_of
from distill.reading.json_text import read_json
from distill.weights import StoredTensor, stored_tensors

TRIAL = Path(__file__).with_name("tokenizer_trial.py")
CONFIG = "config.json"
ADAPTER = "adapter_config.json"
# What transformers reads of a folder beside config.json; each may name code.
OTHER_SETTINGS = (
    "tokenizer_config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
# The largest tokenizer.json that is published has 34 MB (Gemma 3).
TOKENIZER_BYTES = 64 << 20
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja")
REMEDY = "where a library has the architecture itself, take the field out"
# Fields that name code, or a repository of the Hub with code.
CODE = ("auto_map", "custom_pipelines", "custom_generate")
KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
# DeepSeek's folders name their authors' code; engine, transformers and vLLM each have that architecture themselves.
OWN_CODE_STAYS_UNUSED = "deepseek_v3"

# Far beyond every model there is: (least, most).
SIZES = {
    **dict.fromkeys(("num_hidden_layers",), (1, 1 << 10)),
    **dict.fromkeys(("vocab_size",), (1, 1 << 22)),
    **dict.fromkeys(("hidden_size", "q_lora_rank", "kv_lora_rank"), (1, 1 << 18)),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size"), (1, 1 << 20)),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads"), (1, 1 << 14)),
    **dict.fromkeys(("head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), (1, 1 << 14)),
    **dict.fromkeys(("n_routed_experts", "num_experts", "num_local_experts", "num_experts_per_tok"), (1, 1 << 16)),
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group", "first_k_dense_replace"), (0, 1 << 16)),
    **dict.fromkeys(("num_nextn_predict_layers", "num_mtp_layers"), (0, 16)),
    **dict.fromkeys(("max_position_embeddings", "original_max_position_embeddings"), (1, 1 << 23)),
    **dict.fromkeys(("eos_token_id", "bos_token_id", "pad_token_id"), (-1, 1 << 22)),
}
MAX_EXPERTS_IN_ALL = 1 << 18  # over the layers; Kimi K2 has 23,424
ROPE = ("rope_scaling", "rope_parameters")
_LAYER = re.compile(r"model\.layers\.(\d{1,9})\.(?:mlp\.experts\.(\d{1,9})\.)?")


def check_model_folder(folder: Path) -> dict[str, Any]:
    """The content of config.json, once the folder has been judged, the weights by their headers.

    Raises CheckpointError for code that the folder names, a file that is none, an absurd size, weights that are
    missing, not whole, or of other shapes than config.json says, and a tokenizer that cannot be used.
    """
    tree = read_config_json(folder)
    check_shapes(tree, stored_tensors(folder), folder)
    if (tokenizer := folder / "tokenizer.json").exists() and (fault := _tried(hash_file(tokenizer), tokenizer)):
        raise CheckpointError(fault, where=tokenizer)
    return tree


def read_config_json(folder: Path) -> dict[str, Any]:
    """`config.json` of a folder whose settings name no code and no absurd size; the weights are not looked at."""
    path = folder / CONFIG
    if folder.is_dir():
        _check_files(folder)
    if not path.exists():
        raise CheckpointError("no such file", where=path)
    tree = read_json(path, CheckpointError)
    if not isinstance(tree, dict):
        raise CheckpointError(f"must be a JSON object, got {type(tree).__name__}", where=path)
    _check_code(tree, path, passed_over="auto_map" if tree.get("model_type") == OWN_CODE_STAYS_UNUSED else None)
    _check_sizes(tree, path)
    for name in OTHER_SETTINGS:
        if (other := folder / name).exists():
            _check_code(read_json(other, CheckpointError), other)
    return tree


def check_shapes(tree: dict[str, Any], stored: dict[str, StoredTensor], folder: Path) -> None:
    """Raise CheckpointError where the stored weights are of other sizes than config.json `tree` says.

    As far as the families here share their names: of others nothing is found, and nothing refused.
    """
    found = [match for name in stored if (match := _LAYER.match(name))]
    for field, group in (("num_hidden_layers", 1), ("n_routed_experts", 2)):
        num_stored = len({match[group] for match in found if match[group]})
        if num_stored and tree.get(field) is not None and tree[field] > num_stored:
            message = f"is {tree[field]}, the weights have {num_stored}"
            raise CheckpointError(message, where=folder / CONFIG, field=field)
    for name, field, shape in _expected(tree):
        if name in stored and stored[name].shape != shape:
            message = f"the weights have {list(stored[name].shape)} for {name}, config.json says {list(shape)}"
            raise CheckpointError(message, where=folder / CONFIG, field=field)


def _expected(tree: dict[str, Any]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Name, field of config.json that says so, and shape of weights that decide how much is allocated."""
    vocabulary, hidden, inner = (tree.get(name) for name in ("vocab_size", "hidden_size", "intermediate_size"))
    if hidden is None:
        return
    if vocabulary is not None:
        yield "model.embed_tokens.weight", "vocab_size", (vocabulary, hidden)
    if inner is not None:
        yield "model.layers.0.mlp.gate_proj.weight", "intermediate_size", (inner, hidden)
    heads, head_dim = tree.get("num_attention_heads"), tree.get("head_dim")
    if heads is not None and head_dim is not None:
        groups = tree.get("num_key_value_heads") or heads
        yield "model.layers.0.self_attn.q_proj.weight", "num_attention_heads", (heads * head_dim, hidden)
        yield "model.layers.0.self_attn.k_proj.weight", "num_key_value_heads", (groups * head_dim, hidden)


def _check_files(folder: Path) -> None:
    """Every entry is a file or a folder (a link may lead to one), and no settings are of absurd length."""
    if (folder / ADAPTER).exists():
        raise CheckpointError("is an adapter of another model; only whole models are read", where=folder / ADAPTER)
    for path in sorted(folder.iterdir()):
        is_read = path.name in (CONFIG, *OTHER_SETTINGS, *TOKENIZER_FILES)
        try:
            status = path.stat()
        except FileNotFoundError:
            continue  # a link to what is not there: whoever needs it says so
        except OSError as exc:
            raise CheckpointError(f"cannot be read ({exc.strerror})", where=path) from exc
        kind = kind_of(status.st_mode)
        if kind is not None and (is_read or not stat.S_ISDIR(status.st_mode)):
            raise CheckpointError(f"cannot be read (it is {kind})", where=path)
        most = TOKENIZER_BYTES if path.name in TOKENIZER_FILES else SETTINGS_BYTES
        if is_read and status.st_size > most:
            raise CheckpointError(f"has {status.st_size >> 20} MiB; at most {most >> 20} are read", where=path)


def _check_code(tree: Any, path: Path, *, passed_over: str | None = None) -> None:
    """Raise CheckpointError for a field, at whatever depth, that names code."""
    waiting = [("", tree)]
    while waiting:
        at, value = waiting.pop()
        if isinstance(value, list):
            waiting += [(f"{at}.{place}", inner) for place, inner in enumerate(value)]
        if not isinstance(value, dict):
            continue
        for name, inner in value.items():
            field = f"{at}.{name}".lstrip(".")
            if name in CODE and inner and field != passed_over:
                message = f"names Python code, which is not run: {_short(inner)}; {REMEDY}"
                raise CheckpointError(message, where=path, field=field)
            if name in KERNELS and "/" in str(inner):
                message = f"names code of the Hub, which is not run: {_short(inner)}"
                raise CheckpointError(message, where=path, field=field)
            if name == "tokenizer_class" and not (inner is None or (isinstance(inner, str) and inner.isidentifier())):
                raise CheckpointError(f"must be the name of a class, got {_short(inner)}", where=path, field=field)
            waiting.append((field, inner))


@lru_cache(maxsize=64)
def _tried(_content: str, tokenizer: Path) -> str:
    """The fault of a tokenizer.json, tried in a process of its own; empty where there is none."""
    library = importlib.util.find_spec("tokenizers")
    assert library is not None
    assert library.origin is not None
    command = [sys.executable, "-I", "-S", str(TRIAL), str(tokenizer), str(Path(library.origin).parent.parent)]
    try:
        child = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, env={}, check=False)
    except OSError as exc:
        raise EnvironmentFault(f"no process can be started to try it ({exc.strerror})", where=tokenizer) from exc
    if child.returncode < 0:
        return f"is not loaded and used within bounds ({signal.Signals(-child.returncode).name})"
    said = child.stderr.decode(errors="replace").strip().splitlines()
    return f"is not a usable tokenizer: {said[-1] if said else child.returncode}" if child.returncode else ""


def _check_sizes(tree: dict[str, Any], path: Path) -> None:
    for prefix, part in (("", tree), *((f"{name}.", tree.get(name)) for name in ROPE)):
        if not isinstance(part, dict):
            continue
        for name, (least, most) in SIZES.items():
            values = part.get(name)
            for value in values if isinstance(values, list) and name.endswith("_token_id") else [values]:
                if value is not None and (type(value) is not int or not least <= value <= most):
                    message = f"must be a whole number from {least} to {most}, got {_short(value)}"
                    raise CheckpointError(message, where=path, field=prefix + name)
    experts = (tree.get("n_routed_experts") or 0) * (tree.get("num_hidden_layers") or 0)
    if experts > MAX_EXPERTS_IN_ALL:
        message = f"over all layers they are {experts}, at most {MAX_EXPERTS_IN_ALL} are read"
        raise CheckpointError(message, where=path, field="n_routed_experts")


def _short(value: Any) -> str:
    """A value in a few words; an integer of thousands of digits could not be written at all."""
    if isinstance(value, int) and value.bit_length() > 64:
        return "a number of over 64 bits"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
