"""A Qwen2, Qwen3 or Llama checkpoint folder as a `Teacher`: what the eval stage asks for answers.

Any model under evaluation writes through `distill.protocols.Teacher`; this is the implementation for students and their
bases. It reads a local folder only, runs no code that lies in it, and checks what it reads before it believes it: a
missing shard, an index that points outside the folder, a wrong shape or a weight that is not a number is one
`CheckpointError` line. FP32 on the CPU, BF16 on a GPU. `eval.decoding` holds the sampling loop.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from distill.errors import CheckpointError, nearest
from distill.manifest import hash_file
from distill.records import Completion, Sampling, TeacherIdentity, TraceRequest

ARCHITECTURES = ("qwen2", "qwen3", "llama")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
THINK = "<think>"


class TransformersModel:
    """Satisfies `distill.protocols.Teacher`. `num_parameters` counts tied embeddings once."""

    def __init__(self, model: Any, tokenizer: Any, identity: TeacherIdentity, *, batch_size: int) -> None:
        self._model, self._tokenizer, self._identity = model, tokenizer, identity
        self._batch_size = batch_size
        self.architecture: str = model.config.model_type
        self.num_parameters: int = sum(parameter.numel() for parameter in model.parameters())
        self._context: int = model.config.max_position_embeddings
        self._eos = _end_tokens(model, tokenizer)

    @property
    def identity(self) -> TeacherIdentity:
        return self._identity

    def generate(self, requests: Sequence[TraceRequest], sampling: Sampling) -> Iterator[Completion]:
        """Yield completions as rows end. A request's noise comes from `TraceRequest.seed` and from nothing else.

        A prompt that leaves no room for a single new token in the model's context ends at once, with reason `length`.
        """
        from eval.decoding import Row, decode

        rows, heads = [], []
        for index, request in enumerate(requests):
            prompt, head = self._prompt(request.problem.prompt)
            room = min(sampling.max_tokens, self._context - len(prompt))
            heads.append(head)
            rows.append(Row(index=index, prompt=prompt, seed=request.seed(sampling), max_tokens=room))
        for row in [row for row in rows if row.max_tokens < 1]:
            yield self._completion(requests[row.index], row, heads[row.index])
        # Longest first: the worst case of memory comes at the start, and rows of a batch are of like length.
        fitting = sorted((row for row in rows if row.max_tokens >= 1), key=lambda row: -len(row.prompt))
        pad = self._tokenizer.pad_token_id
        for start in range(0, len(fitting), self._batch_size):
            for row in decode(
                self._model,
                fitting[start : start + self._batch_size],
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                eos=self._eos,
                pad=0 if pad is None else pad,
            ):
                yield self._completion(requests[row.index], row, heads[row.index])

    def close(self) -> None:
        self._model = None

    def _prompt(self, question: str) -> tuple[list[int], str]:
        """Token ids of the rendered prompt, and the opening of the answer that the template has already written."""
        if self._tokenizer.chat_template:
            text = self._tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
            )
            ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            text = question + "\n"
            ids = self._tokenizer(text)["input_ids"]
        opened = self._tokenizer.chat_template and text.rstrip().endswith(THINK)
        return list(ids), text[text.rindex(THINK) :] if opened else ""

    def _completion(self, request: TraceRequest, row: Any, head: str) -> Completion:
        text = self._tokenizer.decode(row.tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return Completion(
            request=request,
            text=head + text,
            finish_reason="stop" if row.finished else "length",
            num_prompt_tokens=len(row.prompt),
            num_tokens=len(row.tokens) + row.finished,  # the end token was written too
        )


def open_transformers_model(model_dir: Path | str, *, batch_size: int) -> TransformersModel:
    """Open a checkpoint folder. Raises CheckpointError (one line, names the file) for anything wrong in it."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
    from transformers.utils import logging as transformers_logging

    from eval.decoding import prepare

    folder = Path(model_dir)
    weights = check_files(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bars, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        # Of whatever lies beside a `qwen2` config AutoTokenizer makes a Qwen2Tokenizer, with Qwen's pre-tokenizer in
        # place of the file's own; tokenizer.json is what the model was trained with.
        reader = PreTrainedTokenizerFast if (folder / TOKENIZERS[0]).is_file() else AutoTokenizer
        tokenizer = reader.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32 if device == "cpu" else torch.bfloat16,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # reported below, with the weight's name
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError) as exc:
        reason = str(exc).strip().splitlines()
        raise CheckpointError(reason[0] if reason else type(exc).__name__, where=folder) from exc
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
    for kind, what in (("missing_keys", "missing"), ("mismatched_keys", "of another shape than config.json says")):
        if report[kind]:
            name = min(entry if isinstance(entry, str) else entry[0] for entry in report[kind])
            raise CheckpointError(f"weight {what}", where=folder, field=name)
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise CheckpointError("holds values that are not finite", where=folder, field=name)
    prepare(model.to(device).eval())
    return TransformersModel(model, tokenizer, _identity(folder, weights), batch_size=batch_size)


def check_files(folder: Path) -> list[Path]:
    """The folder's weight files, after checks that transformers leaves out. Raises CheckpointError."""
    if not folder.is_dir():
        raise CheckpointError("no such model folder", where=folder)
    config = _read_json(folder / "config.json")
    if config.get("model_type") not in ARCHITECTURES:
        hint = nearest(str(config.get("model_type")), ARCHITECTURES)
        raise CheckpointError(
            f"{config.get('model_type')!r} is not one of the student architectures; {hint}",
            where=folder / "config.json",
            field="model_type",
        )
    if config.get("use_sliding_window"):
        raise CheckpointError("sliding windows are not supported", where=folder, field="use_sliding_window")
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise CheckpointError("missing tokenizer file", where=folder / TOKENIZERS[0])
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if not (folder / names[0]).exists() and index.exists():
        shards = _read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise CheckpointError("must be a mapping of weight names to files", where=index, field="weight_map")
        names = sorted({str(name) for name in shards.values()})
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(f"{name!r} points outside the folder", where=index, field="weight_map")
        if not (folder / name).is_file():
            raise CheckpointError("missing weight file", where=folder / name)
    return [folder / name for name in names]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise CheckpointError(f"cannot be read ({exc.strerror})", where=path) from exc
    except ValueError as exc:
        raise CheckpointError(f"not valid JSON: {exc}", where=path) from exc
    if not isinstance(tree, dict):
        raise CheckpointError(f"must be a mapping, got {type(tree).__name__}", where=path)
    return tree


def _end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Every token that ends an answer: those the configs name, and the one that closes a turn in the chat template.

    The two differ in bases: Qwen2.5's EOS is `<|endoftext|>`, while its template ends turns with `<|im_end|>`.
    """
    ends: set[int] = set()
    for named in (model.generation_config.eos_token_id, model.config.eos_token_id, tokenizer.eos_token_id):
        ends.update([named] if isinstance(named, int) else named or [])
    if tokenizer.chat_template:
        marker = "potstill"
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": marker}]
        after = tokenizer.apply_chat_template(turns, tokenize=False).rpartition(marker)[2]
        closing = tokenizer(after, add_special_tokens=False)["input_ids"][:1] if after else []
        ends.update(token for token in closing if token in tokenizer.added_tokens_decoder)
    return frozenset(ends)


def _identity(folder: Path, weights: Sequence[Path]) -> TeacherIdentity:
    def digest(paths: Sequence[Path]) -> str:
        present = [f"{path.name}\0{hash_file(path)}" for path in paths if path.is_file()]
        return hashlib.sha256("\n".join(present).encode()).hexdigest()[:32]

    templates = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
    return TeacherIdentity(
        name=folder.resolve().name,
        weights=digest([folder / "config.json", *weights]),
        template=digest([folder / name for name in templates]),
        backend="transformers",
        backend_version=importlib.metadata.version("transformers"),
    )
